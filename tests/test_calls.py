"""How a call is read, checked and compared, and what an answer is worth (evaluate.exact_match)."""
import ast
import math
import os
import time

import pytest
from hypothesis import example, given, settings, strategies as st

import data
from data import Sample
from data.calls import (CALL_START, MAX_CHARS, MAX_DEPTH, Call, Parsed, call_keys, call_start,
                        call_text, check_call, parse_calls, required_arguments, value_key)
from evaluate import exact_match

TOOLS = (
    {"name": "weather", "description": "", "parameters": {
        "city": {"type": "string", "required": True}, "days": {"type": "integer"},
        "metric": {"type": "boolean", "default": True}}},
    {"name": "rate", "description": "", "required": ["amount"], "parameters": {
        "amount": {"type": "float"}, "tags": {"type": "list(str)"}, "more": {"type": "object"},
        "any": {}}},
    {"name": "now", "description": "", "parameters": {}},
    {"name": "translate", "description": "", "parameters": {
        "text": {"type": "str"}, "to": {"type": "str", "default": "en"},
        "of": {"type": "str", "description": "[Optional] The source language."}}})


def sample(*gold: Call) -> Sample:
    return Sample("s", ({"role": "user", "content": "?"},), TOOLS, gold)


def short(text: str) -> tuple[Call, ...]:
    """The calls that the tables below write as f(a=1), or as a list of such."""
    tree = ast.parse(text or "[]", mode="eval").body
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    return tuple(Call(node.func.id, {k.arg: ast.literal_eval(k.value) for k in node.keywords})
                 for node in nodes)


# --- Reading --------------------------------------------------------------------------------------

ONE = '{"name": "f", "arguments": {"a": 1}}'
BLOCK = f"<tool_call>\n{ONE}\n</tool_call>"
ONE_CALL = (Call("f", {"a": 1}),)
FORMS = {       # what is forgiven: texts of one call, or of the same call twice
    "": [BLOCK, f"\n<tool_call>{ONE}</tool_call>{BLOCK} "],
    "other form": [
        ONE, f"{ONE}\n</tool_call>", f"<tool_call>\n{ONE}", f"<tool_call>\n{ONE}}}\n</tool_call>",
        f"[{ONE}, {ONE}]", f"<tool_call>\n[{ONE}]\n</tool_call>", f"```json\n{ONE}\n```",
        f"<tool_call> </tool_call>\n{BLOCK}", f"{BLOCK} or {ONE}",
        *(prose + BLOCK + prose for prose in ('It is 5" tall: ', "As {} in [1]: ", "[as", "{x}]")),
        *(BLOCK.replace("arguments", key) for key in ("parameters", "args")),
        *(BLOCK.replace("name", key) for key in ("tool", "function", 'id": 7, "name')),
        r'{"id": 7, "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}',
        "<tool_call>{'name': 'f', 'arguments': {'a': 1}}</tool_call>"],
}


@pytest.mark.parametrize("recovery, text", [(r, text) for r in FORMS for text in FORMS[r]])
def test_what_is_forgiven_is_named_and_in_closed_blocks_alone_there_is_nothing(recovery, text):
    parsed = parse_calls(text)
    assert parsed.calls in (ONE_CALL, ONE_CALL * 2)
    assert parsed.recovery == recovery


@pytest.mark.parametrize("value", [
    [1, -2.5], {"c": [True, None]}, 'it is "so" (", ] {', "", {"name": "Bob", "arguments": {}}])
def test_a_python_literal_is_read_as_json_is(value):
    assert parse_calls(repr({"name": "f", "arguments": {"a": value}})).calls == (
        Call("f", {"a": value}),)


