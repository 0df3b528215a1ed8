"""A tool call: written, read from a model's text, checked against a tool's schema, compared.
The text is data: it is parsed as JSON, or as a Python literal through `ast`, never evaluated."""
import ast
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from functools import partial

MAX_CHARS = 1 << 14     # the longest gold answer has some 300 characters; longer than this is none
MAX_DEPTH = 32          # of brackets: real arguments have 3, and json recurses too deep at 1,000
MAX_CODE = 500          # characters outside quotes in a Python literal: bounds what `ast` builds


@dataclass(frozen=True)
class Call:
    """One call of a tool: its name and its arguments, as JSON values."""
    name: str
    arguments: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Parsed:
    """The calls in a text, and how far the text is from the form asked for."""
    calls: tuple[Call, ...]
    recovery: str       # "" if it is just that, "unparsable" if no answer, else what was forgiven


# --- Writing: calls -> text -----------------------------------------------------------------------
as_json = partial(json.dumps, ensure_ascii=False)


def call_text(calls: Sequence[Call], like: str = "") -> str:
    """The answer in the form asked for, which is also Qwen2.5's own for past calls; without its
    tags where the answer `like` names a tool without them."""
    form = "<tool_call>\n{}\n</tool_call>" if "<tool_call>" in call_start(like) else "{}"
    return "\n".join([form.format(as_json(asdict(call))) for call in calls])


# --- Reading: text -> calls -----------------------------------------------------------------------
# A quoted text. One that never closes goes on to the end, so that each search takes linear time.
_STRING = re.compile(r"""'(?:[^'\\]|\\.)*(?:'|\\?\Z)|"(?:[^"\\]|\\.)*(?:"|\\?\Z)""", re.S)
_TOKEN = re.compile(_STRING.pattern + r"|[][{}]", re.S)
_OPENING = re.compile(r"[{\[]")
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,4})?"   # JSON's: "007" is a text
_LITERAL = re.compile(rf"(?:[\s,:\[\]{{}}]|\$(?!\$)|(?:True|False|None|{_NUMBER})(?!\w))*")
_KEYS = {"name": "name", "tool": "name", "function": "name",
         "arguments": "arguments", "parameters": "arguments", "args": "arguments"}


def parse_calls(text: str) -> Parsed:
    """The calls in a model's answer. It never raises, and takes time linear in the text's length.

    Asked for is `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`, any number of
    times. "other form" is the same with prose, fences, a list, other keys, single quotes, ...
    "" and "[]" say that no call is needed. Any other text without calls is never right."""
    text = text.strip()
    if re.fullmatch(r"(\[\s*\])?", text):
        return Parsed((), "other form" if text else "")
    # ours: half an answer is no answer. If one object or block cannot be read, none is.
    for read in (_json_calls, _block_calls) if len(text) <= MAX_CHARS else ():
        try:
            calls, recovery = read(text)
        except ValueError:
            continue
        if calls:
            return Parsed(tuple(calls), recovery)
    return Parsed((), "unparsable")


def _json_calls(text: str) -> tuple[list[Call], str]:
    """The calls of a text; ValueError if any of its objects and lists is none."""
    values, around = _outermost(text)
    calls, asked_form = [], re.fullmatch(r"(<tool_call>\s*\{\s*</tool_call>\s*)+", around)
    for value, is_json in map(_read, values):
        new = []
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict):
                raise ValueError("not an object")
            if isinstance(item.get("function"), dict) and item.keys() <= {"id", "type", "function"}:
                item = item["function"]             # OpenAI's {"type": "function", "function": {}}
            keys = item.keys() - {"id", "type"}
            parts = {_KEYS.get(key): item[key] for key in keys}
            name, arguments = parts.get("name"), parts.get("arguments")
            if isinstance(arguments, str):
                arguments = _read(arguments.strip())[0]
            if len(keys) != 2 or not (name and isinstance(name, str)
                                      and isinstance(arguments, dict)):
                raise ValueError("not a name and arguments")
            new.append(Call(name, arguments))
        asked_form = asked_form and is_json and [asdict(call) for call in new] == [value]
        calls += new
    return calls, "" if asked_form else "other form"


