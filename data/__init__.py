"""The benchmarks as lists of `Sample`, and the prompt that a sample is shown as."""
import hashlib
import http.client
import json
import os
import re
import tempfile
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

from data.calls import Call

URL = "https://raw.githubusercontent.com/MadeAgents/Hammer/ff415d9998180b5a68bbfdda3309ec04b472fb49/data/test/original/"
PUBLISHED = {                           # benchmark: (file at URL, its git blob id = sha1("blob <size>\0" + content))
    "toolalpaca": ("toolalpaca.json", "17a6c5e0b5714d53155576a9a3ef11a25bd96a18"),
    "sealtool": ("sealtool.json", "888e58f7525c3c8e9b81eca62218735fc5f15099"),
    "apibank": ("apibank_l1.json", "5649186a0045f2cdbe2b2990f950b297c20ab957"),
    "apibank_l2": ("apibank_l2.json", "64aa399489486558fea40ac23dfe955175473559"),
    "nexusraven": ("NexusRaven.json", "58f525bfc13880f28884fe5dc5e9fd67e61460ad"),
}
MAX_BYTES = 256 * 2 ** 20               # the published files have at most a few MB; a larger one is a mistake

# ours: the system text is neutral. What a turn asks for (a call, a new request) is said in the user turn, behind the
# tools, so that one KV cache of this text serves scoring, answering and writing new requests alike.
SYSTEM = "You are a helpful assistant. You can use these tools:\n<tools>\n{tools}\n</tools>"
ASK_CALL = ('\n\nAnswer with nothing but the tool calls that this request needs, each in this form:\n<tool_call>\n'
            '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')


@dataclass(frozen=True)
class Sample:
    """One test sample: the dialogue so far, the tools on offer, and the gold calls, which score the answers."""
    id: str
    messages: tuple[dict, ...]          # {"role", "content"[, "tool_calls"]}, as the chat template takes them; the last asks
    tools: tuple[dict, ...]             # {"name", "description", "parameters": {name: {"type", "description", ...}}}
    answers: tuple[Call, ...] = ()

    def without_answers(self) -> "Sample":
        """The sample as the method may see it: labels never reach scoring, writing, training or answering."""
        return replace(self, answers=())


def system_message(tools: tuple[dict, ...]) -> dict:
    """The first message of every prompt: the neutral system text with one tool a line, as JSON."""
    return {"role": "system", "content": SYSTEM.format(tools="\n".join(json.dumps(t, ensure_ascii=False) for t in tools))}


def call_prompt(sample: Sample) -> list[dict]:
    """The messages that ask for a sample's calls: system and tools, the dialogue, and the form of the answer."""
    messages = [system_message(sample.tools), *sample.messages]
    if messages[-1]["role"] == "user":
        messages[-1] = {"role": "user", "content": messages[-1]["content"] + ASK_CALL}
    else:
        messages.append({"role": "user", "content": ASK_CALL.strip()})
    return messages


def call_text(calls: tuple[Call, ...]) -> str:
    """The answer in the form that the prompt asks for (and that Qwen2.5's chat template gives to past calls)."""
    return "\n".join(f'<tool_call>\n{{"name": {json.dumps(c.name, ensure_ascii=False)}, "arguments": '
                     f'{json.dumps(c.arguments, ensure_ascii=False)}}}\n</tool_call>' for c in calls)


