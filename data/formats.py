"""The shapes of files of samples that people have: one reader a shape, chosen by an item's keys.
The table in data/README.md says what each reads."""
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from data.calls import Call, as_json, call_text, parse_calls

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "agent": "assistant",
         "gpt": "assistant", "model": "assistant", "function_call": "assistant", "tool": "tool",
         "function": "tool", "observation": "tool", "system": "system", "developer": "system"}
NOT_ARGUMENTS = {"$schema", "$defs", "additionalProperties"}     # tell a schema without a "type"


@dataclass
class Item:
    """What a reader makes of an item of a file."""
    messages: tuple[dict, ...]
    tools: tuple[dict, ...]
    answers: tuple[Call, ...] | None            # None: it has no gold answer
    left_out: list[str] = field(default_factory=list)       # what is not used, and why
    reads: tuple[str, ...] = ("id", "query", "tools", "answers")


# --- One reader a shape ---------------------------------------------------------------------------
def of_query(item: dict) -> Item:
    """{"query", "tools", "answers"}: the benchmarks', xLAM's. ValueError says what is wrong."""
    query = item["query"]
    if not isinstance(query, (str, list)):
        raise ValueError("'query' is of a wrong type")
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else query
    tools, answers, raw = read_tools(item["tools"]), [], item.get("answers")
    if isinstance(raw, str):
        raw = decoded(raw, "answers")
    if not isinstance(raw, (list, type(None))):
        raise ValueError("'answers' is of a wrong type")
    for i, each in enumerate(raw or ()):            # SealTool says "tool" and "parameters"
        if not isinstance(each, dict):
            raise ValueError(f"answer {i}: not an object")
        call = Call(each.get("name", each.get("tool")),
                    each.get("arguments", each.get("parameters")))
        if isinstance(call.name, str) and isinstance(call.arguments, dict):
            answers.append(call)
        elif calls := parse_calls(as_json({"tool_calls": [each]})).calls:
            answers += calls
        else:
            raise ValueError(f"answer {i}: no name or no arguments")
    return Item(read_turns(turns), tools, None if raw is None else tuple(answers))


def of_messages(item: dict) -> Item:
    """{"messages", "tools"}: OpenAI's chat. The gold answer is the last that the assistant says
    behind the user's last turn: its calls, or none; without such a turn there is no gold."""
    turns, raw, left_out = item["messages"], item.get("tools", item.get("functions")), []
    if not isinstance(turns, list) or not all([isinstance(turn, dict) for turn in turns]):
        raise ValueError("the turns are no list of objects")
    if item.get("system"):
        turns = [{"role": "system", "content": item["system"]}, *turns]
    kept = []
    for turn in turns:
        said = turn.get("content") if turn.get("role") in ("system", "developer") else None
        listed = tools_listed(said) if isinstance(said, str) else None
        if listed is not None:
            raw = raw if raw is not None else listed[0]
            turn = {**turn, "content": listed[1]}
            if not listed[1]:
                left_out += ["of the system text, which lists the tools, ours is shown"] * listed[2]
                continue
        kept.append(turn)
    tools = read_tools(raw)
    names, answers, end = [tool["name"] for tool in tools], None, len(kept)
    if isinstance(item.get("answers"), list):
        answers = of_query({"query": "-", "tools": raw, "answers": item["answers"]}).answers
    for i in reversed(range(len(kept)) if answers is None else ()):
        role = ROLES.get(kept[i].get("role"))
        if role == "user":
            break
        if role == "assistant" and not answers:
            answers, end = tuple(said_in(kept[i], names)[1]), i
    if end < len(kept) - 1:
        left_out.append("turns behind the last call are left out")
    return Item(read_turns(kept[:end], names), tools, answers, left_out, (
        "id", "messages", "tools", "functions", "system", "answers"))


def of_conversations(item: dict) -> Item:
    """{"conversations", "tools"}: ShareGPT's turns {"from", "value"}, as Hermes and ToolACE have
    them; the tools may stand in the system text."""
    turns = item["conversations"]
    if not isinstance(turns, list) or not all([isinstance(turn, dict) for turn in turns]):
        raise ValueError("the turns are no list of objects")
    messages = [{"role": turn.get("from", turn.get("role")),
                 "content": turn.get("value", turn.get("content"))} for turn in turns]
    found = of_messages({**item, "messages": messages})
    found.reads += ("conversations",)
    return found


SHAPES = {("query", "tools"): of_query, ("messages",): of_messages,
          ("conversations",): of_conversations}


