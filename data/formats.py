"""The shapes of files of samples that people have: a reader each, chosen by the keys that an item
has. What each reads stands in data/README.md, with its test."""
import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.calls import Call, as_json, call_text, parse_calls

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "agent": "assistant",
         "gpt": "assistant", "function_call": "assistant", "tool": "tool", "function": "tool",
         "observation": "tool", "system": "system", "developer": "system"}
NOT_ARGUMENTS = {"$schema", "$defs", "additionalProperties"}    # tell a schema without a "type"
ITEM_KEYS = {"id", "query", "tools", "answers", "messages", "conversations", "functions", "system",
             "instruction", "input", "expected_output"}         # the others are not read
TOOL_KEYS = {"api_name": "name", "api_description": "description", "inputSchema": "parameters",
             "input_schema": "parameters", "input_parameters": "parameters"}    # others' -> ours
MEND = "mend the file, or give another with --data"
KINDS = {b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"PK\x03\x04": "zip", b"BZh": "bzip2",
         b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"ARROW1": "Arrow", b"SQLite": "SQLite",
         b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"<": "HTML or XML",
         b"version https://git-lfs": "a pointer of Git LFS, not the file itself"}


# --- The items of a file --------------------------------------------------------------------------
def read_items(path: Path) -> list:
    """The items of a file of JSON or JSON Lines: its list, or the one under "data", or its one
    object. ValueError says where the file is wrong, and how; OSError that there is none."""
    content = path.read_bytes()
    try:
        items = json.loads(content.decode("utf-8-sig"))
        json.dumps(items, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:   # JSON Lines; or not UTF-8, NaN, endless nesting
        items = json_lines(content, path, error)
    if isinstance(items, dict) and items:
        items = items["data"] if isinstance(items.get("data"), list) else [items]
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}: not a list of samples, or an empty one; {MEND}")
    return items


def json_lines(content: bytes, path: Path, error: Exception) -> list:
    """The items of JSON Lines, of a file that as a whole is no JSON because of `error`; ValueError
    says what the file is."""
    kind = [KINDS[start] for start in KINDS if content.startswith(start)]
    kind += ["a table of text"] * (path.suffix in (".csv", ".tsv"))
    if kind:
        raise ValueError(f"{path}: is {kind[0]}; JSON and JSON Lines in UTF-8 are read; {MEND}")
    items, text = [], content.removeprefix(b"\xef\xbb\xbf")
    is_lines = text.lstrip().startswith(b"{")
    for number, line in enumerate(text.split(b"\n"), 1):
        try:
            if is_lines and line.strip():
                items.append(json.loads(line.decode()))
                as_json(items[-1], allow_nan=False).encode()
        except (ValueError, RecursionError) as fault:
            error, items = f"line {number}: {fault}" if items else error, []
            break
    if not items:
        raise ValueError(f"{path}: cannot be read and written as JSON ({error}); {MEND}")
    return items


# --- One reader a shape: an item -> what it says; ValueError says what is wrong in it -------------
@dataclass
class Item:
    """What a reader makes of an item of a file."""
    messages: tuple[dict, ...]
    tools: tuple[dict, ...]
    answers: tuple[Call, ...] | None            # None: it has no gold answer
    left_out: Sequence[str] = ()


def of_query(item: dict) -> Item:
    """{"query", "tools", "answers"}, as the benchmarks and xLAM have it."""
    query, raw, answers = item["query"], item.get("answers"), []
    if not isinstance(query, (str, list)):
        raise ValueError("'query' is of a wrong type")
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else query
    raw = decoded(raw, "answers") if isinstance(raw, str) else raw
    if not isinstance(raw, (list, type(None))):
        raise ValueError("'answers' is of a wrong type")
    for i, each in enumerate(raw or ()):    # SealTool says "tool", or "api", and "parameters"
        if not isinstance(each, dict):
            raise ValueError(f"answer {i}: not an object")
        call = Call(each.get("name", each.get("tool", each.get("api"))),
                    each.get("arguments", each.get("parameters")))
        if call.name and isinstance(call.name, str) and isinstance(call.arguments, dict):
            answers.append(call)
        elif calls := parse_calls(as_json({"tool_calls": [each]})).calls:
            answers += calls
        else:
            raise ValueError(f"answer {i}: no name or no arguments")
    answers = None if raw is None else tuple(answers)
    return Item(read_turns(turns), read_tools(item["tools"]), answers)


