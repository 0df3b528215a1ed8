"""The benchmarks as lists of `Sample`, and the prompt that a sample is shown as."""
import hashlib
import http.client
import json
import os
import re
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

from data.calls import Call, marked_arguments, parse_calls

COMMIT = "ff415d9998180b5a68bbfdda3309ec04b472fb49"
URL = f"https://raw.githubusercontent.com/MadeAgents/Hammer/{COMMIT}/data/test/original/"
PUBLISHED = {       # benchmark: (file at URL, its git blob id = sha1("blob <size>\0" + content))
    "toolalpaca": ("toolalpaca.json", "17a6c5e0b5714d53155576a9a3ef11a25bd96a18"),
    "sealtool": ("sealtool.json", "888e58f7525c3c8e9b81eca62218735fc5f15099"),
    "apibank": ("apibank_l1.json", "5649186a0045f2cdbe2b2990f950b297c20ab957"),
    "apibank_l2": ("apibank_l2.json", "64aa399489486558fea40ac23dfe955175473559"),
    "nexusraven": ("NexusRaven.json", "58f525bfc13880f28884fe5dc5e9fd67e61460ad"),
}

# ours: the system text is neutral. What a turn asks for (a call, a new request) is said in the user
# turn, behind the tools. So one KV cache of this text serves scoring, answering and writing alike.
SYSTEM = "You are a helpful assistant. You can use these tools:\n<tools>\n{tools}\n</tools>"
ASK_CALL = (
    "\n\nAnswer with nothing but the tool calls that this request needs, each in this form:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')


@dataclass(frozen=True)
class Sample:
    """One test sample: the dialogue so far, the tools on offer, and the gold calls to score by."""
    id: str
    messages: tuple[dict, ...]      # {"role": "user" | "assistant", "content"}; the last one asks
    tools: tuple[dict, ...]         # {"name", "description", "parameters": {name: {"type", ...}}}
    answers: tuple[Call, ...] = ()

    def without_answers(self) -> "Sample":
        """The sample as the method may see it: it never sees a label."""
        return replace(self, answers=())


def system_message(tools: tuple[dict, ...]) -> dict:
    """The first message of every prompt: the neutral system text with one tool a line, as JSON."""
    lines = [json.dumps(tool, ensure_ascii=False) for tool in tools]
    return {"role": "system", "content": SYSTEM.format(tools="\n".join(lines))}


def call_prompt(sample: Sample) -> list[dict]:
    """The messages that ask for a sample's calls: tools, dialogue, and the form of the answer."""
    *before, last = [system_message(sample.tools), *sample.messages]
    if last["role"] == "user" and not last["content"].startswith("<tool_response>"):
        return [*before, {"role": "user", "content": last["content"] + ASK_CALL}]
    return [*before, last, {"role": "user", "content": ASK_CALL.strip()}]


def call_text(calls: tuple[Call, ...]) -> str:
    """The answer in the form asked for, which is also Qwen2.5's own for past calls."""
    objects = [json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
               for call in calls]
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)


def request_text(sample: Sample) -> str:
    """The sample's request on one line; a dialogue as its turns, with who says what."""
    spoken = [(m["role"].capitalize(), " ".join(m["content"].split())) for m in sample.messages
              if not m["content"].startswith("<tool_")]
    if len(spoken) == 1:
        return spoken[0][1]
    return " ".join(f"{role}: {text}" for role, text in spoken)


def with_request(sample: Sample, request: str) -> Sample:
    """A new sample x': the same tools, one turn of the user, and no answers."""
    return Sample(sample.id, ({"role": "user", "content": request},), sample.tools)


def load(bench: str, data: str = "", offline: bool = False, bundled: bool = False) -> list[Sample]:
    """A benchmark's samples in file order; sample i has the id f"{bench}-{i}".

    The file is `data`, or in the folder `data`; else in the folder $TTSI_DATA; else in the cache
    (~/.cache/ttsi or $XDG_CACHE_HOME/ttsi), downloaded there unless `offline`. A cached file is
    checked against the published git blob id, the user's own is not. `bundled` takes the generated
    stand-in in data/samples. Raises ValueError (a fault in the file: where, and what) or OSError
    (no such file, or no download).
    """
    if bench not in PUBLISHED:
        raise ValueError(f"unknown benchmark {bench!r}; choose one of {', '.join(PUBLISHED)}")
    path = Path(__file__).parent / "samples" / f"{bench}.json"
    if bundled and not path.is_file():
        raise FileNotFoundError(f"no bundled samples for {bench} ({path}); give a file with --data")
    path = path if bundled else find_file(bench, data, offline)
    samples = [parse_sample(item, f"{bench}-{i}", f"{path}, item {i}")
               for i, item in enumerate(read_items(path))]
    tools = [tool for sample in samples for tool in sample.tools]
    if any(map(marked_arguments, tools)):   # this file marks what is required: else nothing is
        for tool in tools:
            if marked_arguments(tool) is None:
                tool["required"] = []
    return samples


def find_file(bench: str, data: str, offline: bool) -> Path:
    """The benchmark's file: the user's own, or the cached one."""
    name, blob = PUBLISHED[bench]
    own = os.path.expanduser(data or os.environ.get("TTSI_DATA", ""))
    path = os.path.join(own, name) if os.path.isdir(own) else own
    if os.path.isfile(path):
        return Path(path)
    if data or own and not os.path.isdir(own):
        raise FileNotFoundError(f"no file {path}; --data and $TTSI_DATA take a file, or a folder "
                                f"with {name}")
    return cached_file(URL + name, blob, offline)