def of_none(item: object) -> Item:
    """What fits no shape: ValueError with the keys that are there and the shapes that are known."""
    there = ", ".join(list(map(str, item))[:12]) if isinstance(item, dict) else "none, no object"
    shapes = "; ".join([", ".join(keys) for keys in SHAPES])
    raise ValueError(f"no known shape; keys found: {there or 'none'}; keys of known shapes: {shapes} "
                     "(data/README.md; BFCL's is read in research)")


# --- Their parts ----------------------------------------------------------------------------------
def read_turns(turns: Sequence[dict], names: Sequence[str] = ()) -> tuple[dict, ...]:
    """The dialogue so far, in a chat template's roles. names: of the tools, for calls in words."""
    messages, text = [], ""
    for i, turn in enumerate(turns):
        role = ROLES.get(str(turn.get("role"))) if isinstance(turn, dict) else None
        content = turn.get("content") if role else None
        if role == "assistant" or isinstance(content, (list, dict)):
            content, calls = said_in(turn, names)
            content = "\n".join([*[content.strip()] * bool(content.strip()), call_text(calls)]) \
                if calls else content
        if role is None or not isinstance(content, str):
            raise ValueError(f"turn {i}: no role or no text")
        if turn is turns[-1]:       # API-Bank's way of asking is left out; our prompt has its own
            content = re.sub(r"\s*Generate API Request:\s*$", "", content)
        if role == "tool":          # earlier calls and their results, as in Qwen2.5's template
            is_tagged = content.lstrip().startswith("<tool_response>")
            content = content if is_tagged else f"<tool_response>\n{content}\n</tool_response>"
            role, content = "user", content.strip()
        if content.strip() or role != "assistant":
            messages.append({"role": role, "content": content})
            text += content if role != "system" else ""
    if not text.strip():
        raise ValueError("the query is empty")
    return tuple(messages)


def said_in(turn: dict, names: Sequence[str] = ()) -> tuple[object, Sequence[Call]]:
    """The text of a turn and the calls in it: OpenAI's `tool_calls`, Anthropic's parts, Hermes'
    tags, ToolACE's `[name(key=value)]`, API-Bank's fenced list."""
    text, raw = turn.get("content"), turn.get("tool_calls") or []
    if isinstance(turn.get("function_call"), dict):
        raw = [turn["function_call"]]
    if isinstance(text, dict):
        text = as_json(text)
    if isinstance(text, list):
        parts, text = text, []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "tool_use":
                raw = [*raw, {"name": part.get("name"), "arguments": part.get("input")}]
            elif kind == "tool_result":
                inner = said_in(part)[0]
                text.append(f"<tool_response>\n{inner}\n</tool_response>")
            elif isinstance(part, str) or isinstance(part.get("text"), str):
                text.append(part if isinstance(part, str) else part["text"])
            else:
                raise ValueError(f"a part of a turn is no text, but {kind!r:.40}")
        text = "\n".join(text)
    if raw:
        calls = parse_calls(as_json({"tool_calls": raw})).calls
        if not calls:
            raise ValueError("the calls of a turn cannot be read")
        return text or "", calls
    if not isinstance(text, str):
        return text, ()
    calls, before = (), ""
    if turn.get("role") == "function_call" or re.fullmatch(r"\s*```(json)?\s*\[.*]\s*```\s*", text,
                                                           re.S):
        calls = parse_calls(text).calls
    elif "<tool_call>" in text:
        calls, before = parse_calls(text).calls, text.partition("<tool_call>")[0]
    elif names and text.strip().startswith("["):
        calls = calls_in_words(text, names)
    return (before, calls) if calls else (text, ())


def calls_in_words(text: str, names: Sequence[str]) -> Sequence[Call]:
    """The calls of `[name(key=value, ...), ...]`, whatever characters the tools' names have."""
    known = "|".join([re.escape(name) for name in sorted(names, key=len, reverse=True)])
    string = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""

    def as_object(found: re.Match) -> str:
        if found["name"]:
            return f'{{"name": {as_json(found["name"])}, "arguments": {{'
        return "}}" if found[0] == ")" else f'"{found["key"]}": ' if found["key"] else found[0]

    each = rf"(?P<text>{string})|(?P<name>{known})\s*\(|\)|(?P<key>\w+)\s*=(?!=)"
    return parse_calls(re.sub(each, as_object, text.strip(), flags=re.S)).calls


