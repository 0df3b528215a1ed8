"""A tool call: reading it from a model's text, checking it against a tool's schema, comparing two of them.

Text from a model is data: it is parsed as JSON (or as a Python call through `ast`), never evaluated.
"""
import ast
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

MAX_CHARS = 1 << 14     # the longest gold answer has some 300 characters; a longer text than this is no answer
MAX_DEPTH = 32          # of brackets: real arguments have 3, and json would recurse too deep at about 1,000
MAX_CODE = 500          # characters outside quotes in Python notation: bounds the tree that `ast` builds


@dataclass(frozen=True)
class Call:
    """One call of a tool: its name and its arguments, as JSON values."""
    name: str
    arguments: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Parsed:
    """The calls in a text. `strict`: the text is the form asked for and nothing else; `recovery`: what was forgiven."""
    calls: tuple[Call, ...]
    strict: bool
    recovery: str       # "" if strict, "unparsable" if there are no calls, else the first thing forgiven, by name


# --- Reading: text -> calls ------------------------------------------------------------------------------------------

_OPENING = re.compile(r"[{\[]")
_STRING = re.compile(r'''"(?:[^"\\]|\\.)*(?:"|\\?\Z)|'(?:[^'\\]|\\.)*(?:'|\\?\Z)''', re.S)  # unclosed too: linear time
_TOKEN = re.compile(_STRING.pattern + r"|[][{}()]", re.S)
_BETWEEN = re.compile(r"</tool_call>\s*<tool_call>")
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,4})?"       # JSON's: "007" is a text
_CODE = re.compile(rf"(?:[\s,:=\[\]{{}}()]|[^\W\d]\w*(?=\s*[=(])|(?:True|False|None|{_NUMBER})(?!\w)|\$(?!\$))*")


def _spans(text: str) -> list[tuple[int, int]]:
    """Where the outermost {...} and [...] lie, found in one pass; none at all if one never closes or is too deep."""
    spans, end = [], 0
    while opening := _OPENING.search(text, end):
        depth = 0
        for token in _TOKEN.finditer(text, opening.start()):    # quotes count in brackets only: outside, 5" is prose
            depth += (token[0] in "{[(") - (token[0] in "}])")
            if depth == 0 or depth > MAX_DEPTH:
                break
        if depth != 0:
            return []
        end = token.end()
        spans.append((opening.start(), end))
    return spans


def _syntax(code: str) -> list[ast.stmt]:
    """Python notation as statements; raises SyntaxError or ValueError. Long chains of operators can crash Python's
    parser, so it sees only words, numbers, brackets and quoted text, few and shallow (and no backslash)."""
    bare = _STRING.sub("$", code)
    if "\\" in code or len(bare) > MAX_CODE or not _CODE.fullmatch(bare) or not _spans(f"[{bare}]"):
        raise ValueError("not a plain literal or call")
    return ast.parse(code).body


def _plain(value: object) -> object:
    """`value` as JSON gives it back; raises TypeError or ValueError for what JSON or UTF-8 cannot hold (a set, NaN, a
    lone surrogate), since such a call could not be stored or shown to a model again."""
    return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode().decode())


def _read(text: str) -> tuple[object, str]:
    """The list or object that a text is, and how: "" for JSON, "python notation" for {'a': True}; None if neither."""
    text = text.strip()
    if _spans(text) == [(0, len(text))]:
        for how, load in (("", json.loads), ("python notation", lambda code: ast.literal_eval(_syntax(code)[0].value))):
            try:
                return _plain(load(text)), how
            except (SyntaxError, TypeError, ValueError):
                continue
    return None, ""


def _as_call(value: object) -> tuple[Call, str]:
    """The call that an object holds, and what was forgiven ("" if nothing); ValueError if it holds none."""
    if not isinstance(value, dict):
        raise ValueError("not an object")
    forgiven = "" if value.keys() == {"name", "arguments"} else "other keys"
    if isinstance(value.get("function"), dict):         # OpenAI's {"type": "function", "function": {...}}
        value = value["function"]
    name = next((value[key] for key in ("name", "tool", "function") if key in value), None)
    arguments = next((value[key] for key in ("arguments", "parameters", "args") if key in value), {})
    if isinstance(arguments, str):
        arguments, forgiven = _read(arguments)[0], forgiven or "arguments as text"
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        raise ValueError("not a call")
    return Call(name, arguments), forgiven


