"""A tool call: written, read from a model's text, checked against a tool's schema, compared.
The text is data: it is read as JSON, or as what is near to it, and never evaluated."""
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
# What may differ from JSON: a text; a word, as a key too; a comma before the end.
_PIECE = re.compile(rf"({_STRING.pattern})|(?<!\w)({_NUMBER}|[Tt]rue|[Ff]alse|None|null)(?!\w)"
                    r"(\s*:)?|(?<![\[{,\s])\s*,(?=\s*[\]}])", re.S)
_ESCAPE = re.compile(r"""\\(?:u[0-9a-fA-F]{4}|["'\\/bfnrt])|(\\.)|\"""", re.S)    # [1]: not JSON's
_NO_CALL = re.compile(r"""(\[\s*\]|```\w*\s*\[\s*\]\s*```|\{\s*"tool_calls"\s*:\s*\[\s*\]\s*\})?""")
_THINK = re.compile(r"<(/?)think(?:ing)?>|[{\[]", re.I)
_KEYS = {"name": "name", "tool": "name", "function": "name",
         "arguments": "arguments", "parameters": "arguments", "args": "arguments"}


def parse_calls(text: str) -> Parsed:
    """The calls in a model's answer. It never raises, and takes time linear in the text's length.

    Asked for is `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`, any number of
    times. "other form" is the same with prose, fences, a list, other keys, single quotes, ...
    "" and "[]" say that no call is needed. Any other text without calls is never right."""
    whole = text.strip()
    text = without_thinking(whole).strip() if "think" in whole.lower() else whole
    if _NO_CALL.fullmatch(text):
        return Parsed((), "other form" if whole else "")
    # ours: half an answer is no answer. If one object or block cannot be read, none is.
    for read in (_json_calls, _block_calls) if len(text) <= MAX_CHARS else ():
        try:
            calls, recovery = read(text)
        except ValueError:
            continue
        if calls:
            return Parsed(tuple(calls), recovery if text == whole else "other form")
    return Parsed((), "unparsable")


def without_thinking(text: str) -> str:
    """A text without what stands between <think> and </think>, or before a </think> that nothing
    opens. Of a block that never closes the tag is left. In a bracket's strings a tag is text."""
    kept, start, at, unclosed = [], 0, 0, 0
    while found := _THINK.search(text, at):
        at = found.end()
        if found[1] is None:
            value = _outermost(text, found.start(), 1)[0] if unclosed < 8 else []
            unclosed += not value                   # each takes time linear in what follows
            at = found.start() + len(value[0]) if value else at
        elif found[1]:
            kept, start = [], at
        else:
            kept.append(text[start:found.start()])
            closing = re.compile("</think(?:ing)?>", re.I).search(text, at)
            start = at = closing.end() if closing else len(text)
            kept += [] if closing else [found[0]]
    return "".join([*kept, text[start:]])


def _json_calls(text: str) -> tuple[list[Call], str]:
    """The calls of a text; ValueError if any of its objects and lists is none."""
    values, around = _outermost(text)
    calls, asked_form = [], re.fullmatch(r"(<tool_call>\s*\{\s*</tool_call>\s*)+", around)
    for before, (value, is_json) in zip(around.split("{"), map(_read, values)):
        new, items = [], value if isinstance(value, list) else [value]
        is_named = before.rstrip().endswith("<tool_call>")      # then a name alone is a call
        if isinstance(value, dict) and isinstance(value.get("tool_calls"), list) \
                and not _KEYS.keys() & value.keys():            # OpenAI's whole answer
            items, is_named = value["tool_calls"], True
        for item in items:
            if not isinstance(item, dict):
                raise ValueError("not an object")
            if isinstance(item.get("function"), dict) \
                    and item.keys() <= {"id", "type", "index", "function"}:
                item = item["function"]             # OpenAI's {"type": "function", "function": {}}
            keys = item.keys() - {"id", "type"}
            parts = {_KEYS.get(key): item[key] for key in keys}
            name, arguments = parts.get("name"), parts.get("arguments")
            if is_named and parts.keys() <= {"name", "arguments"} and arguments in (None, ""):
                arguments, keys = {}, ["name", "arguments"][:len(keys) + 1]
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
    calls, prose, end = [], [], 0
    while (start := text.find("<tool_call>", end)) >= 0:
        prose.append(text[end:start])
        opening = _OPENING.search(text, start)
        value = _outermost(text, opening.start(), 1)[0] if opening else []
        stop = opening.start() + len(value[0]) if value else start
        end = text.find("</tool_call>", stop)       # behind the value: inside it, a tag is text
        between = text[start + 1:opening.start()] + text[stop:end] if value else ""
        new = _json_calls(text[start:end])[0] if value and end >= 0 else []
        if not new or "tool_call>" in between.removeprefix("tool_call>"):
            raise ValueError("a block without a call")
        calls += new
        end += len("</tool_call>")
    prose.append(text[end:])
    if re.search(rf"""\{{\s*['"]({"|".join(_KEYS)})['"]""", "".join(prose)):
        raise ValueError("a call outside the blocks")
    return calls, "other form"