@pytest.mark.parametrize("text", [
    "no call", "{", "{}", "5", "<tool_call></tool_call>", "<tool_call>", "\0", "\ud800", "none: []",
    # half an answer is no answer
    *(f"{BLOCK}\n{half}" for half in (
        f"<tool_call>{ONE[:-1]}</tool_call>", f"<tool_call>{ONE[:-1]}", ONE[:-1], f"[1] {ONE}",
        '{"a": 1} {"name": "f", "tz": 1}', f"[1] <tool_call>{ONE}", "[1] <tool_call></tool_call>")),
    "[1]", f"[[{ONE}]]", f"[{ONE}, 1]", ONE[:-1], f'{ONE}{{"a": 1}}', f'{{"f": {ONE}}}',
    *(ONE.replace('"f"', name) for name in ('""', "3")),
    *(ONE.replace('{"a": 1}', value) for value in ('"x"', "null", "[]")),
    *(ONE.replace("1", value) for value in ("NaN", "1e999", "9" * 10000, r'"\ud800"')),
    *(ONE[:-1] + f', "{key}": {{}}}}' for key in ("tz", "tool")),
    '{"name": "f"}', '{"arguments": {}}', f'{{"function": {ONE}, "x": 1}}',
    # a Python literal has quotes, numbers, True, False, None, lists and dicts, and nothing else
    "f(a=1)", "__import__('os').system('true')",
    *("{'name': 'f', 'arguments': {'a': %s}}" % value for value in (
        "g()", "b", "1+1", "{1, 2}", "(1, 2)", "b'x'", "'\0'", "'\\d'", '"""x"""',
        "1" + "-1" * 7000))])
def test_what_is_no_call_is_unparsable(text):
    assert parse_calls(text) == Parsed((), "unparsable")


def test_arguments_may_nest_as_deep_as_the_limit_and_no_deeper():
    deep = MAX_DEPTH - 2                                        # the call is two levels itself
    for value, strict in (("[" * deep + "]" * deep, True),
                          ("[" * (deep + 1) + "]" * (deep + 1), False),
                          ('["]",' * 20000 + "1" + "]" * 20000, False)):      # no depth is hidden
        assert (parse_calls(BLOCK.replace("1", value)).recovery == "") == strict


@pytest.mark.parametrize("piece", [
    "{", "[", "(", "}", "[]", '"', '\\"', "['", '["\\"', "<tool_call>", "```", " ", "f()", "f(",
    "not ", "a.", '{"a":', ONE, BLOCK, "9", "<tool_call>\\\"'", '<tool_call>[\\"]['])