def tools_listed(text: str) -> tuple[list, str, bool] | None:
    """The tools that a system text lists, in <tools> tags or as a JSON list; what of the text is to
    be shown without them; and whether more is left out. None if it lists none."""
    before, tag, rest = text.partition("<tools>")
    inner, closing, after = rest.partition("</tools>")
    if tag and closing and inner.strip():
        try:
            found = json.loads(inner)
        except ValueError:
            found = [decoded(line, "tools") for line in inner.splitlines() if line.strip()]
        return found if isinstance(found, list) else [found], (before + after).strip(), False
    for found in list(re.finditer(r"\[\s*\{", text))[:1]:
        try:
            tools, _ = json.JSONDecoder().raw_decode(text[found.start():])
        except ValueError:
            return None
        if all([isinstance(tool, dict) and "name" in tool.get("function", tool) for tool in tools]):
            return tools, "", True          # what is around it asks for another form of answer
    return None


def read_tools(raw: object) -> tuple[dict, ...]:
    """The tools on offer, bare or in OpenAI's {"function"}, with MCP's or Anthropic's name for the
    schema; a full JSON schema is flattened, its definitions are put in where they are named."""
    tools = {}
    if isinstance(raw, str):
        raw = decoded(raw, "tools")
    if not isinstance(raw, list):
        raise ValueError("'tools' is missing or of a wrong type")
    for i, each in enumerate(raw):
        if isinstance(each, dict) and isinstance(each.get("function"), dict):
            each = each["function"]
        name = each.get("name") if isinstance(each, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"tool {i}: no name")
        for key in ("parameters", "inputSchema", "input_schema"):
            parameters, required = each.get(key), each.get("required")
            if parameters is not None:
                break
        parameters = {} if parameters is None else parameters
        if isinstance(parameters, dict):
            if '"$ref"' in json.dumps(parameters):
                parameters = inlined(parameters, {**each, **parameters}, (), [10_000])
            kind, inner = parameters.get("type"), parameters.get("properties")
            is_schema = isinstance(kind, (str, list))
            if "type" not in parameters:
                is_schema = NOT_ARGUMENTS & parameters.keys() or isinstance(inner, dict) and all(
                    [isinstance(value, (dict, bool)) for value in inner.values()])
            if is_schema:       # a full JSON schema: flattened; what it does not mark is optional
                required, parameters = parameters.get("required", required or []), {}
                for argument, schema in (inner or {}).items():
                    parameters[argument] = {} if schema is True else schema
        description = each.get("description")       # not shown: "return", "desc_for_search", ...
        tool = {"name": name, "description": "" if description is None else description,
                "parameters": parameters}
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
        raise ValueError("the definitions of a tool's schema are too many, put in where named")
    if isinstance(schema, list):
        return [inlined(each, root, chain, left) for each in schema]
    ref = schema.get("$ref") if isinstance(schema, dict) else None
    if isinstance(ref, str) and ref not in chain:
        target = root
        for part in ref.removeprefix("#").strip("/").split("/") if ref != "#" else ():
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or part not in target:
                raise ValueError(f"there is no definition {ref!r:.60}")
            target = target[part]
        if not isinstance(target, dict):
            raise ValueError(f"there is no definition {ref!r:.60}")
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        return inlined({**target, **rest}, root, (*chain, ref), left)
    if not isinstance(schema, dict):
        return schema
    return {key: value if key in ("$defs", "definitions") and schema is root
            else inlined(value, root, chain, left) for key, value in schema.items()}


def decoded(text: str, what: str) -> object:
    """The JSON that is written as a text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what!r} is a text that is no JSON") from None


KINDS = {b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"PK\x03\x04": "zip", b"BZh": "bzip2",
         b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"ARROW1": "Arrow", b"SQLite": "SQLite",
         b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text", b"<": "HTML or XML",
         b"version https://git-lfs": "a pointer of Git LFS, not the file itself"}


def json_lines(content: bytes, where: str, error: Exception, mend: str) -> list:
    """The items of a file that as a whole is no JSON, because of `error`: of JSON Lines; else
    ValueError says what it is."""
    kind = next((kind for start, kind in KINDS.items() if content.startswith(start)), "")
    if kind:
        raise ValueError(f"{where}is {kind}; read are JSON and JSON Lines in UTF-8{mend}")
    items, lines = [], content.split(b"\n")
    first = next(filter(bytes.strip, lines), b"").strip()
    for number, line in enumerate(lines, 1):
        try:
            if first[:1] == b"{" and line.strip():
                items.append(json.loads(line.decode("utf-8-sig")))
                json.dumps(items[-1], ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as fault:
            error = f"line {number}: {fault}" if items else error
            items = []
            break
    if not items:
        raise ValueError(f"{where}cannot be read and written as JSON ({error}){mend}")
    return items