def load(bench: str, data: str | None = None, offline: bool = False, bundled: bool = False) -> list[Sample]:
    """A benchmark's samples in file order; sample i has the id f"{bench}-{i}".

    The file is `data` (itself, or a folder that holds the published file name); else it is looked for in the folder
    $TTSI_DATA, then in the cache (~/.cache/ttsi or $XDG_CACHE_HOME/ttsi), then downloaded there unless `offline`. With
    `bundled` it is the small generated stand-in in data/samples. What is downloaded or cached is checked against the
    published git blob id; the user's own files are not.
    Raises ValueError (what is wrong, in which file and item), FileNotFoundError, or ConnectionError (no download).
    """
    if bench not in PUBLISHED:
        raise ValueError(f"unknown benchmark {bench!r}; choose one of {', '.join(PUBLISHED)}")
    path = Path(__file__).parent / "samples" / f"{bench}.json" if bundled else find_file(bench, data, offline)
    if not path.is_file():
        raise FileNotFoundError(f"no bundled samples for {bench} ({path}); give the benchmark's file with --data")
    samples = [parse_sample(item, f"{bench}-{i}", f"{path}, item {i}") for i, item in enumerate(read_items(path))]
    if any(p.get("required") is True for sample in samples for tool in sample.tools for p in tool["parameters"].values()):
        for sample in samples:          # this file marks what is required, so a tool without a mark requires nothing
            for tool in sample.tools:
                if not any("required" in p for p in tool["parameters"].values()):
                    tool.setdefault("required", [])
    return samples


def find_file(bench: str, data: str | None, offline: bool) -> Path:
    """The benchmark's file: the user's own, or the cached one, downloaded when need be."""
    name, blob = PUBLISHED[bench]
    if data is not None:
        path = Path(os.path.expanduser(data))
        path = path / name if os.path.isdir(path) else path     # os.path: False where pathlib raises (name too long)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no file {path}; --data takes a file, or a folder that holds {name}")
        return path
    if folder := os.environ.get("TTSI_DATA"):
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"TTSI_DATA={folder} is no folder; mend it, or give the file with --data")
        if (path := Path(folder, name)).is_file():
            return path
    path = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ttsi", name)
    if path.is_file() and blob_id(read_bytes(path)) == blob:
        return path
    if offline:
        state = "is not the published file (its git blob id differs)" if path.is_file() else "is not there"
        raise FileNotFoundError(f"offline, and the cached {path} {state}; give a copy or its folder with --data")
    download(path, blob)
    return path