def test_reading_takes_linear_time_whatever_is_repeated(piece):
    for size in (480, MAX_CHARS, 10 ** 6):
        text = piece * (size // len(piece))
        for whole in (text, text + "x", ONE[:-2] + text):
            started = time.process_time()
            parse_calls(whole)
            assert time.process_time() - started < 1.0


def tagged(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


BOOK = tagged('{"name": "book", "arguments": {"city": "%s"}}')
THOUGHT = f"<think>\nFirst idea: {BOOK % 'Graz'} but it's no.\n</think>\n"
NOW = tagged('{"name": "now"%s}')
LINZ = (Call("book", {"city": "Linz"}),)
NOTES = [       # between the tags, and the arguments of the call of note that are read
    ('{"name": "note", "arguments": {"text": "milk\neggs"}}', {"text": "milk\neggs"}),
    ('{"name": "note", "arguments": {"text": "a\tb", "pin": true}}', {"text": "a\tb", "pin": True}),
    ('{"name": "note", "arguments": {"pin": true,}}', {"pin": True}),
    ('{"name": "note", "arguments": {"a": [1, null,\n], }}', {"a": [1, None]}),
    ("{'name': 'note', 'arguments': {'pin': true, 'text': null}}", {"pin": True, "text": None}),
    ("""{'name': "note", "arguments": {'pin': False, "text": 'it\\'s'}}""",
     {"pin": False, "text": "it's"}),
    (r"{'name': 'note', 'arguments': {'text': 'milk\neggs \u00e9'}}", {"text": "milk\neggs é"}),
    (r'{"name": "note", "arguments": {"text": "D:\projects\list.txt"}}',
     {"text": r"D:\projects\list.txt"}),
    (r'{"name": "note", "arguments": {"text": "\d+\n\users"}}', {"text": "\\d+\n\\users"}),
    ('{"name": "note", "arguments": {"text": "<think>a</think> </think> <tool_call>"}}',
     {"text": "<think>a</think> </think> <tool_call>"}),
    ('{"name": "note", "arguments": {"text": "write </tool_call> at the end"}}',
     {"text": "write </tool_call> at the end"}),
    ("{'name': 'note', 'arguments': {1: 2}}", {"1": 2})]


@pytest.mark.parametrize("body, arguments", NOTES)
@pytest.mark.parametrize("around", ["{}", "As said [1: {}", "<thinking>[ {{</thinking>{}"])
def test_one_reading_of_all_notations_whatever_stands_around(body, arguments, around):
    assert parse_calls(around.format(tagged(body))).calls == (Call("note", arguments),)


@pytest.mark.parametrize("text", [
    THOUGHT + BOOK % "Linz", THOUGHT.removeprefix("<think>") + BOOK % "Linz",
    "<think>Either {Graz, Linz} or none.</think>\n" + BOOK.split("\n")[1] % "Linz",
    f"{BOOK % 'Linz'}\n<think>Done: {{</think>", "<Thinking>{</Thinking>" + BOOK % "Linz"])
def test_what_a_model_thinks_is_no_part_of_its_answer(text):
    assert parse_calls(text) == Parsed(LINZ, "other form")


@pytest.mark.parametrize("text", [
    THOUGHT + "I am not able to do this.", THOUGHT.replace("</think>", ""), "There is none.",
    tagged('{"name": "book", "arguments": {"city": "Li'), f"As [1: {BOOK % 'Linz'}<tool_call>",
    f"As [1: <tool_call><tool_call>{{}}</tool_call>", f"As [1: {BOOK % 'Linz'} " + NOW[:-12]])
def test_a_thought_prose_or_half_a_call_is_no_answer(text):
    assert parse_calls(text) == Parsed((), "unparsable")


@pytest.mark.parametrize("text", [
    "```json\n[]\n```", "```\n[ ]```", '{"tool_calls": []}', "<think>None.</think>"])
def test_that_no_call_is_needed_may_be_said_in_other_forms(text):
    assert parse_calls(text) == Parsed((), "other form")


@pytest.mark.parametrize("text, arguments", [
    (NOW % "", {}), (NOW % ', "arguments": null', {}), (NOW % ', "arguments": ""', {}),
    (r'{"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "now", '
     r'"arguments": "{\"zone\": \"CET\"}"}}]}', {"zone": "CET"}),
    ('{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "now"}}]}', {})])
def test_in_tags_or_openais_wrapper_a_name_alone_is_a_call(text, arguments):
    assert parse_calls(text) == Parsed((Call("now", arguments),), "other form")


@pytest.mark.parametrize("text, start", [
    ('<tool_call>\n{"name": "get"}', CALL_START), ('{"name": "get"}', '{"name": "'),
    ('Sure:\n[{"tool" :"get", "name": "x"}]', 'Sure:\n[{"tool" :"'),
    ('[{"arguments": {"name": "Bob"}, "name": "get"}]', CALL_START),
    ('get(user={"name": "Bob"})', CALL_START), ("I cannot.", CALL_START), ("", CALL_START)])
def test_an_answer_starts_up_to_where_it_names_its_tool_and_calls_are_written_like_it(text, start):
    """With tags, without, and with them where an answer names none."""
    assert call_start(text) == start
    each = BLOCK if start == CALL_START else ONE
    assert call_text(ONE_CALL, like=text) == each
    assert call_text(ONE_CALL * 2, like=text) == f"{each}\n{each}"


# --- Checking -------------------------------------------------------------------------------------

def test_required_is_what_is_marked_in_either_way_or_without_marks_what_has_no_default():
    none = [{"name": "t", "parameters": {"a": {"required": False}, "b": {}}},
            {"name": "t", "parameters": {"a": {}}, "required": []}]
    required = [required_arguments(tool) for tool in [*TOOLS, *none]]
    assert required == [{"city"}, {"amount"}, set(), {"text"}, set(), set()]


CHECKS = {
    "": ["now()", "weather(city=True, days=5.0)", "weather(city='', days='5', metric='true')",
         "weather(city=None, days=None, metric='')", "translate(text='a', of='', to=None)",
         "rate(amount='2.5', tags=\"['a']\", more='{\"b\": 1}', any=[{}])"],
    "unknown tool": ["Weather(city='Paris')"],
    "missing argument: city": ["weather(days=1)"],
    "missing argument: text": ["translate()", "translate(text=' ')", "translate(text=None)"],
    "unknown argument: wind": ["weather(city='Oslo', wind=1)", "weather(city='Oslo', wind=None)"],
    "wrong type: city": ["weather(city=['Paris'])"],
    "wrong type: days": [f"weather(city='', days={value})" for value in (1.5, "'two'", True, [1])],
    "wrong type: metric": ["weather(city='Paris', metric=1)"],
    "wrong type: amount": ["rate(amount='')", "rate(amount='nan')", "rate(amount=True)"],
    "wrong type: tags": ["rate(amount=1, tags='a')", "rate(amount=1, tags={'a': 1})"],
    "wrong type: more": ["rate(amount=1, more='[1]')"],
}


@pytest.mark.parametrize("reason, text", [(r, text) for r in CHECKS for text in CHECKS[r]])
def test_check_call_names_the_first_thing_that_breaks_the_schema(reason, text):
    assert [check_call(call, TOOLS) for call in short(text)] == [reason]


# --- Comparing ------------------------------------------------------------------------------------

SAME = {        # a declared type: lists of values that are the same; those of two lists differ
    "integer": [["5", 5, 5.0, " 5.0", "50e-1"], [1], [True], [1.9], [10 ** 5000]],
    "float": [[2.5, "2.50"], ["25"], [2 ** 53], [2 ** 53 + 1], ["1e999", "10e998"], ["1e998"],
              [math.nan, "nan"], [-0.0, 0, "-0"]],
    "boolean": [[True, "true", "True "], [1], ["yes"]],
    "str": [["é ", "e\u0301"], ["2", 2, 2.0], ["2.0"], ["true", True, "True"], ["a, b"], ["a b"],
            ["Paris"], ["paris"], ["None"], [None], [["a"], '["a"]', '[ "a" ]'], ["['a']"],
            [{"b": [True], "a": 1}, '{"a": 1, "b": [true]}']],
    None: [["5", 5, 5.0], ["1"], [True], ["007"], [7], [None], [""]],
    "Union[int, str]": [["5", 5], ["x"]],
    "list": [[["a", 1], "['a', 1]", '["a", "1"]'], [[1, "a"]], [["a"]], [["a", "a"]], ["a"], [[1]],
             [[True]], [[{"a": 1, "b": 2}], "[{'b': 2, 'a': 1}]"], [{"a": 1}], ['{"a": 1}']],
    "list(str)": [[["2", "true"], [2, True], "['2', 'true']"], [["2.0", "true"]]],
    "list(list(str))": [[[["1.10"]]], [[["1.1"]]]],
    "object": [[{"a": True}, "{'a': True}", '{"a": "true"}'], [{}], [[]], [{"a": 1, "b": 1}]]}


@pytest.mark.parametrize("type_", SAME)
def test_values_are_the_same_by_the_declared_type(type_):
    keys = [{value_key(value, {"type": type_}) for value in same} for same in SAME[type_]]
    assert all(len(of_same) == 1 for of_same in keys)
    assert len(set.union(*keys)) == len(keys)


@pytest.mark.parametrize("items, same", [
    ({"type": "string"}, False), ({"type": "number"}, True), ("?", False)])
def test_a_lists_items_are_compared_by_the_schema_of_the_items(items, same):
    schema = {"type": "list", "items": {"type": "array", "items": items}}
    assert (value_key([["1.10"]], schema) == value_key([["1.1"]], schema)) == same


TEXT_TYPES = [{"type": ["string", "null"]}, {"anyOf": [{"type": "string"}, {"type": "null"}]},
              {"type": "Optional[str]"}, {"type": "str, optional"}, {"type": "Union[str, None]"},
              {"type": "str | None"}, {"type": "string"}]


@pytest.mark.parametrize("schema, one, other, same", [
    *((schema, "1.10", "1.1", False) for schema in TEXT_TYPES),
    *((schema, "3.0", 3.0, True) for schema in TEXT_TYPES),
    *(({"type": "string"}, one, other, True) for one, other in (
        (True, "True"), ("[1, 2]", [1, 2]), ('{"a":1}', {"a": 1}))),
    ({"type": "object", "properties": {"v": {"type": "string"}}}, {"v": "1.10"}, {"v": "1.1"},
     False),
    ({"type": "object", "properties": {"n": {"type": "integer"}}}, {"n": 5}, {"n": "5"}, True),
    ({"type": "array", "items": {"type": "string"}}, ["1e3"], ["1000"], False),
    ({"type": "array", "items": {"type": ["integer", "null"]}}, ["5"], [5.0], True),
    ({"type": "Optional[List[str]]"}, ["0071"], ["71"], False),
    ({"type": ["integer", "null"]}, "5", 5, True), ({"type": "integer"}, 1, True, False),
    # without a type, a text is a number only where the other side is one
    ({}, "5", 5, True), ({}, "5.0", "5", False), ({"type": "object"}, {"n": "1.10"}, {"n": "1.1"},
                                                  False)])
def test_values_are_compared_by_the_schema_at_every_depth_both_ways(schema, one, other, same):
    tool = {"name": "f", "description": "", "parameters": {"x": schema}}
    for gold, said in ((one, other), (other, one)):
        asked = Sample("s", (), (tool,), (Call("f", {"x": gold}),))
        assert exact_match(call_text([Call("f", {"x": said})]), asked).exact == same


ORDER = {"type": "array", "items": {"type": "object", "required": ["sku"], "properties": {
    "sku": {"type": "string"}, "qty": {"type": ["integer", "null"]},
    "unit": {"enum": ["kg", "l"]}}}}


@pytest.mark.parametrize("items, reason", [
    ([{"sku": "1", "qty": "2", "unit": "kg"}, {"sku": "2", "qty": None}], ""),
    ('[{"sku": "1", "qty": 2}]', ""), ([{"sku": "1", "qty": "two"}], "wrong type: x"),
    ([{"qty": 2}], "missing inside: x"), ([{"sku": "1", "unit": "g"}], "not in the enum: x"),
    ([["1"]], "wrong type: x")])
def test_a_call_is_checked_at_every_depth(items, reason):
    tool = {"name": "f", "description": "", "parameters": {"x": ORDER}}
    assert check_call(Call("f", {"x": items}), [tool]) == reason


@pytest.mark.parametrize("schema, required", [
    ({"type": "integer"}, {"x"}), ({"type": ["integer", "null"]}, set()),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, set()), ({"type": "Optional[int]"}, set()),
    ({"type": "int, optional"}, set()), ({"type": "int | None"}, set()),
    ({"type": "object", "required": ["a"], "properties": {"a": {}}}, {"x"}),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, {"x"})])