def _outermost(text: str, end: int = 0, most: int = -1) -> tuple[list[str], str]:
    """The outermost {...} and [...] of a text from a place on, at most so many, and the text around
    them with "{" in place of each; empty if a bracket never closes."""
    values, around = [], ""
    while len(values) != most and (opening := _OPENING.search(text, end)):
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
    """The list or object that a text is, None if it is neither; and whether it is JSON, or what is
    near to it: Python's notation, or a mixture of both, with raw line ends in a text."""
    if _outermost(text)[1] != "{":
        return None, False
    for is_json in (True, False):
        try:
            value = json.loads(text if is_json else _PIECE.sub(_as_in_json, text), strict=is_json)
            as_json(value, allow_nan=False).encode()    # raises for what no file can hold, as NaN
            return value, is_json
        except ValueError:
            continue
    return None, False


def _as_in_json(piece: re.Match) -> str:
    """What JSON has in place of a piece of Python's notation. ValueError for a text of neither."""
    word, inner = piece[2], piece[0][1:-1]
    if piece[1]:
        odd = "\0" in inner or any([escape[1] for escape in _ESCAPE.finditer(inner)])
        if odd and piece[0][0] == "'":
            raise ValueError("no text of Python's")
        return f'"{_ESCAPE.sub(_escape, inner)}"'
    if not word:
        return ""                                       # a comma before the end
    word = {"True": "true", "False": "false", "None": "null"}.get(word, word)
    return f'"{word}":' if piece[3] else word           # a key is a text


def _escape(found: re.Match) -> str:
    """An escape as JSON writes it: a backslash that JSON does not know is one."""
    if found[0] in ('"', "\\'"):
        return '\\"' if found[0] == '"' else "'"
    return "\\" + found[0] if found[1] else found[0]


CALL_START = '<tool_call>\n{"name": "'       # how an answer begins, up to where candidates part
# The key must be the call's own: in `f(user={"name": ...})` it is an argument's.
_NAMED = re.compile(r'((?!"(?:arguments|parameters|args)")[^(])*?"(?:name|tool|function)"\s*:\s*"')


def call_start(text: str) -> str:
    """An answer up to where it names its tool; CALL_START where it names none."""
    # paper: log P(a_n | x).
    # ours: after the model's own first words. A model that never writes <tool_call> is not asked
    # what it would say behind one.
    if "think" in text.lower():
        text = without_thinking(text).lstrip()
    named = _NAMED.match(text)
    return named[0] if named else CALL_START


# --- Checking: call -> what is wrong with it ------------------------------------------------------
def check_call(call: Call, tools: Sequence[dict]) -> str:
    """What is wrong with a call by its tool's schema: "unknown tool", "missing argument: x",
    "unknown argument: x", or what `misfit` says, as "wrong type: x"; "" if nothing is."""
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
        if problem := misfit(value, parameters[name]):
            return f"{problem}: {name}"
    return ""


