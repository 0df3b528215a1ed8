"""`Sample`, what a task is, the benchmarks, and how a sample of tool calls is asked."""
import hashlib
import http.client
import json
import os
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.calls import marked_arguments
from data.formats import ITEM_KEYS, MEND, SHAPES, of_none, read_items
from data.runs import Verdict, code_digest, digest


@dataclass(frozen=True)
class Sample:
    """One test sample: the dialogue so far, the tools on offer, and the gold answer to score by."""
    id: str
    messages: tuple[dict, ...]      # {"role": "system" | "user" | "assistant", "content"}
    tools: tuple[dict, ...]         # {"name", "description", "parameters": {name: {"type", ...}}}
    answers: tuple | None = ()      # the label; for tool calls, Calls; None: nobody knows it


def request_text(sample: Sample) -> str:
    """What the user says, on one line: of a dialogue the user's turns alone."""
    said = [m["content"] for m in sample.messages if m["role"] == "user"]
    return " ".join(" ".join(text.split()) for text in said if not text.startswith("<tool_"))


def with_request(sample: Sample, request: str) -> Sample:
    """A new sample x': the same tools and system text, one turn of the user, and no answers."""
    system = [m for m in sample.messages if m["role"] == "system"]
    return Sample(sample.id, (*system, {"role": "user", "content": request}), sample.tools)


@dataclass(frozen=True)
class Task:
    """All that Algorithm 1 has to know of a kind of task. Another task is another such object."""
    prompt: Callable[[Sample], list[dict]]      # the messages that ask for an answer
    actions: Callable[[Sample], list[str]]      # a_1..a_N, what the model chooses from
    answer_start: Callable[[str], str]          # an answer up to where it names its action
    action_end: str                             # the character that ends an action; "": the turn
    tries: dict[str, Callable]      # --pair -> G's (writer, samples, h, attempt, config) -> [Try]
    verdict: Callable[[str, Sample], Verdict]   # is an answer right? It alone reads the label
    gold: Callable[[Sequence], str]             # the label as a text
    code: dict[str, str] = field(init=False)    # digests of what stages run of it, for their keys

    def __post_init__(self):
        asks = code_digest(self.prompt, self.actions, self.answer_start) + self.action_end
        code = {"asks": asks, "tries": code_digest(*self.tries.values())}
        object.__setattr__(self, "code", code)


def shuffled(sample: Sample, seed: int) -> Sample:
    """The sample with its tools in an order that the seed, its id and their names draw, whatever
    their order was."""
    # ours: SealTool's gold tool is the first of five in 88 of 100 samples.
    def drawn(tool: dict) -> str: return digest([seed, sample.id, tool["name"]])
    return replace(sample, tools=tuple(sorted(sample.tools, key=drawn)))