def test_what_may_be_null_may_be_left_out_or_null(schema, required):
    for more in ({}, {"required": ["x"]}):
        tool = {"name": "f", "description": "", "parameters": {"x": schema}, **more}
        assert required_arguments(tool) == required
        asked = Sample("s", (), (tool,), (Call("f"),))
        assert exact_match(call_text([Call("f", {"x": None})]), asked).exact == (
            not required or not more)


def test_comparing_does_not_recurse_without_end():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert value_key(deep, {"type": "list"}) != value_key([], {"type": "list"})


# --- Scoring: many a case is one that a published scorer gets wrong -------------------------------

P, O = "weather(city='Paris')", "weather(city='Oslo')"
PARIS = call_text(short(P))
ALL = {"exact": True, "reason": "", "name_correct": True, "name_f1": 1.0, "argument_f1": 1.0}
NONE = {"exact": False, "strict": False, "parsed": False, "reason": "unparsable"}
TEXTS = (f"Here: {PARIS}", "garbage", "", "[]", " \n", "[ ]")
SCORES = [      # calls, or a text; the right calls; what the verdict says
    # The right call three times is right once, and no F1 rises above 1.
    (f"[{P}, {P}, {P}]", P, {"exact": False, "reason": "wrong number of calls: 3 for 1",
                             "name_correct": False, "name_f1": 0.5, "argument_f1": 0.5}),
    # Two calls of one tool count in either order, and each once; one without arguments scores 1.
    (f"[{O}, {P}]", f"[{P}, {O}]", ALL | {"strict": True}),
    (f"[{O}, {O}]", f"[{P}, {O}]", {"reason": "wrong value: city"}),
    ("now()", "now()", ALL | {"strict": True}),
    # Strict is exact without any coercion, in the form asked for alone.
    ("weather(days=5, city='')", "weather(city='', days=5)", ALL | {"strict": True}),
    ("weather(days='5', city='')", "weather(city='', days=5)", ALL | {"strict": False}),
    (f"Here: {PARIS}", P, ALL | {"parsed": True, "strict": False}),
    # Empty means absent, and absent means the default: either way round ...
    *((P[:-1] + more, P, ALL) for more in (", days='')", ", metric='true')", ", metric='')")),
    *((P, P[:-1] + more, ALL) for more in (", days=None)", ", metric=True)", ", metric=None)")),
    (P[:-1] + ", metric=False)", P, {"reason": "wrong value: metric"}),
    # ... unless the argument is required or unknown.
    (P[:-1] + ", wind='')", P, {"reason": "extra argument: wind"}),
    ("weather()", "weather(city='')", {"reason": "missing argument: city"}),
    ("weather(city=None)", "weather(city='')", {"reason": "wrong value: city"}),
    ("gone(a='5')", "gone(a=5)", ALL),      # what no schema describes is compared all the same
    # The reason is the first thing wrong, told by the nearest call of the name.
    ("[rate(amount=1), now()]", f"[{P}, now()]", {"reason": "wrong name: rate for weather"}),
    ("[rate(amount=9), rate(amount=1, any='z')]",
     "[rate(amount=1, any='x'), rate(amount=2, any='y')]", {"reason": "wrong value: any"}),
    # Partial credit is one to one: city and metric's default are right, of three arguments each.
    ("[weather(city='Paris', days=2), now()]", "weather(city='Paris', days=3)",
     {"exact": False, "name_f1": 2 / 3, "argument_f1": 2 * 2 / 6}),
    # Garbage is never right, and saying nothing only where no call is.
    ("garbage", "", NONE), ("garbage", P, NONE), ("", P, NONE), ("[]", P, NONE),
    (" \n", "", {"exact": True, "strict": True}), ("[ ]", "", {"exact": True, "strict": False}),
    (P, "", {"exact": False, "reason": "wrong number of calls: 1 for 0"}),
]