def _block_calls(text: str) -> tuple[list[Call], str]:
    """The calls in closed blocks, whatever brackets the prose has; ValueError for half a call."""
    prose, *parts = text.split("<tool_call>")
    found = []
    for part in parts:
        body, closing, after = part.partition("</tool_call>")
        found.append(parse_calls(body).calls if closing else ())
        prose += after
    if not all(found) or re.search(rf"""\{{\s*['"]({"|".join(_KEYS)})['"]""", prose):
        raise ValueError("a block without a call, or a call outside the blocks")
    return [call for calls in found for call in calls], "other form"


def _outermost(text: str) -> tuple[list[str], str]:
    """The outermost {...} and [...] of a text, and the text around them with "{" in place of each;
    empty if a bracket never closes."""
    values, around, end = [], "", 0
    while opening := _OPENING.search(text, end):
        start, depth = opening.start(), 0
        for token in _TOKEN.finditer(text, start):   # outside brackets, 5" is prose
            depth += (token[0] in "{[") - (token[0] in "}]")
            if depth == 0 or depth > MAX_DEPTH:
                break
        if depth != 0:
            return [], ""
        around += text[end:start] + "{"
        end = token.end()
        values.append(text[start:end])
    return values, around + text[end:]


def _read(text: str) -> tuple[object, bool]:
    """The list or object that a text is, None if it is neither; and whether it is JSON."""
    if _outermost(text)[1] != "{":
        return None, False
    for is_json in (True, False):
        try:
            value = json.loads(text) if is_json else _literal(text)
            # as JSON gives it back; this raises for what no file can hold, as NaN or a set
            written = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            return json.loads(written), is_json
        except (SyntaxError, TypeError, ValueError):
            continue
    return None, False


def _literal(text: str) -> object:
    """A list or object in Python's notation, as `['a', None]`; ValueError for anything else."""
    bare = _STRING.sub("$", text)       # without operators: long chains crash Python's parser
    if "\\" in text or len(bare) > MAX_CODE or not _LITERAL.fullmatch(bare):
        raise ValueError("not a plain literal")
    return ast.literal_eval(text)


CALL_START = '<tool_call>\n{"name": "'       # how an answer begins, up to where candidates part
# The key must be the call's own: in `f(user={"name": ...})` it is an argument's.
_NAMED = re.compile(r'((?!"(?:arguments|parameters|args)")[^(])*?"(?:name|tool|function)"\s*:\s*"')


def call_start(text: str) -> str:
    """An answer up to where it names its tool; CALL_START where it names none."""
    # paper: log P(a_n | x).
    # ours: after the model's own first words. A model that never writes <tool_call> is not asked
    # what it would say behind one.
    named = _NAMED.match(text)
    return named[0] if named else CALL_START


# --- Checking: call -> what is wrong with it ------------------------------------------------------
def check_call(call: Call, tools: Sequence[dict]) -> str:
    """What is wrong with a call by its tool's schema: "unknown tool", "missing argument: x",
    "unknown argument: x" or "wrong type: x"; "" if nothing is."""
    tool = next((tool for tool in tools if tool["name"] == call.name), None)
    if tool is None:
        return "unknown tool"
    parameters, required, given = tool["parameters"], required_arguments(tool), _given(call, tool)
    for name in parameters:
        if name in required and name not in given:
            return f"missing argument: {name}"
    for name, value in given.items():
        if name not in parameters:
            return f"unknown argument: {name:.40}"
        kind = kind_of(parameters[name])
        found, content = value_key(value, parameters[name])
        if found == "number" and kind == "integer" and content == content.to_integral_value():
            found = "integer"
        if kind not in ("", found) and value is not None:   # gold calls of NexusRaven give null
            return f"wrong type: {name}"
    return ""


def required_arguments(tool: dict) -> frozenset[str]:
    """The names of the arguments that a call of the tool must give."""
    if (marked := marked_arguments(tool)) is not None:
        return marked
    # ours: a tool that marks nothing requires each parameter that has no default and is not said to
    # be "[Optional]". API-Bank's tools mark nothing; 248 of their 258 gold calls give every one.
    return frozenset(name for name, schema in tool["parameters"].items() if "default" not in schema
                     and not str(schema.get("description")).startswith("[Optional]"))