def of_chat(item: dict) -> Item:
    """{"messages", "tools"} of OpenAI's chat, or ShareGPT's {"conversations"} as Hermes and ToolACE
    have it. The gold answer is the last that the assistant calls behind the user's last turn, none
    if it only speaks there; without such a turn there is no gold."""
    turns, kept, raw, left_out = item.get("messages", item.get("conversations")), [], None, []
    if not isinstance(turns, list) or not all([isinstance(turn, dict) for turn in turns]):
        raise ValueError("the turns are no list of objects")
    first = str(turns[0].get("value")) if turns else ""
    if seals := re.search(r'^api_list = (\[.*])\ntask_instruction = "(.*)"$', first, re.M | re.S):
        gold = turns[-1].get("value") if turns[1:] else None        # Seal-Tools' own
        return of_query({"query": seals[2], "tools": seals[1], "answers": gold})
    for turn in [{"role": "system", "content": item.get("system") or ""}, *turns]:
        role, text = str(turn.get("role", turn.get("from"))), turn.get("content", turn.get("value"))
        if ROLES.get(role) == "system" and isinstance(text, str):
            listed = re.search(r"<tools>\s*([\[{].*?)</tools>|\[\s*\{.*}\s*]", text, re.S)
            if listed and listed[1]:
                raw, text = listed[1].strip(), text.replace(listed[0], "").strip()
                if raw[0] != "[":                       # a tool a line
                    raw = "[" + ",".join(filter(str.strip, raw.split("\n"))) + "]"
            elif listed and not {"tools", "functions"} & item.keys():
                raw, text = listed[0], ""
                left_out.append("of a system text that lists tools as JSON, the rest is left out")
        text = f"<tool_call>{text}</tool_call>" if role == "function_call" else text
        if text or ROLES.get(role) != "system":
            kept.append({**turn, "role": role, "content": text})
    tools = read_tools(item.get("tools", item.get("functions", raw)))
    names, answers, end = [tool["name"] for tool in tools], None, len(kept)
    for i in reversed(range(len(kept))):
        if ROLES.get(kept[i]["role"]) == "user":
            break
        if ROLES.get(kept[i]["role"]) == "assistant" and not answers:
            answers, end = tuple(said_in(kept[i], names)[1]), i
    if "answers" in item:
        answers, end = of_query({**item, "query": "-", "tools": list(tools)}).answers, len(kept)
    if end < len(kept) - 1:
        left_out.append("turns behind the last call are left out")
    return Item(read_turns(kept[:end], names), tools, answers, left_out)


def of_apibank(item: dict) -> Item:
    """{"instruction", "input", "expected_output"} of API-Bank's own files: a tool a line as JSON; a
    turn a line; calls in words, with the result behind "->"."""
    asked, said, gold = [item[key] for key in ("instruction", "input", "expected_output")]
    if not all([isinstance(text, str) for text in (asked, said, gold)]):
        raise ValueError("'instruction', 'input' or 'expected_output' is no text")
    tools = [decoded(line, "instruction") for line in asked.split("\n") if line.startswith("{")]
    said = re.sub("^Generate .*", "", said, flags=re.M)         # API-Bank's way of asking
    parts, turns = re.split("^(User|AI|API-Request): ?", f"{said}\n{gold}", flags=re.M), []
    for who, text in zip(parts[1::2], parts[2::2]):
        call, arrow, result = text.strip().partition("]->")
        if who == "API-Request" and arrow:
            turns += [{"role": "assistant", "content": f"{call}]"},
                      {"role": "tool", "content": result}]
        else:
            turns.append({"role": "user" if who == "User" else "assistant",
                          "content": text.strip()})
    return of_chat({"messages": turns, "tools": tools})