@pytest.mark.parametrize("said, right, expected", SCORES)
def test_what_an_answer_is_worth(said, right, expected):
    text = said if said in TEXTS else call_text(short(said))
    verdict = exact_match(text, sample(*short(right)))
    found = vars(verdict) | verdict.measures
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("text", TEXTS)
def test_reachable_means_that_every_gold_tool_is_offered(text):
    """Whatever the answer is."""
    for name, reachable in (("now", 1.0), ("gone", 0.0)):
        verdict = exact_match(text, sample(Call("weather"), Call(name)))
        assert verdict.measures["reachable"] == reachable


# --- For any input --------------------------------------------------------------------------------

def nested(scalars):
    return st.recursive(scalars, lambda v: st.lists(v, max_size=3)
                        | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=4)


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
FINITE = nested(SCALARS | st.floats(allow_nan=False, allow_infinity=False))
VALUES = nested(SCALARS | st.floats() | st.sampled_from([
    "", " ", "5", "5.0", 5, 5.0, "true", "1e999", "nan", "[1]", "['a']", '{"a": 1}', "[" * 99]))
CALL = st.builds(Call, st.sampled_from(["weather", "rate", "translate", "gone"]), st.dictionaries(
    st.sampled_from(["city", "days", "metric", "amount", "any", "text"]), VALUES, max_size=3))
