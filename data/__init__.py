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
    """One test sample: the dialogue so far, the tools on offer, and the gold calls (which only evaluate.py reads)."""
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

    The file is `data` (a file, or a folder that holds the published file name); else it is looked for in the folder
    $TTSI_DATA, then in the cache (~/.cache/ttsi or $XDG_CACHE_HOME/ttsi), then downloaded there unless `offline`. With
    `bundled` it is the small generated stand-in in data/samples. Downloaded and cached files are checked against
    their published git blob id; the user's own are not.
    Raises ValueError (what is wrong, in which file and item), FileNotFoundError, or ConnectionError (no download).
    """
    if bench not in PUBLISHED:
        raise ValueError(f"unknown benchmark {bench!r}; choose one of {', '.join(PUBLISHED)}")
    path = bundled_file(bench) if bundled else find_file(bench, data, offline)
    return [parse_sample(item, f"{bench}-{i}", f"{path}, item {i}") for i, item in enumerate(read_items(path))]


def bundled_file(bench: str) -> Path:
    """The small file of generated samples in the style of `bench` that comes with the code (see data/tiny/make.py)."""
    path = Path(__file__).parent / "samples" / f"{bench}.json"
    if not path.is_file():
        raise FileNotFoundError(f"no bundled samples for {bench} ({path}); give the real file with --data")
    return path


def find_file(bench: str, data: str | None, offline: bool) -> Path:
    """The benchmark's file: the user's own, or the cached one, downloaded when need be."""
    name, blob = PUBLISHED[bench]
    if data is not None:
        path = Path(data).expanduser() / name if Path(data).expanduser().is_dir() else Path(data).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; --data takes a file, or a folder that holds {name}")
        return path
    if folder := os.environ.get("TTSI_DATA"):
        if not Path(folder).expanduser().is_dir():
            raise FileNotFoundError(f"TTSI_DATA={folder} is no folder; unset it, or give the file's folder with --data")
        if (path := Path(folder).expanduser() / name).is_file():
            return path
    path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ttsi" / name
    if path.is_file() and blob_id(read_bytes(path)) == blob:
        return path
    if offline:
        state = "is not the published file (its git blob id differs)" if path.is_file() else "is not there"
        raise FileNotFoundError(f"offline, and the cached {path} {state}; give the file or its folder with --data")
    write_atomically(path, download(name, blob))
    return path


def blob_id(content: bytes) -> str:
    """The id under which git stores a file: `blob_id(b"")` -> "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def download(name: str, blob: str) -> bytes:
    """The published file's content, checked; ConnectionError without network, ValueError if it is another file."""
    try:
        with urllib.request.urlopen(URL + name, timeout=60) as response:
            content = response.read(MAX_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"cannot download {URL + name} ({error}); give a copy or its folder with --data") from None
    if blob_id(content) != blob:
        raise ValueError(f"what {URL + name} sent is not the published file: git blob id {blob_id(content)} instead of "
                         f"{blob}; try again, or give a copy with --data")
    return content