def cached_file(url: str, blob: str, offline: bool) -> Path:
    """The file of a URL in the cache: checked by its git blob id, downloaded when need be.
    ConnectionError if it cannot be had, ValueError if another file is there."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(cache, "ttsi", url.rpartition("/")[2])
    if path.is_file() and blob_id(path.read_bytes()) == blob:
        return path
    if offline:
        raise FileNotFoundError(f"offline, and {path} is missing or not the published file (its "
                                "git blob id differs); give a copy with --data")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"cannot download {url} ({error}); give a copy with --data") from None
    if blob_id(content) != blob:
        raise ValueError(f"{url} is not the published file: its git blob id is {blob_id(content)}, "
                         f"not {blob}; try again, or give a copy with --data")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")    # so that `path` is never half
    part.write_bytes(content)
    part.replace(path)
    return path


def blob_id(content: bytes) -> str:
    """The id of a file in git: `blob_id(b"") -> "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"`."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def read_items(path: Path) -> list:
    """The list in a JSON file, of which each item can be written as UTF-8 JSON again."""
    where = str(path)
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
        for i, item in enumerate(items if isinstance(items, list) else []):
            where = f"{path}, item {i}"
            json.dumps(item, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:   # no JSON, not UTF-8, NaN, endless nesting
        need(False, where, f"cannot be read and written as JSON ({error})")
    need(isinstance(items, list) and items, path, "not a list of samples, or an empty one")
    return items


def need(holds: object, where: Path | str, what: str) -> None:
    """Raise the ValueError that names a fault in a data file, unless it `holds`."""
    if not holds:
        raise ValueError(f"{where}: {what}; mend the file, or give another with --data")


def parse_sample(item: dict, id: str, where: str) -> Sample:
    """An item of a file, {"query", "tools", "answers"}, as a Sample; `where` names it in errors."""
    need(isinstance(item, dict), where, "not an object")
    for key, kinds in {"query": (str, list), "tools": list, "answers": list}.items():
        need(isinstance(item.get(key), kinds), where, f"{key!r} is missing or of a wrong type")
    tools = [parse_tool(raw, f"{where}, tool {i}") for i, raw in enumerate(item["tools"])]
    tools = tuple(tool for tool in tools if tool is not None)
    names = [tool["name"] for tool in tools]
    need(tools, where, "no tool that can be called")
    need(len(set(names)) == len(names), where, f"two tools of one name among {', '.join(names)}")
    answers = [parse_answer(raw, f"{where}, answer {i}") for i, raw in enumerate(item["answers"])]
    return Sample(id, parse_query(item["query"], where), tools, tuple(answers))


def parse_tool(raw: dict, where: str) -> dict | None:
    """A tool with only what a model is to see; None for an entry that only documents something."""
    named = isinstance(raw, dict) and isinstance(raw.get("name"), str) and raw["name"]
    need(named, where, "no name")
    where, parameters, required = f"{where} ({named})", raw.get("parameters"), raw.get("required")
    # ours: left out are entries without parameters and ToolAlpaca's `components` (the layout of the
    # results): no call of them answers a request. So are "return" and "desc_for_search".
    if parameters is None or (named == "components" and parameters == {}):
        return None
    need(isinstance(parameters, dict), where, "'parameters' is not an object")
    if isinstance(parameters.get("type"), str):                     # a full JSON schema: flattened
        required = parameters.get("required", required)
        parameters = parameters.get("properties", {})
        need(isinstance(parameters, dict), where, "'properties' is not an object")
    for name, schema in parameters.items():
        need(isinstance(schema, dict), where, f"parameter {name!r} is not an object")
    tool = {"name": named, "description": raw.get("description", ""), "parameters": parameters}
    need(isinstance(tool["description"], str), where, "'description' is not a string")
    if required is None:
        return tool
    need(isinstance(required, list) and all(isinstance(name, str) for name in required), where,
         "'required' is not a list of names")
    return tool | {"required": required}


def parse_answer(raw: dict, where: str) -> Call:
    """A gold call, from {"name", "arguments"} or (SealTool) {"tool", "parameters"}."""
    need(isinstance(raw, dict), where, "not an object")
    call = Call(raw.get("name", raw.get("tool")), raw.get("arguments", raw.get("parameters")))
    need(isinstance(call.name, str) and isinstance(call.arguments, dict), where,
         'neither {"name", "arguments"} nor {"tool", "parameters"}')
    return call


def parse_query(query: str | list, where: str) -> tuple[dict, ...]:
    """The dialogue so far, from a request or from API-Bank's turns, in a chat template's roles."""
    messages = []
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else query
    for i, turn in enumerate(turns):
        need(isinstance(turn, dict) and isinstance(turn.get("content"), str)
             and turn.get("role") in ("user", "agent", "assistant", "tool"), where,
             f"turn {i} of the query is no turn of a known role")
        role, content = turn["role"].replace("agent", "assistant"), turn["content"]
        if turn is turns[-1]:       # API-Bank's way of asking is left out; our prompt has its own
            content = re.sub(r"\s*Generate API Request:\s*$", "", content)
        if role == "tool":          # earlier calls and their results, as in Qwen2.5's template
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        elif role == "assistant":
            content = past_calls(content) or content
        if content.strip() or role != "assistant":
            messages.append({"role": role, "content": content})
    need(any(message["content"].strip() for message in messages), where, "the query is empty")
    return tuple(messages)


def past_calls(content: str) -> str:
    """The calls of an earlier turn, ```[{"name", "arguments"}, ...]```, as a text of calls; "" for
    any other text."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(\[.*\])\s*```\s*", content, re.DOTALL)
    return call_text(parse_calls(fenced[1]).calls) if fenced else ""