def _container(text: str, spans: list[tuple[int, int]]) -> str:
    """What stands around the values, as the name of a recovery; "" for closed <tool_call> blocks and nothing else."""
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    first, *between, last = (text[start:end].strip() for start, end in zip(edges[::2], edges[1::2]))
    if (first, last) == ("<tool_call>", "</tool_call>") and all(map(_BETWEEN.fullmatch, between)):
        return ""
    outside = " ".join([first, *between, last])
    if "```" in outside:
        return "fenced code"
    if outside.rfind("<tool_call>") > outside.rfind("</tool_call>"):
        return "unclosed block"
    if outside.strip(" ,;"):
        return "surrounding text"
    return "several objects" if between else "bare list" if text.startswith("[") else "bare object"


def _json_calls(text: str) -> tuple[list[Call], str]:
    """The calls of a text, and what was forgiven; ValueError if any of its outermost objects and lists is no call."""
    spans = _spans(text)
    forgiven = [_container(text, spans)] if spans else []
    calls = []
    for start, end in spans:
        value, how = _read(text[start:end])
        items = value if isinstance(value, list) else [value]
        forgiven += [how, "list" if items is value else ""]
        for call, what in map(_as_call, items):
            calls.append(call)
            forgiven.append(what)
    return calls, next(filter(None, forgiven), "")


def _python_calls(text: str) -> tuple[list[Call], str]:
    """Calls like `name(a=1, b="x")`, one or several; SyntaxError, TypeError or ValueError if there is anything else."""
    calls = []
    lines = re.sub(r"</?tool_call>|```\w*", "\n", text).split("\n")
    for statement in _syntax("\n".join(line.strip() for line in lines)):
        value = statement.value if isinstance(statement, ast.Expr) else None
        for node in value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]:
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or node.args:
                raise ValueError("not a call with keyword arguments")
            calls.append(Call(node.func.id, _plain({k.arg: ast.literal_eval(k.value) for k in node.keywords})))
    return calls, "python notation"


def parse_calls(text: str) -> Parsed:
    """The calls in a model's answer, for any text whatever: it never raises, and takes time linear in the length.

    Strict is one or more `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>` and nothing else. Recoveries:
    "fenced code", "unclosed block", "surrounding text", "several objects", "bare list", "bare object", "list" (in a
    block), "other keys", "arguments as text", "python notation".

    `parse_calls('f(a=1)') -> Parsed((Call("f", {"a": 1}),), False, "python notation")`
    """
    # ours: half an answer is no answer. Where one object or block cannot be read, the whole text is unparsable.
    text = text.strip()
    for read in (_json_calls, _python_calls) if len(text) <= MAX_CHARS else ():
        try:
            calls, recovery = read(text)
        except (SyntaxError, TypeError, ValueError):
            continue
        if calls:
            return Parsed(tuple(calls), not recovery, recovery)
    return Parsed((), False, "unparsable")


# --- Checking: call -> what is wrong with it -------------------------------------------------------------------------

_KINDS = {"string": "string", "str": "string", "integer": "number", "int": "number", "number": "number",
          "float": "number", "boolean": "boolean", "bool": "boolean", "array": "array", "list": "array",
          "object": "object", "dict": "object"}


def _type(schema: dict) -> str:
    """The first word of a declared type: "list" for `list(str)`, "none" if it is missing."""
    return re.split(r"\W", str(schema.get("type")).lower(), maxsplit=1)[0]


def _kind(schema: dict) -> str:
    """The JSON kind of a declared type; "" if it is missing or not understood (`Union[...]`), which any value fits."""
    return _KINDS.get(_type(schema), "")


def _find(tools: Sequence[dict], name: str) -> dict | None:
    return next((tool for tool in tools if tool["name"] == name), None)


def _marked(tool: dict) -> frozenset[str] | None:
    """The parameters marked as required, each for itself or in a list beside; None if the tool marks nothing at all."""
    parameters = tool.get("parameters") or {}
    if "required" not in tool and not any("required" in p for p in parameters.values()):
        return None
    listed = tool.get("required") or ()
    return frozenset(n for n, p in parameters.items() if p.get("required") is True or n in listed)


