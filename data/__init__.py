"""The benchmarks as lists of `Sample`, and the prompt that a sample is shown as."""
import hashlib
import http.client
import json
import os
import re
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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


def call_json(call: Call) -> str:
    """A call as one line of JSON."""
    return json.dumps(asdict(call), ensure_ascii=False)


def call_text(calls: Sequence[Call]) -> str:
    """The answer in the form asked for, which is also Qwen2.5's own for past calls."""
    return "\n".join(f"<tool_call>\n{call_json(call)}\n</tool_call>" for call in calls)


def request_text(sample: Sample) -> str:
    """What the user says, on one line: of a dialogue the user's turns alone."""
    said = [m["content"] for m in sample.messages if m["role"] == "user"]
    return " ".join(" ".join(text.split()) for text in said if not text.startswith("<tool_"))


def with_request(sample: Sample, request: str) -> Sample:
    """A new sample x': the same tools, one turn of the user, and no answers."""
    return Sample(sample.id, ({"role": "user", "content": request},), sample.tools)


def need(holds: object, where: Path | str, what: str) -> None:
    """Raise the ValueError that names a fault in a data file, unless it `holds`."""
    if not holds:
        raise ValueError(f"{where}: {what}; mend the file, or give another with --data")


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
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(items, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:   # no JSON, not UTF-8, NaN, endless nesting
        need(False, path, f"cannot be read and written as JSON ({error})")
    need(isinstance(items, list) and items, path, "not a list of samples, or an empty one")
    samples = [parse_sample(x, f"{bench}-{i}", f"{path}, item {i}") for i, x in enumerate(items)]
    tools = [tool for sample in samples for tool in sample.tools]
    if any(map(marked_arguments, tools)):   # this file marks what is required: else nothing is
        for tool in tools:
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


def parse_sample(item: dict, id: str, where: str) -> Sample:
    """An item of a file, {"query", "tools", "answers"}, as a Sample; `where` names it in errors."""
    for key, kinds in {"query": (str, list), "tools": list, "answers": list}.items():
        right = isinstance(item, dict) and isinstance(item.get(key), kinds)
        need(right, where, f"{key!r} is missing or of a wrong type")
    tools = [parse_tool(raw, f"{where}, tool {i}") for i, raw in enumerate(item["tools"])]
    tools = tuple(tool for tool in tools if tool is not None)
    names = {tool["name"] for tool in tools}
    need(tools and len(names) == len(tools), where, "no tool to call, or two tools of one name")
    answers = []
    for i, raw in enumerate(item["answers"]):       # SealTool says "tool" and "parameters"
        need(isinstance(raw, dict), f"{where}, answer {i}", "not an object")
        call = Call(raw.get("name", raw.get("tool")), raw.get("arguments", raw.get("parameters")))
        right = isinstance(call.name, str) and isinstance(call.arguments, dict)
        need(right, f"{where}, answer {i}", "no name or no arguments")
        answers.append(call)
    return Sample(id, parse_query(item["query"], where), tools, tuple(answers))


def parse_tool(raw: dict, where: str) -> dict | None:
    """A tool with only what a model is to see; None for an entry that only documents something."""
    name = raw.get("name") if isinstance(raw, dict) else None
    need(isinstance(name, str) and name, where, "no name")
    parameters, required = raw.get("parameters"), raw.get("required")
    # ours: left out are entries without parameters and ToolAlpaca's `components` (the layout of the
    # results): no call of them answers a request. So are "return" and "desc_for_search".
    if parameters is None or (name == "components" and parameters == {}):
        return None
    if isinstance(parameters, dict) and isinstance(parameters.get("type"), str):
        required = parameters.get("required", required)             # a full JSON schema: flattened
        parameters = parameters.get("properties", {})
    tool = {"name": name, "description": raw.get("description", ""), "parameters": parameters}
    if required is not None:
        tool["required"] = required
    for key, kind in {"description": str, "parameters": dict, "required": list}.items():
        need(isinstance(tool.get(key, kind()), kind), where, f"{name}: {key!r} is of a wrong type")
    for argument, schema in parameters.items():
        need(isinstance(schema, dict), where, f"{name}: parameter {argument!r} is not an object")
    return tool


def parse_query(query: str | list, where: str) -> tuple[dict, ...]:
    """The dialogue so far, from a request or from API-Bank's turns, in a chat template's roles."""
    messages = []
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else query
    for i, turn in enumerate(turns):
        fits = isinstance(turn, dict) and turn.get("role") in ("user", "agent", "assistant", "tool")
        need(fits and isinstance(turn.get("content"), str), where, f"turn {i}: no role or no text")
        role, content = turn["role"].replace("agent", "assistant"), turn["content"]
        if turn is turns[-1]:       # API-Bank's way of asking is left out; our prompt has its own
            content = re.sub(r"\s*Generate API Request:\s*$", "", content)
        if role == "tool":          # earlier calls and their results, as in Qwen2.5's template
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        elif role == "assistant" and re.fullmatch(r"\s*```(json)?\s*\[.*]\s*```\s*", content, re.S):
            content = call_text(parse_calls(content).calls) or content
        if content.strip() or role != "assistant":
            messages.append({"role": role, "content": content})
    need(any(message["content"].strip() for message in messages), where, "the query is empty")
    return tuple(messages)