def blob_id(content: bytes) -> str:
    """The id under which git stores a file: `blob_id(b"")` -> "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def download(path: Path, blob: str) -> None:
    """Put the published file of the same name at `path`, whole and checked, or not at all."""
    try:
        with urllib.request.urlopen(URL + path.name, timeout=60) as response:
            content = response.read(MAX_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"cannot download {URL + path.name} ({error}); give a copy with --data") from None
    if blob_id(content) != blob:
        raise ValueError(f"{URL + path.name} sent another file than the published one (git blob id {blob_id(content)} "
                         f"instead of {blob}); try again, or give a copy with --data")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if part.exists():
            part.unlink()
        raise FileNotFoundError(f"cannot write {path} ({error}); set XDG_CACHE_HOME, or use --data") from None


def read_bytes(path: Path) -> bytes:
    try:
        need(path.stat().st_size <= MAX_BYTES, path, f"larger than {MAX_BYTES:,} bytes, so no benchmark file")
        return path.read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"cannot read {path} ({error.strerror}); give a readable file with --data") from None


def read_items(path: Path) -> list:
    """The list in a JSON file; each of its items can be written as UTF-8 JSON again."""
    content, where = read_bytes(path), str(path)
    try:
        items = json.loads(content.decode("utf-8-sig"))
        for i, item in enumerate(items if isinstance(items, list) else []):
            where = f"{path}, item {i}"
            json.dumps(item, ensure_ascii=False, allow_nan=False).encode()
    except json.JSONDecodeError as error:
        need(False, f"{path}, line {error.lineno}", f"not JSON ({error.msg})")
    except (ValueError, RecursionError) as error:       # not UTF-8, a lone surrogate, a NaN, endless nesting or digits
        need(False, where, f"text or number that cannot be stored as JSON ({error})")
    need(isinstance(items, list) and items != [], path, "not a list of samples, or an empty one")
    return items


def need(holds: bool, where: Path | str, what: str) -> None:
    """Raise the ValueError that names a fault in a data file, unless `holds`."""
    if not holds:
        raise ValueError(f"{where}: {what}; mend the file, or give another with --data")


def parse_sample(item: dict, id: str, where: str) -> Sample:
    """One item of a benchmark file, {"query", "tools", "answers"}, as a Sample; `where` names it in errors."""
    need(isinstance(item, dict), where, "not an object")
    for key, kinds in {"query": (str, list), "tools": list, "answers": list}.items():
        need(isinstance(item.get(key), kinds), where, f"{key!r} is missing or of a wrong type")
    tools = tuple(t for i, raw in enumerate(item["tools"]) if (t := parse_tool(raw, f"{where}, tool {i}")))
    names = [tool["name"] for tool in tools]
    need(tools != (), where, "no tool that can be called")
    need(len(set(names)) == len(names), where, f"two tools of one name among {', '.join(names)}")
    answers = tuple(parse_answer(raw, f"{where}, answer {i}") for i, raw in enumerate(item["answers"]))
    return Sample(id, parse_query(item["query"], where), tools, answers)


def parse_tool(raw: dict, where: str) -> dict | None:
    """One tool with only what a model is to see of it; None for an entry that documents instead of being callable."""
    need(isinstance(raw, dict) and isinstance(raw.get("name"), str) and raw["name"] != "", where, "no name")
    where, parameters, required = f"{where} ({raw['name']})", raw.get("parameters"), raw.get("required")
    # ours: left out are entries without parameters and ToolAlpaca's `components` (the layout of the tools' results): no
    # request can be answered by calling them, so they are no candidates. So are "return" and "desc_for_search".
    if parameters is None or (raw["name"] == "components" and parameters == {}):
        return None
    need(isinstance(parameters, dict), where, "'parameters' is not an object")
    if isinstance(parameters.get("type"), str):                     # a full JSON schema: flattened
        parameters, required = parameters.get("properties", {}), parameters.get("required", required)
        need(isinstance(parameters, dict), where, "'properties' is not an object")
    for name, schema in parameters.items():
        need(isinstance(schema, dict), where, f"parameter {name!r} is not an object")
    tool = {"name": raw["name"], "description": raw.get("description", ""), "parameters": parameters}
    need(isinstance(tool["description"], str), where, "'description' is not a string")
    need(required is None or isinstance(required, list) and all(isinstance(name, str) for name in required), where,
         "'required' is not a list of names")
    return tool if required is None else tool | {"required": required}


def parse_answer(raw: dict, where: str) -> Call:
    """A gold call, from {"name", "arguments"} or (SealTool) {"tool", "parameters"}."""
    need(isinstance(raw, dict), where, "not an object")
    call = Call(raw.get("name", raw.get("tool")), raw.get("arguments", raw.get("parameters")))
    need(isinstance(call.name, str) and isinstance(call.arguments, dict), where,
         'neither {"name", "arguments"} nor {"tool", "parameters"}')
    return call


def parse_query(query: str | list, where: str) -> tuple[dict, ...]:
    """The dialogue so far, from a plain request or from API-Bank's turns, in the roles of a chat template."""
    messages = [{"role": "user", "content": query}] if isinstance(query, str) else []
    for i, turn in enumerate(query if isinstance(query, list) else []):
        need(isinstance(turn, dict) and turn.get("role") in ("user", "agent", "assistant", "tool")
             and isinstance(turn.get("content"), str), where, f"turn {i} of the query is no turn of a known role")
        role, content = "assistant" if turn["role"] == "agent" else turn["role"], turn["content"]
        if i == len(query) - 1:                                     # API-Bank's way of asking; our prompt has its own
            content = re.sub(r"\s*Generate API Request:\s*$", "", content)
        calls = past_calls(content) if turn["role"] == "assistant" else None
        if calls:
            messages.append({"role": role, "content": "", "tool_calls": calls})
        elif content.strip() or role != "assistant":
            messages.append({"role": role, "content": content})
    need(any(message["content"].strip() for message in messages), where, "the query is empty")
    return tuple(messages)


def past_calls(content: str) -> list[dict] | None:
    """The calls of an earlier turn, ```[{"name", "arguments"}, ...]```; None if the text is anything else."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(\[.*\])\s*```\s*", content, re.DOTALL)
    try:
        return [{"name": call["name"], "arguments": call["arguments"]} for call in json.loads(fenced[1])]
    except (TypeError, KeyError, ValueError, RecursionError):
        return None