def marked_arguments(tool: dict) -> frozenset[str] | None:
    """The arguments marked as required, each or in a list beside; None if the tool has no marks."""
    listed, has_marks, marked = tool.get("required", ()), "required" in tool, []
    for name, schema in tool.get("parameters", {}).items():
        has_marks = has_marks or "required" in schema
        if name in listed or schema.get("required") is True:
            marked.append(name)
    return frozenset(marked) if has_marks else None


_KINDS = {"string": "string", "str": "string", "integer": "integer", "int": "integer",
          "number": "number", "float": "number", "boolean": "boolean", "bool": "boolean",
          "array": "array", "list": "array", "object": "object", "dict": "object"}


def kind_of(schema: dict) -> str:
    """The kind of a declared type: "array" for `list(str)`, "" if none is understood (any fits)."""
    return _KINDS.get(re.split(r"\W", str(schema.get("type")).lower(), maxsplit=1)[0], "")


# --- Comparing: two calls are equal if and only if their keys are ---------------------------------
def call_keys(calls: Sequence[Call], tools: Sequence[dict]) -> Counter:
    """What an answer means: how often it has each call, as the name and the set of (argument, value
    key), with declared defaults."""
    by_name, keys = {tool["name"]: tool for tool in tools}, Counter()
    for call in calls:
        tool, values = by_name.get(call.name, {}), {}
        parameters = tool.get("parameters", {})
        for name, schema in parameters.items():
            if schema.get("default") not in (None, ""):
                values[name] = schema["default"]
        values |= _given(call, tool)
        pairs = [(name, value_key(value, parameters.get(name, {})))
                 for name, value in values.items()]
        keys[call.name, frozenset(pairs)] += 1
    return keys


def _given(call: Call, tool: dict) -> dict:
    """The arguments that a call gives; if not marked as required, "" and null mean absent."""
    optional = tool.get("parameters", {}).keys() - (marked_arguments(tool) or ())
    return {name: value for name, value in call.arguments.items()
            if name not in optional or value_key(value, {})[1] not in (None, "")}


def value_key(value: object, schema: dict, depth: int = 0) -> tuple[str, Hashable]:
    """What a value means under its schema, as (kind, content): ("number", Decimal("5")) for 5, 5.0
    and "5". Where a string is declared, numbers and booleans are their JSON text. Booleans are
    never numbers."""
    kind = kind_of(schema)
    if isinstance(value, str):                  # read as what is declared, or what it looks like
        value = unicodedata.normalize("NFC", value).strip()
        nested = _read(value)[0] if kind in ("array", "object") else None
        if kind in ("integer", "number", "") and re.fullmatch(_NUMBER, value):
            value = Decimal(value)
        elif kind in ("boolean", "") and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        elif isinstance(nested, list if kind == "array" else dict):
            value = nested
    if isinstance(value, float):                # as a number, NaN would not equal itself
        value = Decimal(repr(value)) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        found, content = "string", value
    elif isinstance(value, bool):
        found, content = "boolean", value
    elif isinstance(value, (int, Decimal)):
        found, content = "number", Decimal(value)
    elif value is None or depth == MAX_DEPTH:   # deeper was not read from a text; not looked at
        found, content = "null", None
    elif isinstance(value, dict):
        found = "object"
        content = frozenset([(k, value_key(v, {}, depth + 1)) for k, v in value.items()])
    else:
        written = re.fullmatch(r"(?:list|array)\W(.*)\W", str(schema.get("type")).lower())
        items = schema.get("items", {"type": written[1]} if written else {})
        items = items if isinstance(items, dict) else {}    # in "items" or in a type `list(str)`
        found, content = "array", tuple([value_key(item, items, depth + 1) for item in value])
    if kind == "string" and found == "boolean":
        found, content = "string", str(content).lower()
    if kind == "string" and found == "number":
        found, content = "string", f"{content:f}".removesuffix(".0")
    return found, content
