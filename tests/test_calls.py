"""How a call is read, checked and compared, and what an answer is worth (evaluate.exact_match)."""
import math
import os
import time
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

import data
import evaluate
from data import Sample, call_text
from data.calls import (MAX_CHARS, MAX_DEPTH, Call, Parsed, calls_key, check_call,
                        equal_calls, equal_values, parse_calls, required_arguments)
from evaluate import exact_match

TOOLS = WEATHER, RATE, NOW, UNMARKED = (
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
PARIS, OSLO = Call("weather", {"city": "Paris"}), Call("weather", {"city": "Oslo"})


def sample(*gold: Call) -> Sample:
    return Sample("s", ({"role": "user", "content": "?"},), TOOLS, gold)


def read(text: str) -> tuple[Call, ...]:
    """The calls of a text, which the tables below write in Python notation."""
    calls = parse_calls(text).calls
    assert calls, text
    return calls


# --- Reading --------------------------------------------------------------------------------------

ONE = '{"name": "f", "arguments": {"a": 1}}'
BLOCK = f"<tool_call>\n{ONE}\n</tool_call>"
ONE_CALL = (Call("f", {"a": 1}),)
UNPARSABLE = Parsed((), False, "unparsable")
FORGIVEN = {
    "other form": [
        f"<tool_call>\n{ONE}", f"{BLOCK}\n<tool_call>{ONE}", f"Sure, it is 5\" tall:\n{BLOCK}",
        f"{BLOCK}\nand\n{BLOCK}", f"<tool_call> </tool_call>\n{BLOCK}", f"{BLOCK} or {ONE}",
        f"<tool_call>\n{ONE}}}\n</tool_call>", f"{ONE}\n</tool_call>", f"```json\n{ONE}\n```",
        f"<tool_call>\n```\n{ONE}\n```\n</tool_call>", f"[{ONE}, {ONE}]", ONE, f"{ONE}, {ONE}",
        f"<tool_call>\n[{ONE}]\n</tool_call>", BLOCK.replace('{"a": 1}', r'"{\"a\": 1}"'),
        BLOCK.replace("arguments", "parameters"), BLOCK.replace("arguments", "args"),
        BLOCK.replace("name", "tool"), BLOCK.replace("name", "function"),
        BLOCK.replace('{"name"', '{"id": 7, "type": "function", "name"'),
        BLOCK.replace(ONE, f'{{"type": "function", "function": {ONE}}}'),
        BLOCK.replace(ONE, r'{"function": {"name": "f", "arguments": "{\"a\": 1}"}, "id": 7}'),
        "<tool_call>{'name': 'f', 'arguments': {'a': 1}}</tool_call>"],
    "python notation": [
        "f(a=1)", "[f(a=1), f(a = 1)]", "f(a=1)\n  f(\n  a=1)", "```python\nf(a=1)\n```",
        "<tool_call>\nf(a=1)\n</tool_call>"],
}


def test_closed_blocks_and_nothing_else_are_strict():
    for text in (f"{BLOCK}\n{BLOCK}", f"\n<tool_call>{ONE}</tool_call>{BLOCK} "):
        assert parse_calls(text) == Parsed(ONE_CALL * 2, True, "")


@pytest.mark.parametrize("recovery, text", [(r, text) for r in FORGIVEN for text in FORGIVEN[r]])
def test_what_is_forgiven_is_named_and_never_strict(recovery, text):
    parsed = parse_calls(text)
    assert (parsed.recovery, parsed.strict) == (recovery, False)
    assert parsed.calls in (ONE_CALL, ONE_CALL * 2)


@pytest.mark.parametrize("prose", ["As {} in [1]: ", "[as said, 5\" ", "{x: 1} ", "[", "]}"])
def test_brackets_in_the_prose_beside_closed_blocks_are_prose(prose):
    for text in (prose + BLOCK, f"{BLOCK}\n{prose}", f"{prose}<tool_call>f(a=1)</tool_call>"):
        assert parse_calls(text) == Parsed(ONE_CALL, False, "other form")
    assert parse_calls(BLOCK + prose + BLOCK).calls == ONE_CALL * 2


@pytest.mark.parametrize("half", [
    f"<tool_call>{ONE[:-1]}</tool_call>", f"<tool_call>{ONE[:-1]}", ONE[:-1],
    '{"a": 1} {"name": "f", "tz": 1}', f"[1] <tool_call>{ONE}", f"[1] {ONE}",
    "[1] <tool_call></tool_call>"])
def test_half_an_answer_is_no_answer(half):
    assert parse_calls(f"{BLOCK}\n{half}") == UNPARSABLE


def test_a_python_call_has_the_values_of_json():
    parsed = parse_calls("f(a=[1, -2.5], b={'c': (True, None)}, d='it is \"so\" (\", ] {', e='')")
    arguments = {"a": [1, -2.5], "b": {"c": [True, None]}, "d": 'it is "so" (", ] {', "e": ""}
    assert parsed.calls == (Call("f", arguments),)


def test_what_stands_inside_a_python_call_is_its_argument_and_no_call():
    for value in ({"name": "Bob"}, {"name": "Bob", "arguments": {"a": 1}}, [{"name": "Bob"}], ONE):
        assert read(f"create(user={value!r})") == (Call("create", {"user": value}),)


def test_a_call_may_have_no_arguments_but_not_lack_them():
    assert parse_calls(call_text([Call("now")])) == Parsed((Call("now"),), True, "")
    assert parse_calls('<tool_call>{"name": "now"}</tool_call>') == UNPARSABLE


def test_the_tags_are_plain_text_inside_an_argument():
    calls = (Call("f", {"a": "</tool_call>\n<tool_call>", "b": "```json {[\" '"}),)
    assert parse_calls(call_text(calls)) == Parsed(calls, True, "")


def test_no_text_and_an_empty_list_say_that_there_is_nothing_to_call():
    assert parse_calls(call_text(())) == parse_calls(" \n") == Parsed((), True, "")
    assert parse_calls("[]") == parse_calls("[ ]\n") == Parsed((), False, "other form")


@pytest.mark.parametrize("text", [
    "no call", "{", "{}", "5", "<tool_call></tool_call>", "<tool_call>", "\0", "\ud800", "none: []",
    "[1]", f"[[{ONE}]]", f"[{ONE}, 1]", ONE[:-1], f'{ONE}{{"a": 1}}', f'{{"f": {ONE}}}',
    *(f'{{"name": {name}, "arguments": {{}}}}' for name in ('""', "3", "null", "[]")),
    *(f'{{"name": "f", "arguments": {value}}}' for value in ("3", '"x"', "null", "[]")),
    *(f'{{"name": "f", "arguments": {{"a": {value}}}}}' for value in (
        "NaN", "1e999", "9" * 10000, r'"\ud800"')),
    *(ONE[:-1] + f', "{key}": {{}}}}' for key in ("tz", "tool", "args", "function")),
    '{"arguments": {}}', f'{{"function": {ONE}, "x": 1}}',
    "f(1)", "f(a=g())", "f(a=b)", "f(**{'a': 1})", "f(a=1+1)", "f(a={1, 2})", "f(a=b'x')", "f",
    "x = f()", "o.f(a=1)", "f()()", "f(a='\0')", "import os", "__import__('os').system('true')",
    "f(a='\\d')", 'f(a="""x""")', f"f(a={'(' * 40}1{')' * 41}"])
def test_what_is_no_call_is_unparsable(text):
    assert parse_calls(text) == UNPARSABLE


def test_arguments_may_nest_as_deep_as_the_limit_and_no_deeper():
    for depth in (MAX_DEPTH - 2, MAX_DEPTH - 1):
        text = BLOCK.replace("1", "[" * depth + "]" * depth)
        assert parse_calls(text).strict == (depth == MAX_DEPTH - 2)
    hidden = '["]",' * 20000 + "1" + "]" * 20000                # closers in quotes hide no depth
    assert parse_calls(BLOCK.replace("1", hidden)) == UNPARSABLE


@pytest.mark.parametrize("piece", [
    "{", "[", "(", "}", "[]", '"', "'", '\\"', "['", '["\\"', "<tool_call>", "```", " ", "\0",
    "f()", "f(", "not ", "a.", '{"a":', ONE, BLOCK, "9", "<tool_call>\\\"'", '<tool_call>[\\"]['])
def test_reading_takes_linear_time_whatever_is_repeated(piece):
    for size in (480, MAX_CHARS, 10 ** 6):
        text = piece * (size // len(piece))
        for whole in (text, text + "x", ONE[:-2] + text):
            started = time.process_time()
            parse_calls(whole)
            assert time.process_time() - started < 1.0


# --- Checking -------------------------------------------------------------------------------------

def test_required_is_what_is_marked_in_either_way_or_without_marks_what_has_no_default():
    assert [required_arguments(t) for t in TOOLS] == [{"city"}, {"amount"}, set(), {"text"}]
    for marks in ({"parameters": {"a": {"required": False}, "b": {}}},
                  {"parameters": {"a": {}}, "required": []}):
        assert required_arguments({"name": "t"} | marks) == set()


CHECKS = {
    "": ["now()", "rate(amount=3)", "weather(city='Paris', days=5.0)", "weather(city=True)",
         "weather(city='', days='5', metric='true')", "weather(city='Paris', days=None, metric='')",
         "rate(amount='2.5', tags=\"['a']\", more='{\"b\": 1}', any=[{}])", "weather(city=None)",
         "translate(text='a', of='', to=None)"],
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
    assert [check_call(call, TOOLS) for call in read(text)] == [reason]


# --- Comparing ------------------------------------------------------------------------------------

@pytest.mark.parametrize("type_, same", [
    ("integer", ["5", 5, 5.0, " 5.0", "50e-1"]), ("float", [2.5, "2.50"]), ("int", [10 ** 5000]),
    ("boolean", [True, "true", "True "]), ("string", ["é ", "e\u0301"]), ("str", ["2", 2, 2.0]),
    ("string", ["true", True]), ("number", ["ten", " ten"]), (None, ["5", 5, 5.0]), (None, [None]),
    ("list", [["a", 1], "['a', 1]", '["a", "1"]']), ("List[int]", [["2"], [2.0]]),
    ("list(str)", [["2", "true"], [2, True], "['2', 'true']"]), ("Union[int, str]", ["5", 5]),
    ("list[dict]", [[{"a": 1, "b": 2}], "[{'b': 2, 'a': 1}]", ['{"a": 1, "b": 2}']]),
    ("object", [{"a": True}, '{"a": true}', "{'a': True}", '{"a": "true"}']),
    ("number", [math.nan, "nan"]), ("number", ["1e999", "10e998"]), ("number", [-0.0, 0, "-0"])])
def test_values_that_are_the_same_by_the_declared_type(type_, same):
    assert all(equal_values(a, b, {"type": type_}) for a in same for b in same)


@pytest.mark.parametrize("type_, a, b", [
    ("integer", 1, True), (None, "1", True), ("boolean", 1, True), ("string", "1", True),
    ("integer", 1.9, 1), ("number", "1.5", "15"), ("string", "1.5", "15"), ("string", "5", "5.0"),
    ("string", "Paris", "paris"), ("string", "a, b", "a b"), ("number", 0.1, 0.1 + 1e-17 * 2),
    ("number", 2 ** 53, 2 ** 53 + 1), (None, "007", 7), ("number", "1e999", "1e998"),
    ("list", ["a", "b"], ["b", "a"]), ("list", ["a"], ["a", "a"]), ("list", ["a"], "a"),
    ("list", "[", "[["), ("list", [1], [True]), ("string", ["a"], "['a']"), ("object", {}, []),
    ("list", {"a": 1}, '{"a": 1}'), ("object", {"a": 1}, {"a": 1, "b": 1}), (None, None, ""),
    ("object", {"a": 0}, {"a": False}), ("string", "None", None), ("List[str]", ["5.0"], "['5']"),
    ("array<string>", ["1.0"], ["1"]), ("list(list(str))", [["1.10"]], [["1.1"]])])
def test_values_that_differ(type_, a, b):
    assert not equal_values(a, b, {"type": type_}) and not equal_values(b, a, {"type": type_})


def test_a_lists_items_are_compared_by_the_schema_of_the_items():
    for items, same in (({"type": "string"}, False), ({"type": "number"}, True), ("?", True)):
        schema = {"type": "array", "items": items}
        assert equal_values(["1.10"], ["1.1"], schema) == same
        assert equal_values([["1.10"]], [["1.1"]], {"type": "list", "items": schema}) == same


def test_a_vote_is_a_count_of_keys():
    answers = [(PARIS, OSLO), (OSLO, PARIS), (PARIS,), (PARIS, PARIS)]
    assert Counter(calls_key(a, TOOLS) for a in answers).most_common(1)[0][1] == 2


def test_comparing_does_not_recurse_without_end():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert equal_values(deep, deep, {"type": "list"})
    assert not equal_values(deep, [], {"type": "list"})


# --- Scoring: many a case is one that a published scorer gets wrong -------------------------------

P, O = "weather(city='Paris')", "weather(city='Oslo')"
ALL = {"exact": True, "reason": "", "name_correct": True, "name_f1": 1.0, "argument_f1": 1.0}
SCORES = [      # what is said, what is right, and what the verdict says
    # The right call three times is right once, and no F1 rises above 1.
    (f"[{P}, {P}, {P}]", P, {"exact": False, "reason": "wrong number of calls: 3 for 1",
                             "name_correct": False, "name_f1": 0.5, "argument_f1": 0.5}),
    # Two calls of one tool count in either order, and each once; one without arguments scores 1.
    (f"[{O}, {P}]", f"[{P}, {O}]", ALL | {"strict": True}),
    (f"[{O}, {O}]", f"[{P}, {O}]", {"reason": "wrong value: city"}),
    ("now()", "now()", ALL | {"strict": True}),
    # Booleans are no numbers, and floats are not cut.
    ("rate(amount=1, any=1)", "rate(amount=1, any=True)", {"reason": "wrong value: any"}),
    ("rate(amount=2.9)", "rate(amount=2)", {"reason": "wrong value: amount"}),
    # Strict is exact without any coercion.
    ("weather(days=5, city='')", "weather(city='', days=5)", ALL | {"strict": True}),
    ("weather(days='5', city='')", "weather(city='', days=5)", ALL | {"strict": False}),
    ("weather(days=5.0, city='')", "weather(city='', days=5)", ALL | {"strict": False}),
    # Empty means absent, and absent means the default: either way round ...
    *((P[:-1] + more, P, ALL) for more in (", days='')", ", metric='true')", ", metric='')")),
    *((P, P[:-1] + more, ALL) for more in (", days=None)", ", metric=True)", ", metric=None)")),
    (P[:-1] + ", metric=False)", P, {"reason": "wrong value: metric"}),
    # ... unless the argument is required or unknown.
    (P[:-1] + ", wind='')", P, {"reason": "extra argument: wind"}),
    ("weather()", "weather(city='')", {"reason": "missing argument: city"}),
    ("weather(city=None)", "weather(city='')", {"reason": "wrong value: city"}),
    # What no schema describes is compared all the same.
    (P[:-1] + ", wind='5')", P[:-1] + ", wind=5.0)", ALL), ("gone(a='5')", "gone(a=5)", ALL),
    # The reason is the first thing wrong, told by the nearest call of the name.
    (P, f"[{P}, now()]", {"reason": "wrong number of calls: 1 for 2", "name_correct": False}),
    ("[rate(amount=1), now()]", f"[{P}, now()]", {"reason": "wrong name: rate for weather"}),
    (f"[{P[:-1]}, days=1), now()]", f"[{P}, now()]", {"reason": "extra argument: days"}),
    ("[rate(amount=9), rate(amount=1, any='z')]",
     "[rate(amount=1, any='x'), rate(amount=2, any='y')]", {"reason": "wrong value: any"}),
    # Partial credit is one to one: city and metric's default are right, of three arguments each.
    ("[weather(city='Paris', days=2), now()]", "weather(city='Paris', days=3)",
     {"exact": False, "name_f1": 2 / 3, "argument_f1": 2 * 2 / 6}),
]


@pytest.mark.parametrize("said, right, expected", SCORES)
def test_what_an_answer_is_worth(said, right, expected):
    v = exact_match(call_text(read(said)), sample(*read(right)))
    assert {field: getattr(v, field) for field in expected} == expected
    assert v.exact == (v.reason == "") and v.parsed


def test_what_is_forgiven_in_reading_may_be_exact_but_is_not_strict():
    for text in (f"Here: {call_text(read(P))}", call_text([PARIS]).replace("name", "tool")):
        v = exact_match(text, sample(PARIS))
        assert v.exact and v.parsed and not v.strict and v.recovery == "other form"


def test_garbage_is_never_right_and_saying_nothing_only_where_no_call_is():
    for gold in ([], [PARIS]):
        v = exact_match("garbage", sample(*gold))
        assert (v.exact, v.strict, v.parsed, v.reason) == (False, False, False, "unparsable")
    for text in ("", "[]"):
        assert exact_match(text, sample()).exact
        assert exact_match(text, sample()).strict == (text == "")
        assert not exact_match(text, sample(PARIS)).exact
    assert exact_match(call_text([PARIS]), sample()).reason == "wrong number of calls: 1 for 0"


def test_reachable_means_that_every_gold_tool_is_offered():
    assert evaluate.reachable(sample(PARIS, Call("now")))
    assert not evaluate.reachable(sample(PARIS, Call("gone")))


# --- For any input --------------------------------------------------------------------------------

def nested(scalars):
    return st.recursive(scalars, lambda v: st.lists(v, max_size=3)
                        | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=4)


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
FINITE = nested(SCALARS | st.floats(allow_nan=False, allow_infinity=False))
VALUES = nested(SCALARS | st.floats() | st.sampled_from([
    "", " ", "5", "5.0", 5, 5.0, "true", "1e999", "nan", "[1]", "['a']", '{"a": 1}', "[" * 99]))
TYPES = st.sampled_from(["string", "integer", "float", "boolean", "list(str)", "object",
                         "List[int]", "list(list)", "Union[int, str]", None])
CALLS = st.builds(Call, st.sampled_from(["weather", "rate", "now", "translate", "gone"]),
                  st.dictionaries(st.sampled_from([
                      "city", "days", "metric", "amount", "tags", "more", "any", "text", "x"]),
                      VALUES, max_size=3))
MARKS = st.text(alphabet="{}[]()<>\"'\\,:=-.$`ftn1 \0\n", max_size=60)
EDITS = st.tuples(st.integers(0, 120), st.integers(0, 6), MARKS.map(lambda text: text[:3]))
many = settings(max_examples=80, deadline=None)


@many
@given(st.text(st.characters(), max_size=60) | MARKS, st.lists(EDITS, max_size=4))
def test_any_text_can_be_read_and_so_can_a_damaged_answer(text, edits):
    damaged = f"{BLOCK}\n{BLOCK}"
    for start, length, new in edits:
        damaged = damaged[:start] + new + damaged[start + length:]
    for said in (text, damaged):
        parsed = parse_calls(said)
        assert parsed.strict == (parsed.recovery == "")
        says_none = "".join(said.split()) in ("", "[]")
        assert (parsed.recovery == "unparsable") == (not parsed.calls and not says_none)
        assert 0.0 <= exact_match(call_text(parsed.calls), sample(PARIS)).argument_f1 <= 1.0


@many
@given(st.lists(st.builds(Call, st.text(min_size=1, max_size=8),
                          st.dictionaries(st.text(max_size=8), FINITE, max_size=3)), max_size=3))
def test_an_answer_in_the_form_asked_for_is_read_as_it_was_written(calls):
    assert parse_calls(call_text(calls)) == Parsed(tuple(calls), True, "")


@many
@given(VALUES, VALUES, VALUES, TYPES)
def test_equality_is_reflexive_symmetric_and_transitive(a, b, c, type_):
    schema = {"type": type_}
    assert equal_values(a, a, schema)
    assert equal_values(a, b, schema) == equal_values(b, a, schema)
    if equal_values(a, b, schema) and equal_values(b, c, schema):
        assert equal_values(a, c, schema)


@many
@given(st.lists(CALLS, max_size=3), st.lists(CALLS, max_size=3), st.randoms(use_true_random=False))
def test_order_never_counts_and_number_always_does(a, b, random):
    shuffled = random.sample(a, len(a))
    assert equal_calls(a, shuffled, TOOLS) and equal_calls(a, b, TOOLS) == equal_calls(b, a, TOOLS)
    assert equal_calls(shuffled, b, TOOLS) == equal_calls(a, b, TOOLS)
    assert not a or not equal_calls(a + a[:1], a, TOOLS)


@many
@given(st.lists(CALLS, max_size=3), st.lists(CALLS, min_size=1, max_size=3))
def test_scores_lie_between_none_and_all_and_agree_with_exact(predicted, gold):
    text = call_text(predicted)
    v = exact_match(text, sample(*gold))
    assert 0.0 <= v.name_f1 <= 1.0 and 0.0 <= v.argument_f1 <= 1.0
    assert v.exact == (v.reason == "") == equal_calls(parse_calls(text).calls, gold, TOOLS)
    assert v.exact or not v.strict
    assert not v.exact or (v.name_correct and v.name_f1 == v.argument_f1 == 1.0)


@pytest.mark.skipif("TTSI_DATA" not in os.environ, reason="needs the benchmarks in $TTSI_DATA")
@pytest.mark.parametrize("bench", data.PUBLISHED)
def test_the_gold_calls_of_the_benchmarks_are_exact_and_strict_and_of_the_declared_types(bench):
    for real in data.load(bench, os.environ["TTSI_DATA"]):
        v = exact_match(call_text(real.answers), real)
        assert v.exact and v.strict and v.name_correct, real.id
        assert v.name_f1 == v.argument_f1 == 1.0, real.id
        assert not exact_match(call_text(real.answers * 2), real).exact, real.id
        assert not any("wrong type" in check_call(call, real.tools) for call in real.answers)