def misfit(value: object, schema: dict, depth: int = 0) -> str:
    """What is wrong with a value by its schema, at any depth: "wrong type", "not in the enum",
    "missing inside"; "" if nothing is."""
    kind, schema, _ = type_of(schema)
    key = found, content = value_key(value, schema)
    if value is None or depth == MAX_DEPTH:             # gold calls of NexusRaven give null
        return ""
    if found == "number" and kind == "integer" and content == content.to_integral_value():
        found = "integer"
    if kind not in ("", found) or kind == "string" and isinstance(value, (list, dict)):
        return "wrong type"
    enum, parts = schema.get("enum"), []
    if isinstance(enum, list) and key not in [value_key(each, schema) for each in enum]:
        return "not in the enum"
    if kind in ("array", "object") and isinstance(value, str):
        value = _read(value.strip())[0]
    if kind == "array" and items_of(schema):
        parts = [(item, items_of(schema)) for item in value]
    elif kind == "object" and isinstance(schema.get("properties"), dict):
        required = schema.get("required")
        for name, inner in schema["properties"].items():
            is_required = isinstance(required, list) and name in required and not type_of(inner)[2]
            if is_required and name not in value:
                return "missing inside"
            parts += [(value[name], inner)] if name in value else []
    return next(filter(None, [misfit(*part, depth + 1) for part in parts]), "")


def required_arguments(tool: dict) -> frozenset[str]:
    """The names of the arguments that a call of the tool must give."""
    if (marked := marked_arguments(tool)) is not None:
        return marked
    # ours: a tool that marks nothing requires each parameter that has no default and is not said to
    # be "[Optional]". API-Bank's tools mark nothing; 248 of their 258 gold calls give every one.
    return frozenset(name for name, schema in tool["parameters"].items() if "default" not in schema
                     and not str(schema.get("description")).startswith("[Optional]")
                     and not type_of(schema)[2])


def marked_arguments(tool: dict) -> frozenset[str] | None:
    """The arguments marked as required, each or in a list beside; None if the tool has no marks.
    What may be null may be left out."""
    listed, has_marks, marked = tool.get("required", ()), "required" in tool, []
    for name, schema in tool.get("parameters", {}).items():
        mark = schema.get("required")                   # an object's own list says nothing of it
        has_marks = has_marks or mark is not None and not isinstance(mark, list)
        if (name in listed or mark in (True, "true")) and not type_of(schema)[2]:
            marked.append(name)
    return frozenset(marked) if has_marks else None


_KINDS = {"string": "string", "str": "string", "integer": "integer", "int": "integer",
          "number": "number", "float": "number", "boolean": "boolean", "bool": "boolean",
          "array": "array", "list": "array", "object": "object", "dict": "object"}


def type_of(schema: object) -> tuple[str, dict, bool]:
    """A declared type: its kind, as "array" for `list(str)`, "" if none is understood (any fits);
    the schema, of several branches the one that is not null; and whether it may be null, as in
    {"type": ["integer", "null"]}, "anyOf", `Optional[int]`, `int | None`, "int, optional"."""
    schema, nullable, is_union = schema if isinstance(schema, dict) else {}, False, False
    for _ in range(MAX_DEPTH):
        nullable = nullable or schema.get("nullable") is True
        key = next(filter(schema.get, ("anyOf", "oneOf", "allOf")), "type")
        if not isinstance(schema.get(key), list):
            break
        branches = [each if isinstance(each, dict) else {"type": each} for each in schema[key]]
        real = [each for each in branches if each.get("type") != "null"]
        nullable = nullable or len(real) < len(branches)
        schema = {**schema, key: None, **(real[0] if len(real) == 1 else {"type": None})}
    said = str(schema.get("type")).lower()
    if re.search(r"optional|union|none\b.|[,|]", said):
        while found := re.fullmatch(r"(?:typing\.)?(optional|union)\[(.*)\](.*)", said, re.S):
            nullable, is_union = nullable or found[1] == "optional", found[1] == "union"
            said = found[2] + found[3]
        null = r"(?:^|[,|])\s*(?:optional|none|null|nonetype)\s*(?=$|[,|])"
        rest = re.sub(null, "", said).strip(" ,|")
        nullable, is_union = nullable or rest != said, is_union or "|" in rest
        several = is_union and re.search(r"[,|](?![^\[]*\])", rest)
        schema = {**schema, "type": None if several else rest}
    word = re.split(r"\W", str(schema.get("type")).lower(), maxsplit=1)[0]
    return _KINDS.get(word, ""), schema, nullable