SHAPES = {("query", "tools"): of_query, ("messages",): of_chat, ("conversations",): of_chat,
          ("instruction", "input", "expected_output"): of_apibank}


def of_none(item: object) -> Item:
    """ValueError, with the keys that are there and the shapes that are known."""
    there = ", ".join(map(str, [*item][:12])) if isinstance(item, dict) else "none, no object"
    shapes = "; ".join(map(", ".join, SHAPES))
    raise ValueError(f"no known shape: keys found: {there}; known are: {shapes} (data/README.md)")


# --- Their parts ----------------------------------------------------------------------------------
def read_turns(turns: Sequence[dict], names: Sequence[str] = ()) -> tuple[dict, ...]:
    """The dialogue so far, in a chat template's roles. names: of the tools, for calls in words."""
    messages, text = [], ""
    for i, turn in enumerate(turns):
        role = ROLES.get(str(turn.get("role"))) if isinstance(turn, dict) else None
        content = turn.get("content") if role else None
        if role == "assistant" or isinstance(content, (list, dict)):
            content, calls = said_in(turn, names)
            if calls:
                content = "\n".join(filter(None, [content.strip(), call_text(calls)]))
        if role is None or not isinstance(content, str):
            raise ValueError(f"turn {i}: no role or no text")
        if turn is turns[-1]:       # API-Bank's way of asking is left out; our prompt has its own
            content = re.sub(r"\s*Generate API Request:\s*$", "", content)
        if role == "tool":          # earlier calls and their results, as in Qwen2.5's template
            is_tagged = content.startswith("<tool_response>")
            role = "user"
            content = content if is_tagged else f"<tool_response>\n{content}\n</tool_response>"
        if content.strip() or role != "assistant":
            messages.append({"role": role, "content": content})
            text += content if role != "system" else ""
    if not text.strip():
        raise ValueError("the query is empty")
    return tuple(messages)


def said_in(turn: dict, names: Sequence[str]) -> tuple[object, Sequence[Call]]:
    """The text of a turn and the calls in it: OpenAI's `tool_calls`, Anthropic's parts, Hermes'
    tags, API-Bank's fenced list, ToolACE's `[name(key=value)]`."""
    text, raw, calls = turn.get("content"), turn.get("tool_calls") or [], ()
    raw = [turn["function_call"]] if turn.get("function_call") else raw
    parts, text = (text, "") if isinstance(text, list) else ((), text)
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "tool_use":
            raw = [*raw, {"name": part.get("name"), "arguments": part.get("input")}]
        elif kind == "tool_result":
            text += f"<tool_response>\n{said_in(part, names)[0]}\n</tool_response>"
        elif kind in ("text", "input_text", "output_text"):
            text += str(part.get("text"))
        else:
            raise ValueError(f"a part of a turn is no text: {kind!r:.40}")
    text = as_json(text) if isinstance(text, dict) else text
    if raw:
        calls = parse_calls(as_json({"tool_calls": raw})).calls
        if not calls:
            raise ValueError("the calls of a turn cannot be read")
        return text or "", calls
    if isinstance(text, str) and ("<tool_call>" in text or
                                  re.fullmatch(r"\s*```(json)?\s*\[.*]\s*```\s*", text, re.S)):
        before, calls = re.split("<tool_call>|```", text)[0], parse_calls(text).calls
    elif names and isinstance(text, str) and text.strip()[:1] == "[":
        before, calls = "", calls_in_words(text.strip(), names)
    return (before, calls) if calls else (text, ())