# --- Calling tools: how a sample is asked ---------------------------------------------------------
# ours: the system text is neutral. What a turn asks for (a call, a new request) is said in the user
# turn, behind the tools. So one KV cache of this text serves scoring, answering and writing alike.
SYSTEM = "You are a helpful assistant. You can use these tools:\n<tools>\n{tools}\n</tools>"
ASK_CALL = (
    "\n\nAnswer with nothing but the tool calls that this request needs, each in this form:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')


def call_prompt(sample: Sample) -> list[dict]:
    """The messages that ask for a sample's calls: its own system text, the neutral one with one
    tool a line as JSON, the dialogue, and behind the request what is asked for."""
    tools = "\n".join([json.dumps(tool, ensure_ascii=False) for tool in sample.tools])
    system = [m["content"] for m in sample.messages if m["role"] == "system"]
    system = "\n\n".join([*system, SYSTEM.format(tools=tools)])
    turns = [m for m in sample.messages if m["role"] != "system"]
    *before, last = [{"role": "system", "content": system}, *turns]
    if last["role"] == "user" and not last["content"].startswith("<tool_response>"):
        return [*before, {"role": "user", "content": last["content"] + ASK_CALL}]
    return [*before, last, {"role": "user", "content": ASK_CALL.strip()}]


def call_names(sample: Sample) -> list[str]:
    """The candidate actions of a sample: the names of its tools."""
    return [tool["name"] for tool in sample.tools]


# --- The benchmarks -------------------------------------------------------------------------------
COMMIT = "ff415d9998180b5a68bbfdda3309ec04b472fb49"
URL = f"https://raw.githubusercontent.com/MadeAgents/Hammer/{COMMIT}/data/test/original/"
PUBLISHED = {       # benchmark: (file at URL, its git blob id = sha1("blob <size>\0" + content))
    "toolalpaca": ("toolalpaca.json", "17a6c5e0b5714d53155576a9a3ef11a25bd96a18"),
    "sealtool": ("sealtool.json", "888e58f7525c3c8e9b81eca62218735fc5f15099"),
    "apibank": ("apibank_l1.json", "5649186a0045f2cdbe2b2990f950b297c20ab957"),
    "apibank_l2": ("apibank_l2.json", "64aa399489486558fea40ac23dfe955175473559"),
    "nexusraven": ("NexusRaven.json", "58f525bfc13880f28884fe5dc5e9fd67e61460ad"),
}


def load(bench: str, data: str = "", offline: bool = False, ask: str = "") -> list[Sample]:
    """A benchmark's samples in file order, or those of a file `data` that is named `bench`; sample
    i keeps its own id, or is named f"{bench}-{i}". The file is `data`, or in the folder `data`;
    else in the folder $TTSI_DATA; else in the cache (~/.cache/ttsi or $XDG_CACHE_HOME/ttsi),
    downloaded there unless `offline`. "bundled" is the generated stand-in in data/samples. Raises
    ValueError (where the file is wrong, and how) or OSError (no file). What is left out is said.
    ask: one request in place of the samples, with the tools of the first or of a file of tools."""
    if bench not in PUBLISHED and data in ("", "bundled"):
        known = ", ".join(PUBLISHED)
        raise ValueError(f"unknown benchmark {bench!r}; choose one of {known}, or --data FILE")
    name, blob = PUBLISHED.get(bench, ("", ""))
    own = os.path.expanduser(data or os.environ.get("TTSI_DATA", ""))
    path = Path(own, name) if os.path.isdir(own) else Path(own)
    if data == "bundled":
        path = Path(__file__).parent / "samples" / f"{bench}.json"
    elif not own or (os.path.isdir(own) and not data and not path.is_file()):
        path = cached_file(URL + name, blob, offline)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}; {what_there_is(path, name, data)}")
    items = first_or_tools(read_items(path)) if ask else read_items(path)
    samples, ids, said = [], set(), Counter()
    for i, item in enumerate(items):
        keys = item.keys() if isinstance(item, dict) else set()
        for shape, read in SHAPES.items():
            if keys >= set(shape):
                break
        else:
            read = of_none
        try:
            found = read(item)
        except ValueError as error:
            raise ValueError(f"{path}, item {i}: {error}; {MEND}") from None
        id, tools = item.get("id"), found.tools
        if not isinstance(id, (str, int)) or id == "":
            id = f"{bench}-{i}"
        said.update(found.left_out)
        for key in sorted(keys - ITEM_KEYS):
            said[f"{key!r} is not read"] += 1
        if bench == "toolalpaca":
            # ours: left out are ToolAlpaca's entries `components` (the layout of the results).
            tools = tuple([t for t in tools if t["name"] != "components" or t["parameters"]])
            said["`components` is no tool"] += len(found.tools) - len(tools)
        if bench in ("toolalpaca", "nexusraven") and path.name in (name, f"{bench}.json"):
            for tool in tools:                  # they mark what is required: else nothing is
                if marked_arguments(tool) is None:
                    tool["required"] = []
        samples.append(Sample(str(id), found.messages, tools, found.answers))
        ids.add(str(id))
    if len(ids) < len(samples):
        samples = [replace(x, id=f"{bench}-{i}") for i, x in enumerate(samples)]
        said["ids are not unique: samples are named by their place"] += 1
    for what, count in (+said).items():
        print(f"{path}: {what} ({count} times)")
    if ask:
        asked = {"role": "user", "content": ask}
        return [Sample(f"{bench}-0", (asked,), samples[0].tools, None)]
    return samples


def what_there_is(path: Path, name: str, data: str) -> str:
    """What a user may give in place of a file that is not there."""
    hint = f"--data and $TTSI_DATA take {name or 'a file of samples'} or its folder"
    if data == "bundled":
        there = ", ".join(sorted([each.stem for each in path.parent.glob("*.json")]))
        hint += f"; bundled are only {there}; another --model downloads it"
    return hint


def first_or_tools(items: list) -> list[dict]:
    """A file's first sample alone; of a file of tools, bare or as {"tools"}, one with these."""
    first = items[0] if isinstance(items[0], dict) else {}
    if any([first.keys() >= set(shape) for shape in SHAPES]):
        return items[:1]
    return [{"query": "-", "tools": first.get("tools", items)}]


def cached_file(url: str, blob: str, offline: bool) -> Path:
    """The file of a URL in the cache: checked by its git blob id, downloaded when need be."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(cache, "ttsi", url.rpartition("/")[2])
    if path.is_file() and blob_id(path.read_bytes()) == blob:
        return path
    if offline:
        raise FileNotFoundError(f"offline, and {path} is missing or not as published; use --data")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"cannot download {url} ({error}); give a copy with --data") from None
    if blob_id(content) != blob:
        raise ValueError(f"{url} is not the file of git blob id {blob}; give a copy with --data")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")    # so that `path` is never half
    part.write_bytes(content)
    part.replace(path)
    return path


def blob_id(content: bytes) -> str:
    """The id of a file in git: `blob_id(b"") -> "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"`."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