def required_arguments(tool: dict) -> frozenset[str]:
    """The names of the arguments that a call of the tool must give."""
    marked = _marked(tool)
    if marked is not None:
        return marked
    # ours: a tool that marks nothing requires each parameter without a default. API-Bank's tools mark nothing, and of
    # 258 gold calls of theirs 248 give every parameter (561 of 575 values).
    return frozenset(name for name, p in (tool.get("parameters") or {}).items() if "default" not in p)


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _fits(value: object, schema: dict) -> bool:
    """Whether a value is of the declared type, or a text that reads as one ("5" for an integer)."""
    kind = _kind(schema)
    if kind in ("", "string"):
        return kind == "" or isinstance(value, str)
    found, content = value_key(value, schema)
    return found == kind and (_type(schema) not in ("int", "integer") or content == content.to_integral_value())


def check_call(call: Call, tools: Sequence[dict]) -> str:
    """What is wrong with a call by its tool's schema: "unknown tool", "missing argument: x", "unknown argument: x" or
    "wrong type: x"; "" if nothing. For an optional argument "" and null mean absent, and are right."""
    tool = _find(tools, call.name)
    if tool is None:
        return "unknown tool"
    parameters, required = tool.get("parameters") or {}, required_arguments(tool)
    for name in parameters:
        if name in required and name not in call.arguments:
            return f"missing argument: {name}"
    for name, value in call.arguments.items():
        if name not in parameters:
            return f"unknown argument: {name:.40}"
        if not (_is_empty(value) and name not in required) and not _fits(value, parameters[name]):
            return f"wrong type: {name}"
    return ""


# --- Comparing: two calls are equal if and only if their keys are ----------------------------------------------------

def value_key(value: object, schema: dict, depth: int = 0) -> tuple[str, Hashable]:
    """What a value means under its schema: ("number", Decimal("5")) for 5, 5.0 and, unless a string is declared, "5".

    Where a string is declared, a number or boolean is read as its JSON text. Where the type is unknown, as it is inside
    a list or object, a text that is a number or boolean is read as one. Booleans are never numbers.
    """
    kind = _kind(schema)
    if isinstance(value, str):
        text = unicodedata.normalize("NFC", value).strip()
        written = _read(text)[0] if kind in ("array", "object") else None
        if isinstance(written, {"array": list, "object": dict}.get(kind, ())):
            value = written
        elif kind in ("number", "") and re.fullmatch(_NUMBER, text):
            return "number", Decimal(text)
        elif kind in ("boolean", "") and text.lower() in ("true", "false"):
            return "boolean", text.lower() == "true"
        else:
            return "string", text
    if isinstance(value, bool):
        return ("string", str(value).lower()) if kind == "string" else ("boolean", value)
    if isinstance(value, float) and not math.isfinite(value):
        return "string", str(value)             # as a number, NaN would not equal itself
    if isinstance(value, (int, float)):
        number = Decimal(repr(value) if isinstance(value, float) else value)
        return ("string", f"{number:f}".removesuffix(".0")) if kind == "string" else ("number", number)
    if value is None or depth == MAX_DEPTH:     # what lies deeper was not read from a text, and is not looked at
        return "null", None
    if isinstance(value, dict):
        return "object", frozenset((name, value_key(v, {}, depth + 1)) for name, v in value.items())
    return "array", tuple(value_key(v, {}, depth + 1) for v in value)


def call_key(call: Call, tools: Sequence[dict]) -> tuple[str, frozenset]:
    """What a call means: its name and the set of (argument, value key), less the absent ones, with declared defaults.

    "" and null mean absent for an argument that the tool has and does not mark as required. Arguments and tools that
    no schema describes have values of unknown type.
    """
    tool = _find(tools, call.name) or {}
    parameters, required = tool.get("parameters") or {}, _marked(tool) or frozenset()
    defaults = {name: p["default"] for name, p in parameters.items() if not _is_empty(p.get("default"))}
    given = {name: value for name, value in call.arguments.items()
             if not _is_empty(value) or name in required or name not in parameters}
    return call.name, frozenset((name, value_key(value, parameters.get(name, {})))
                                for name, value in (defaults | given).items())


def calls_key(calls: Sequence[Call], tools: Sequence[dict]) -> Hashable:
    """What an answer means: the multiset of its calls. Equal answers have equal keys, so a vote counts these."""
    return frozenset(Counter(call_key(call, tools) for call in calls).items())


def equal_values(a: object, b: object, schema: dict) -> bool:
    """Whether two values of a parameter are the same: `equal_values("5", 5.0, {"type": "integer"}) -> True`."""
    return value_key(a, schema) == value_key(b, schema)


def equal_calls(a: Sequence[Call], b: Sequence[Call], tools: Sequence[dict]) -> bool:
    """Whether two answers are the same calls, one to one and in any order."""
    return calls_key(a, tools) == calls_key(b, tools)