def calls_in_words(text: str, names: Sequence[str]) -> Sequence[Call]:
    """The calls of `[name(key=value, ...), ...]`, whatever characters the tools' names have."""
    known = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))

    def as_object(found: re.Match) -> str:
        if found[1]:
            return f'{{"name": {as_json(found[1])}, "arguments": {{'
        return f'"{found[2]}": ' if found[2] else "}}" if found[0] == ")" else found[0]

    string = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
    return parse_calls(re.sub(rf"{string}|({known})\s*\(|(\w+)\s*=|\)", as_object, text)).calls


def read_tools(raw: object) -> tuple[dict, ...]:
    """The tools on offer, bare or in OpenAI's {"function"}, under the names of TOOL_KEYS; a full
    JSON schema is flattened, its definitions are put where they are named."""
    tools, raw = {}, decoded(raw, "tools") if isinstance(raw, str) else raw
    if not isinstance(raw, list):
        raise ValueError("'tools' is missing or of a wrong type")
    for i, each in enumerate(raw):
        if isinstance(each, dict) and isinstance(each.get("function"), dict):
            each = each["function"]
        each = each if isinstance(each, dict) else {}
        each = {TOOL_KEYS.get(key, key): part for key, part in each.items() if part is not None}
        name, parameters = each.get("name"), each.get("parameters", {})
        if not isinstance(name, str) or not name:
            raise ValueError(f"tool {i}: no name")
        if isinstance(parameters, dict) and '"$ref"' in json.dumps(parameters):
            parameters = inlined(parameters, {**each, **parameters}, (), [10_000])
        required = each.get("required")
        kind = parameters.get("type", "") if isinstance(parameters, dict) else {}
        inner = parameters.get("properties") if kind != {} else None
        if kind and isinstance(kind, (str, list)) or kind == "" and (
                NOT_ARGUMENTS & parameters.keys() or isinstance(inner, dict) and all(
                    [isinstance(value, (dict, bool)) for value in inner.values()])):
            # a full JSON schema: what it does not mark may be left out
            required, parameters = parameters.get("required") or required or [], inner or {}
        tool = {"name": name, "description": each.get("description", ""), "parameters": parameters}
        if required is not None:
            tool["required"] = required
        for key, kind in {"description": str, "parameters": dict, "required": list}.items():
            if not isinstance(tool.get(key, kind()), kind):
                raise ValueError(f"tool {i}: {name}: {key!r} is of a wrong type")
        for argument, schema in parameters.items():
            if not isinstance(schema, dict):
                raise ValueError(f"tool {i}: {name}: parameter {argument!r} is not an object")
        if tools.setdefault(name, tool) is not tool:
            raise ValueError(f"two tools are named {name}")
    if not tools:
        raise ValueError("no tool to call")
    return tuple(tools.values())


def inlined(schema: object, root: dict, chain: tuple[str, ...], left: list[int]) -> object:
    """A schema with what its "$ref"s name in their place; one within itself stays as it is."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError("the schema of a tool is too large with its definitions put in")
    if isinstance(schema, list):
        return [inlined(each, root, chain, left) for each in schema]
    ref = schema.get("$ref") if isinstance(schema, dict) else None
    if not isinstance(ref, str) or ref in chain:
        return {key: inlined(each, root, chain, left) for key, each in schema.items()} \
            if isinstance(schema, dict) else schema
    target, rest = root, {key: each for key, each in schema.items() if key != "$ref"}
    for part in ref.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        target = target.get(part) if isinstance(target, dict) else None
    if not isinstance(target, dict) or not ref.startswith("#"):
        raise ValueError(f"there is no definition {ref!r:.60}")
    return inlined({**target, **rest}, root, (*chain, ref), left)


def decoded(text: str, what: str) -> object:
    """The value that is written as a text, in JSON or as Python writes it."""
    for read in (json.loads, ast.literal_eval):
        try:
            return json.loads(as_json(read(text), allow_nan=False))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise ValueError(f"{what!r} is a text that is no JSON")
