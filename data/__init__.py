"""`Sample`, what a task is, the benchmarks, and how a sample of tool calls is asked."""
import hashlib
import http.client
import json
import os
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.calls import marked_arguments
from data.formats import parse_item
from data.runs import Verdict, code_digest


@dataclass(frozen=True)
class Sample:
    """One test sample: the dialogue so far, the tools on offer, and the gold answer to score by."""
    id: str
    messages: tuple[dict, ...]      # {"role": "user" | "assistant", "content"}; the last one asks
    tools: tuple[dict, ...]         # {"name", "description", "parameters": {name: {"type", ...}}}
    answers: tuple = ()             # the label; for tool calls, one Call or several


def request_text(sample: Sample) -> str:
    """What the user says, on one line: of a dialogue the user's turns alone."""
    said = [m["content"] for m in sample.messages if m["role"] == "user"]
    return " ".join(" ".join(text.split()) for text in said if not text.startswith("<tool_"))


def with_request(sample: Sample, request: str) -> Sample:
    """A new sample x': the same tools, one turn of the user, and no answers."""
    return Sample(sample.id, ({"role": "user", "content": request},), sample.tools)


@dataclass(frozen=True)
class Task:
    """All that Algorithm 1 has to know of a kind of task. Another task is another such object."""
    prompt: Callable[[Sample], list[dict]]      # the messages that ask for an answer
    actions: Callable[[Sample], list[str]]      # a_1..a_N, what the model chooses from
    answer_start: Callable[[str], str]          # an answer up to where it names its action
    action_end: str                             # the character that ends an action; "": the turn
    tries: dict[str, Callable]                  # --pair -> a try at a pair for each sample (G)
    verdict: Callable[[str, Sample], Verdict]   # is an answer right? It alone reads the label
    gold: Callable[[Sequence], str]             # the label as a text
    code: dict[str, str] = field(init=False)    # digests of what stages run of it, for their keys

    def __post_init__(self):
        asks = code_digest(self.prompt, self.actions, self.answer_start) + self.action_end
        code = {"asks": asks, "tries": code_digest(*self.tries.values())}
        object.__setattr__(self, "code", code)


# --- Calling tools: how a sample is asked ---------------------------------------------------------
# ours: the system text is neutral. What a turn asks for (a call, a new request) is said in the user
# turn, behind the tools. So one KV cache of this text serves scoring, answering and writing alike.
SYSTEM = "You are a helpful assistant. You can use these tools:\n<tools>\n{tools}\n</tools>"
ASK_CALL = (
    "\n\nAnswer with nothing but the tool calls that this request needs, each in this form:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')


def call_prompt(sample: Sample) -> list[dict]:
    """The messages that ask for a sample's calls: the neutral system text with one tool a line as
    JSON, the dialogue, and behind the request what is asked for."""
    tools = "\n".join([json.dumps(tool, ensure_ascii=False) for tool in sample.tools])
    *before, last = [{"role": "system", "content": SYSTEM.format(tools=tools)}, *sample.messages]
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


def load(bench: str, data: str = "", offline: bool = False) -> list[Sample]:
    """A benchmark's samples in file order; sample i is named f"{bench}-{i}". The file is `data`,
    or in the folder `data`; else in the folder $TTSI_DATA; else in the cache (~/.cache/ttsi or
    $XDG_CACHE_HOME/ttsi), downloaded there unless `offline`. "bundled" is the generated stand-in
    in data/samples. Raises ValueError (where the file is wrong, and how) or OSError (no file)."""
    if bench not in PUBLISHED:
        raise ValueError(f"unknown benchmark {bench!r}; choose one of {', '.join(PUBLISHED)}")
    name, blob = PUBLISHED[bench]
    own = os.path.expanduser(data or os.environ.get("TTSI_DATA", ""))
    path = Path(own, name) if os.path.isdir(own) else Path(own)
    if data == "bundled":
        path = Path(__file__).parent / "samples" / f"{bench}.json"
    elif not own or (os.path.isdir(own) and not data and not path.is_file()):
        path = cached_file(URL + name, blob, offline)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}; --data and $TTSI_DATA take {name} or its folder")
    mend = "mend the file, or give another with --data"
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(items, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:   # no JSON, not UTF-8, NaN, endless nesting
        fault = f"cannot be read and written as JSON ({error})"
        raise ValueError(f"{path}: {fault}; {mend}") from error
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}: not a list of samples, or an empty one; {mend}")
    samples, has_marks = [], False
    for i, item in enumerate(items):
        try:
            samples.append(Sample(f"{bench}-{i}", *parse_item(item)))
        except ValueError as error:
            raise ValueError(f"{path}, item {i}: {error}; {mend}") from None
        for tool in samples[-1].tools:
            has_marks = has_marks or bool(marked_arguments(tool))
    for sample in samples if has_marks else ():
        for tool in sample.tools:               # this file marks what is required: else nothing is
            if marked_arguments(tool) is None:
                tool["required"] = []
    return samples


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