CALLS = st.lists(CALL, max_size=3)
TEXT = st.text(st.characters(), max_size=60) | st.text("{}[]()<>\"'\\,:=-.$`ftn1 \0\n", max_size=60)
many = settings(max_examples=80, deadline=None)


@many
@given(st.lists(st.builds(Call, st.text(min_size=1, max_size=8),
                          st.dictionaries(st.text(max_size=8), FINITE, max_size=3)), max_size=3))
@example([Call("f", {"a": "</tool_call>\n<tool_call>", "b": "```json {[\" '"})])
def test_an_answer_in_the_form_asked_for_is_read_as_it_was_written(calls):
    assert parse_calls(call_text(calls)) == Parsed(tuple(calls), "")


@many
@given(CALLS, st.randoms(use_true_random=False))
def test_order_never_counts_and_number_always_does(calls, random):
    shuffled = random.sample(calls, len(calls))
    keys = call_keys(calls, TOOLS)
    assert call_keys(shuffled, TOOLS) == keys and keys.total() == len(calls)
    assert not calls or call_keys([*calls, calls[0]], TOOLS) != keys


@many
@given(CALLS, st.lists(CALL, min_size=1, max_size=3), TEXT, st.integers(0, 120), st.integers(0, 6))
def test_any_text_even_a_damaged_answer_is_read_and_its_scores_agree(said, gold, text, start, cut):
    whole = call_text(said)
    for answer in (whole, text, whole[:start] + text + whole[start + cut:]):
        parsed, v = parse_calls(answer), exact_match(answer, sample(*gold))
        name_f1, argument_f1 = v.measures["name_f1"], v.measures["argument_f1"]
        says_none = "".join(answer.split()) in ("", "[]")
        assert (parsed.recovery == "unparsable") == (not parsed.calls and not says_none)
        assert 0 <= name_f1 <= 1 and 0 <= argument_f1 <= 1
        assert v.exact or not v.measures["strict"]
        same = call_keys(parsed.calls, TOOLS) == call_keys(gold, TOOLS)
        assert v.exact == (v.reason == "") == same
        assert not v.exact or v.measures["name_correct"] == name_f1 == argument_f1 == 1.0


@pytest.mark.skipif("TTSI_DATA" not in os.environ, reason="needs the benchmarks in $TTSI_DATA")
@pytest.mark.parametrize("bench", data.PUBLISHED)
def test_the_gold_calls_of_the_benchmarks_are_exact_and_strict_and_of_the_declared_types(bench):
    for real in data.load(bench, os.environ["TTSI_DATA"]):
        v = exact_match(call_text(real.answers), real)
        assert v.exact and v.measures["strict"], real.id
        assert not exact_match(call_text(real.answers * 2), real).exact, real.id
        assert not any("wrong type" in check_call(call, real.tools) for call in real.answers)