def items_of(schema: dict) -> dict:
    """The schema of a list's items: in "items", or in a type `list(str)`; {} if none is said."""
    written = re.fullmatch(r"(?:list|array)\W(.*)\W", str(schema.get("type")).lower())
    items = schema.get("items", {"type": written[1]} if written else {})
    return items if isinstance(items, dict) else {}


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
        pairs = [(name, value_key(value, parameters.get(name, {})))
                 for name, value in {**values, **_given(call, tool)}.items()]
        keys[call.name, frozenset(pairs)] += 1
    return keys


def _given(call: Call, tool: dict) -> dict:
    """The arguments that a call gives; if not marked as required, "" and null mean absent."""
    optional = tool.get("parameters", {}).keys() - (marked_arguments(tool) or ())
    return {name: value for name, value in call.arguments.items()
            if name not in optional or value_key(value, {})[1] not in (None, "")}


def value_key(value: object, schema: dict, depth: int = 0) -> tuple[str, Hashable]:
    """What a value means under its schema, as (kind, content): ("number", Decimal("5")) for 5, 5.0
    and "5". Where a string is declared, other values are their text. Booleans are never numbers."""
    kind, schema, _ = type_of(schema)
    number, texts = None, []
    if value is None or depth == MAX_DEPTH:     # deeper was not read from a text; not looked at
        return "null", None
    if isinstance(value, str):                  # read as what is declared, or what it looks like
        value = unicodedata.normalize("NFC", value).strip()
        if kind in ("integer", "number", "string", "") and re.fullmatch(_NUMBER, value):
            number, texts = Decimal(value), [value]
        elif kind in ("boolean", "string", "") and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        elif kind in ("array", "object") or kind == "string" and value[:1] in ("[", "{"):
            nested, is_json = _read(value)
            fitting = {"array": list, "object": dict, "string": (list, dict)}[kind]
            if isinstance(nested, fitting) and (is_json or kind != "string"):
                value = nested
    elif isinstance(value, float) and not math.isfinite(value):     # NaN would not equal itself
        value = str(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        written = repr(value) if isinstance(value, float) else f"{Decimal(value):f}"
        number = Decimal(written)
        texts = [written, f"{number:f}".removesuffix(".0")] if kind == "string" else []
    if number is not None and kind in ("string", ""):
        return kind or "number", Spelled(number, frozenset(texts))
    if number is not None:
        return "number", number
    if kind == "string" and not isinstance(value, str):
        return "string", unicodedata.normalize("NFC", as_json(value, sort_keys=True))
    if isinstance(value, dict):
        inner = schema.get("properties")
        inner = inner if isinstance(inner, dict) else {}
        return "object", frozenset([(name, value_key(each, inner.get(name), depth + 1))
                                    for name, each in value.items()])
    if isinstance(value, list):
        items = items_of(schema)
        return "array", tuple([value_key(item, items, depth + 1) for item in value])
    return "string" if isinstance(value, str) else "boolean", value


@dataclass(frozen=True, eq=False)
class Spelled:
    """A number where none is declared. Texts are equal only if spelled alike: "5" is not "5.0", but
    without a type the number 5 is both, and under a string 5.0 is both."""
    number: Decimal
    texts: frozenset[str]       # the texts that it may be; empty: any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spelled) and self.number == other.number and not (
            self.texts and other.texts and self.texts.isdisjoint(other.texts))

    def __hash__(self) -> int:
        return hash(self.number)