def write_atomically(path: Path, content: bytes) -> None:
    """Put a file in place whole or not at all, so that a killed run leaves no torn cache behind."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            part = file.name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if part and os.path.exists(part):
            os.unlink(part)
        raise FileNotFoundError(f"cannot write the cache file {path} ({error}); set XDG_CACHE_HOME, or use --data") from None


def read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}; "
                             f"give a benchmark file with --data")
        return path.read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"cannot read {path} ({error.strerror}); give a readable file with --data") from None


def read_items(path: Path) -> list:
    """The JSON list in a file, each of its items storable as UTF-8 JSON again."""
    try:
        items = json.loads(read_bytes(path).decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); mend it, or use --data") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); mend it, or use --data") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read; give a benchmark file with --data") from None
    need(isinstance(items, list) and bool(items), path, "not a list of samples, or an empty one")
    for i, item in enumerate(items):
        try:
            json.dumps(item, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:     # a lone surrogate (\ud800) or a NaN: neither can be tokenized or stored later
            raise ValueError(f"{path}, item {i}: text or number that JSON cannot carry ({error}); mend it, "
                             f"or use --data") from None
    return items


def need(holds: bool, where: Path | str, what: str) -> None:
    """Raise the ValueError that names a fault in a data file, unless `holds`."""
    if not holds:
        raise ValueError(f"{where}: {what}; mend the file, or give another with --data")


def parse_sample(item: dict, id: str, where: str) -> Sample:
    """One item of a benchmark file, {"query", "tools", "answers"}, as a Sample; `where` names it in errors."""
    need(isinstance(item, dict), where, f"not an object but {type(item).__name__}")
    for key in ("query", "tools", "answers"):
        need(key in item, where, f"no {key!r}")
    for key in ("tools", "answers"):
        need(isinstance(item[key], list), where, f"{key!r} is not a list")
    tools = tuple(t for i, raw in enumerate(item["tools"]) if (t := parse_tool(raw, f"{where}, tool {i}")))
    need(bool(tools), where, "no tool that can be called")
    names = [tool["name"] for tool in tools]
    twice = sorted({name for name in names if names.count(name) > 1})
    need(not twice, where, f"two tools of the same name: {', '.join(twice)}")
    answers = tuple(parse_answer(raw, f"{where}, answer {i}") for i, raw in enumerate(item["answers"]))
    return Sample(id, parse_query(item["query"], where), tools, answers)


def parse_tool(raw: dict, where: str) -> dict | None:
    """One tool with only what a model is to see of it; None for an entry that documents instead of being callable."""
    need(isinstance(raw, dict), where, f"not an object but {type(raw).__name__}")
    need(isinstance(raw.get("name"), str) and raw["name"] != "", where, "no name")
    where, parameters, required = f"{where} ({raw['name']})", raw.get("parameters"), raw.get("required")
    # ours: left out are entries without parameters and ToolAlpaca's `components` (the layout of the tools' results): no
    # request can be answered by calling them, so they are no candidates. So are "return" and "desc_for_search".
    if parameters is None or (raw["name"] == "components" and parameters == {}):
        return None
    need(isinstance(parameters, dict), where, f"'parameters' is not an object but {type(parameters).__name__}")
    if isinstance(parameters.get("type"), str) and "properties" in parameters:      # a full JSON schema: flattened
        parameters, required = parameters["properties"], parameters.get("required", required)
        need(isinstance(parameters, dict), where, "'properties' is not an object")
    for name, schema in parameters.items():
        need(isinstance(schema, dict), where, f"parameter {name!r} is not an object but {type(schema).__name__}")
    need(isinstance(raw.get("description", ""), str), where, "'description' is not a string")
    tool = {"name": raw["name"], "description": raw.get("description", ""), "parameters": parameters}
    if required is None:
        return tool
    need(isinstance(required, list) and all(isinstance(r, str) for r in required), where, "'required' is no list of names")
    return tool | {"required": required}


def parse_answer(raw: dict, where: str) -> Call:
    """A gold call, from {"name", "arguments"} or (SealTool) {"tool", "parameters"}."""
    need(isinstance(raw, dict), where, f"not an object but {type(raw).__name__}")
    name, arguments = (raw.get("name"), raw.get("arguments")) if "name" in raw else (raw.get("tool"), raw.get("parameters"))
    need(isinstance(name, str) and name != "" and isinstance(arguments, dict), where,
         'neither {"name", "arguments"} nor {"tool", "parameters"} with a string and an object')
    return Call(name, arguments)


def parse_query(query: str | list, where: str) -> tuple[dict, ...]:
    """The dialogue so far, from a plain request or from API-Bank's turns, in the roles of a chat template."""
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else query
    need(isinstance(turns, list) and bool(turns), where, "'query' is neither a string nor a list of turns")
    messages = []
    for i, turn in enumerate(turns):
        need(isinstance(turn, dict) and turn.get("role") in ("user", "agent", "assistant", "tool")
             and isinstance(turn.get("content"), str), where, f"turn {i} of the query is no {{role, content}} of a known role")
        role, content = "assistant" if turn["role"] == "agent" else turn["role"], turn["content"]
        if i == len(turns) - 1 and isinstance(query, list):     # API-Bank's own way of asking; the prompt has another
            content = re.sub(r"\s*Generate API Request:\s*$", "", content)
            if role == "assistant" and not content.strip():
                continue
        calls = parse_past_calls(content) if turn["role"] == "assistant" else None
        messages.append({"role": role, "content": content} if calls is None else
                        {"role": role, "content": "", "tool_calls": calls})
    need(any(m["content"].strip() for m in messages), where, "the query is empty")
    return tuple(messages)


def parse_past_calls(content: str) -> list[dict] | None:
    """The calls of an earlier turn, ```[{"name", "arguments"}, ...]```; None if the text is anything else."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(\[.*\])\s*```\s*", content, re.DOTALL)
    try:
        calls = json.loads(fenced.group(1)) if fenced else None
    except ValueError:
        return None
    if not calls or not all(isinstance(c, dict) and {"name", "arguments"} <= c.keys() for c in calls):
        return None
    return [{"name": c["name"], "arguments": c["arguments"]} for c in calls]
