"""How a call is read, checked and compared, and what an answer is worth: data/calls.py and evaluate.exact_match."""
import json
import math
import os
import time
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

import data
from data import Sample, call_text
from data.calls import (MAX_CHARS, MAX_DEPTH, Call, Parsed, call_key, calls_key, check_call, equal_calls, equal_values,
                        parse_calls, required_arguments)
from evaluate import exact_match, f1, reachable

TOOLS = ({"name": "weather", "description": "", "parameters": {
              "city": {"type": "string", "required": True}, "days": {"type": "integer"},
              "metric": {"type": "boolean", "default": True}}},
         {"name": "rate", "description": "", "required": ["amount"], "parameters": {
              "amount": {"type": "float"}, "tags": {"type": "list(str)"}, "more": {"type": "object"}, "any": {}}},
         {"name": "now", "description": "", "parameters": {}})
PARIS, OSLO = Call("weather", {"city": "Paris"}), Call("weather", {"city": "Oslo"})


def sample(*gold: Call) -> Sample:
    return Sample("s", ({"role": "user", "content": "?"},), TOOLS, gold)


def verdict(predicted: list[Call], *gold: Call):
    return exact_match(call_text(predicted), sample(*gold))


# --- Reading ---------------------------------------------------------------------------------------------------------

ONE = '{"name": "f", "arguments": {"a": 1}}'
BLOCK = f"<tool_call>\n{ONE}\n</tool_call>"


@pytest.mark.parametrize("text, count", [
    (BLOCK, 1), (f"\n {BLOCK}\n{BLOCK} ", 2), (f"<tool_call>{ONE}</tool_call>" * 3, 3)])
def test_closed_blocks_and_nothing_else_are_strict(text, count):
    assert parse_calls(text) == Parsed((Call("f", {"a": 1}),) * count, True, "")


@pytest.mark.parametrize("recovery, text", [
    ("unclosed block", f"<tool_call>\n{ONE}"),
    ("unclosed block", f"{BLOCK}\n<tool_call>{ONE}"),
    ("surrounding text", f"Sure, it is 5\" tall:\n{BLOCK}"),
    ("surrounding text", f"{BLOCK}\nDone."),
    ("surrounding text", f"{BLOCK}\nand\n{BLOCK}"),
    ("surrounding text", "<tool_call>\n" + ONE + "}\n</tool_call>"),
    ("surrounding text", f"{ONE}\n</tool_call>"),
    ("fenced code", f"```json\n{ONE}\n```"),
    ("fenced code", f"<tool_call>\n```\n{ONE}\n```\n</tool_call>"),
    ("bare list", f"[{ONE}, {ONE}]"),
    ("list", f"<tool_call>\n[{ONE}]\n</tool_call>"),
    ("bare object", ONE),
    ("several objects", f"{ONE}\n{ONE}"),
    ("several objects", f"{ONE}, {ONE}"),
    ("several objects", f"{ONE}{ONE}"),
    ("arguments as text", BLOCK.replace('{"a": 1}', r'"{\"a\": 1}"')),
    ("other keys", BLOCK.replace("arguments", "parameters")),
    ("other keys", BLOCK.replace("arguments", "args")),
    ("other keys", BLOCK.replace("name", "tool")),
    ("other keys", BLOCK.replace("name", "function")),
    ("other keys", BLOCK.replace('{"name"', '{"id": 7, "name"')),
    ("other keys", f'<tool_call>{{"type": "function", "function": {ONE}}}</tool_call>'),
    ("other keys", '<tool_call>{"function": {"name": "f", "arguments": "{\\"a\\": 1}"}}</tool_call>'),
    ("python notation", "<tool_call>{'name': 'f', 'arguments': {'a': 1}}</tool_call>"),
    ("python notation", "f(a=1)"),
    ("python notation", "[f(a=1), f(a = 1)]"),
    ("python notation", "f(a=1)\n  f(\n  a=1)"),
    ("python notation", "<tool_call>\nf(a=1)\n</tool_call>"),
    ("python notation", "```python\nf(a=1)\n```"),
])
def test_what_is_forgiven_is_named_and_never_strict(recovery, text):
    parsed = parse_calls(text)
    assert (parsed.recovery, parsed.strict) == (recovery, False)
    assert set(map(call_text, [[c] for c in parsed.calls])) == {BLOCK}


def test_a_python_call_has_the_values_of_json():
    parsed = parse_calls("""f(a=[1, -2.5], b={"c": (True, None)}, d='it is "so" (", ] {', e="")""")
    assert parsed.calls == (Call("f", {"a": [1, -2.5], "b": {"c": [True, None]}, "d": 'it is "so" (", ] {', "e": ""}),)


def test_a_call_may_have_no_arguments_or_not_even_the_key():
    assert parse_calls('<tool_call>{"name": "now", "arguments": {}}</tool_call>') == Parsed((Call("now"),), True, "")
    assert parse_calls('<tool_call>{"name": "now"}</tool_call>') == Parsed((Call("now"),), False, "other keys")
    assert parse_calls("now()").calls == (Call("now"),)


def test_the_tags_are_plain_text_inside_an_argument():
    calls = (Call("f", {"a": "</tool_call>\n<tool_call>", "b": "```json {[\" '"}),)
    assert parse_calls(call_text(calls)) == Parsed(calls, True, "")


@pytest.mark.parametrize("text", [
    "", " \n", "no call", "{", "[]", "{}", "null", "5", '"f"', "<tool_call></tool_call>", "<tool_call>", "\0", "\ud800",
    '{"name": "f", "arguments": {"a": 1}', '{"name": "", "arguments": {}}', '{"name": 3, "arguments": {}}',
    '{"name": "f", "arguments": 3}', '{"name": "f", "arguments": "x"}', '{"name": "f", "arguments": null}',
    f"[[{ONE}]]",
    '{"name": "f", "arguments": {"a": NaN}}', '{"name": "f", "arguments": {"a": -Infinity}}',
    '{"name": "f", "arguments": {"a": 1e999}}', '{"name": "f", "arguments": {"a": ' + "9" * 10000 + "}}",
    r'{"name": "f", "arguments": {"a": "\ud800"}}',
    "f(1)", "f(a=g())", "f(a=b)", "f(**{'a': 1})", "f(a=1+1)", "f(a={1, 2})", "f(a=b'x')", "f(a=1j)", "f(a=...)",
    "f", "x = f()", "o.f(a=1)", "f()()", "f(a='\0')", "import os", "__import__('os').system('true')", "f(a='\\d')",
    'f(a="""x""")', "f(a=" + "(" * 40 + "1" + ")" * 41,
])
def test_what_is_no_call_is_unparsable(text):
    assert parse_calls(text) == Parsed((), False, "unparsable")


def test_half_an_answer_is_no_answer():
    assert parse_calls(f"{BLOCK}\n<tool_call>\n{ONE[:-1]}\n</tool_call>").calls == ()
    assert parse_calls(f'{ONE}\n{{"a": 1}}').calls == ()


def test_of_a_key_given_twice_the_last_counts():
    assert parse_calls('{"name": "f", "arguments": {"a": 1, "a": 2}}').calls == (Call("f", {"a": 2}),)


def test_arguments_may_nest_as_deep_as_the_limit_and_no_deeper():
    deep = '<tool_call>{"name": "f", "arguments": {"a": %s}}</tool_call>'
    assert parse_calls(deep % ("[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2))).strict
    assert not parse_calls(deep % ("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))).calls
    assert not parse_calls(deep % ('["]",' * 20000 + "1" + "]" * 20000)).calls      # closers in quotes hide no depth


@pytest.mark.parametrize("piece", [
    "{", "[", "(", "}", "{}", "[1]", "{a}", '"', "'", '\\"', "['", '["\\"', "<tool_call>", "```", " ", "\0", "-", "f()",
    "f(", "a=", "not ", "[0]", "a.", "lambda:", '{"a":', ONE, BLOCK, "9", "é"])
def test_reading_takes_linear_time_whatever_is_repeated(piece):
    for text in (piece * (MAX_CHARS // len(piece)), piece * (480 // len(piece)), piece * (10 ** 6 // len(piece))):
        for whole in (text, text + "x", ONE[:-2] + text):
            started = time.perf_counter()
            parse_calls(whole)
            assert time.perf_counter() - started < 1.0


# --- Checking --------------------------------------------------------------------------------------------------------

def test_required_is_marked_for_each_parameter_or_in_a_list_beside():
    assert required_arguments(TOOLS[0]) == {"city"}
    assert required_arguments(TOOLS[1]) == {"amount"}
    assert required_arguments({"name": "t", "parameters": {"a": {"required": False}, "b": {}}}) == set()


def test_a_tool_that_marks_nothing_requires_what_has_no_default():
    assert required_arguments({"name": "t", "parameters": {"a": {"type": "str"}, "b": {"default": 1}}}) == {"a"}
    assert required_arguments({"name": "t", "parameters": {"a": {}}, "required": []}) == set()
    assert required_arguments(TOOLS[2]) == set()


@pytest.mark.parametrize("reason, call", [
    ("", PARIS), ("", Call("now")), ("", Call("weather", {"city": "", "days": "5", "metric": "true"})),
    ("", Call("weather", {"city": "Paris", "days": None, "metric": ""})),
    ("", Call("rate", {"amount": "2.5", "tags": "['a']", "more": '{"b": 1}', "any": [{}]})),
    ("", Call("rate", {"amount": 3})), ("", Call("weather", {"city": "Paris", "days": 5.0})),
    ("unknown tool", Call("Weather", {"city": "Paris"})),
    ("missing argument: city", Call("weather", {"days": 1})),
    ("unknown argument: wind", Call("weather", {"city": "Paris", "wind": 1})),
    ("wrong type: city", Call("weather", {"city": 5})), ("wrong type: city", Call("weather", {"city": True})),
    ("wrong type: city", Call("weather", {"city": ["Paris"]})), ("wrong type: city", Call("weather", {"city": None})),
    ("wrong type: days", Call("weather", {"city": "Paris", "days": 1.5})),
    ("wrong type: days", Call("weather", {"city": "Paris", "days": "two"})),
    ("wrong type: days", Call("weather", {"city": "Paris", "days": True})),
    ("wrong type: metric", Call("weather", {"city": "Paris", "metric": 1})),
    ("wrong type: amount", Call("rate", {"amount": math.nan})), ("wrong type: amount", Call("rate", {"amount": ""})),
    ("wrong type: tags", Call("rate", {"amount": 1, "tags": "a"})),
    ("wrong type: tags", Call("rate", {"amount": 1, "tags": {"a": 1}})),
    ("wrong type: more", Call("rate", {"amount": 1, "more": "[1]"})),
])
def test_check_call_names_the_first_thing_that_breaks_the_schema(reason, call):
    assert check_call(call, TOOLS) == reason


# --- Comparing -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("type_, same", [
    ("integer", ["5", 5, 5.0, " 5.0 ", "5e0", "50e-1"]), ("float", [2.5, "2.5", "2.50"]),
    ("int", [10 ** 5000, 10 ** 5000]),
    ("boolean", [True, "true", "True "]), ("bool", [False, "false"]),
    ("string", ["é ", "e\u0301"]), ("str", ["2", 2, 2.0]), ("string", ["true", True]), ("str", [0.1, "0.1"]),
    ("list", [["a", 1], "['a', 1]", '["a", "1"]', "['a', 1.0]"]),
    ("list[dict]", [[{"a": 1, "b": 2}], "[{'b': 2, 'a': 1}]"]),
    ("object", [{"a": True}, '{"a": true}', "{'a': True}", '{"a": "true"}']),
    (None, ["5", 5, 5.0]), ("Union[int, str]", ["5", 5]), ("number", [math.nan, float("nan"), "nan"]),
    ("number", ["1e999", "10e998"]), ("number", ["1e" + "9" * 30] * 2),
    ("number", [-0.0, 0, "-0"]), (None, [None]), ("number", ["ten", " ten"]),
])
def test_values_that_are_the_same_by_the_declared_type(type_, same):
    schema = {"type": type_} if type_ else {}
    assert all(equal_values(a, b, schema) for a in same for b in same)


@pytest.mark.parametrize("type_, a, b", [
    ("integer", 1, True), (None, 1, True), (None, 0, False), ("boolean", 1, True), ("string", "1", True),
    (None, "1", True),
    ("number", 1.5, 1), ("integer", 1.9, 1), ("number", "1.5", "15"), ("string", "1.5", "15"), (None, "1.5", "15"),
    ("string", "5", "5.0"), ("string", "Paris", "paris"), ("string", "a, b", "a b"), ("string", "a b", "a  b"),
    ("number", 0.1, 0.1 + 1e-17 * 2), ("number", 2 ** 53, 2 ** 53 + 1), ("number", "1e999", "1e998"), (None, "007", 7),
    ("list", ["a", "b"], ["b", "a"]), ("list", ["a"], ["a", "a"]), ("list", ["a"], "a"), ("string", ["a"], "['a']"),
    ("object", {"a": 1}, {"a": 2}), ("object", {"a": 1}, {"a": 1, "b": 1}), ("object", {}, []), ("list", "[", "[["),
    (None, None, ""), ("string", "None", None), ("list", [1], [True]),
    ("list", {"a": 1}, '{"a": 1}'), ("object", {"a": 0}, {"a": False}),
])
def test_values_that_differ(type_, a, b):
    assert not equal_values(a, b, {"type": type_} if type_ else {})
    assert not equal_values(b, a, {"type": type_} if type_ else {})


@pytest.mark.parametrize("arguments", [
    {"city": "Paris", "days": None}, {"city": "Paris", "days": ""}, {"city": " Paris"},
    {"city": "Paris", "metric": True},
    {"city": "Paris", "metric": "true"}, {"city": "Paris", "metric": None}, {"metric": "", "city": "Paris"}])
def test_empty_means_absent_and_absent_means_the_default(arguments):
    assert verdict([Call("weather", arguments)], PARIS).exact
    assert verdict([PARIS], Call("weather", arguments)).exact


def test_empty_means_absent_only_where_the_tool_has_the_argument_and_does_not_require_it():
    assert verdict([Call("weather", {"city": "Paris", "wind": ""})], PARIS).reason == "extra argument: wind"
    assert verdict([Call("weather", {})], Call("weather", {"city": ""})).reason == "missing argument: city"
    assert verdict([Call("weather", {"city": "Paris", "metric": False})], PARIS).reason == "wrong value: metric"


def test_what_no_schema_describes_is_compared_all_the_same():
    wind, other = Call("weather", {"city": "Paris", "wind": "5"}), Call("weather", {"city": "Paris", "wind": 5})
    assert verdict([wind], other).exact
    assert verdict([Call("gone", {"a": "5"})], Call("gone", {"a": 5.0})).exact
    assert not verdict([Call("gone", {"a": 1})], Call("gone", {"a": True})).exact


def test_a_vote_is_a_count_of_keys():
    answers = [(PARIS, OSLO), (OSLO, PARIS), (PARIS,), (PARIS, PARIS)]
    assert Counter(calls_key(a, TOOLS) for a in answers).most_common(1)[0][1] == 2
    assert call_key(PARIS, TOOLS) == call_key(Call("weather", {"city": "Paris", "days": ""}), TOOLS)


def test_comparing_does_not_recurse_without_end():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert equal_values(deep, deep, {"type": "list"}) and not equal_values(deep, [], {"type": "list"})


# --- Scoring: each case is one that a published scorer gets wrong ----------------------------------------------------

def test_the_right_call_three_times_is_not_exact_and_no_f1_rises_above_one():
    v = verdict([PARIS] * 3, PARIS)
    assert (v.exact, v.reason, v.name_f1, v.argument_f1) == (False, "wrong number of calls: 3 for 1", 0.5, 0.5)
    assert not v.name_correct


def test_two_calls_of_one_tool_are_exact_in_either_order():
    v = verdict([OSLO, PARIS], PARIS, OSLO)
    assert v.exact and v.strict and v.name_f1 == v.argument_f1 == 1.0
    assert verdict([OSLO, OSLO], PARIS, OSLO).reason == "wrong value: city"


def test_a_call_without_arguments_scores_one_and_never_two():
    v = exact_match('<tool_call>{"name": "now"}</tool_call>', sample(Call("now")))
    assert (v.exact, v.strict, v.name_f1, v.argument_f1, v.recovery) == (True, False, 1.0, 1.0, "other keys")


def test_booleans_are_no_numbers_and_floats_are_not_cut():
    for wrong in (1, "1", 1.5):
        assert not verdict([Call("rate", {"amount": 2, "any": wrong})], Call("rate", {"amount": 2, "any": True})).exact
    assert verdict([Call("rate", {"amount": 2.9})], Call("rate", {"amount": 2})).reason == "wrong value: amount"
    assert verdict([Call("rate", {"amount": "1.5"})], Call("rate", {"amount": "15"})).reason == "wrong value: amount"


@pytest.mark.parametrize("reason, predicted", [
    ("", [PARIS, Call("now")]), ("unparsable", []), ("wrong number of calls: 1 for 2", [PARIS]),
    ("wrong name: rate for weather", [Call("rate", {"amount": 1}), Call("now")]),
    ("wrong name: weather for now", [PARIS, PARIS]),
    ("missing argument: city", [Call("weather"), Call("now")]),
    ("extra argument: days", [Call("weather", {"city": "Paris", "days": 1}), Call("now")]),
    ("wrong value: city", [OSLO, Call("now")])])
def test_the_reason_is_the_first_thing_wrong(reason, predicted):
    v = verdict(predicted, PARIS, Call("now"))
    assert (v.reason, v.exact, v.parsed) == (reason, reason == "", bool(predicted))
    assert v.name_correct == (reason.split(":")[0] not in ("unparsable", "wrong number of calls", "wrong name"))


def test_the_reason_is_told_by_the_nearest_call_of_the_name():
    gold = [Call("rate", {"amount": 1, "any": "x"}), Call("rate", {"amount": 2, "any": "y"})]
    predicted = [Call("rate", {"amount": 9}), Call("rate", {"amount": 1, "any": "z"})]
    assert verdict(predicted, *gold).reason == "wrong value: any"


def test_strict_is_exact_without_any_coercion():
    gold = Call("weather", {"city": "Paris", "days": 5})
    assert verdict([Call("weather", {"days": 5, "city": "Paris"})], gold).strict
    for days in ("5", 5.0):
        v = verdict([Call("weather", {"city": "Paris", "days": days})], gold)
        assert v.exact and not v.strict
    v = exact_match("Here you are: " + call_text([gold]), sample(gold))
    assert v.exact and not v.strict and v.recovery == "surrounding text"


def test_partial_credit_counts_names_and_values_one_to_one():
    predicted, gold = Call("weather", {"city": "Paris", "days": 2}), Call("weather", {"city": "Paris", "days": 3})
    v = verdict([predicted, Call("now")], gold)
    assert v.name_f1 == pytest.approx(2 / 3)
    assert v.argument_f1 == pytest.approx(2 * 2 / 6)            # city and the default of metric, of three and three
    assert verdict([], PARIS).name_f1 == verdict([], PARIS).argument_f1 == 0.0
    assert f1([], []) == 1.0 and f1("aaa", "a") == 0.5


def test_reachable_means_that_every_gold_tool_is_offered():
    assert reachable(sample(PARIS, Call("now"))) and not reachable(sample(PARIS, Call("gone")))


# --- For any input ---------------------------------------------------------------------------------------------------

def nested(scalars):
    keys = st.text(max_size=3)
    return st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=6)


REAL = st.floats(allow_nan=False, allow_infinity=False)
FINITE = nested(st.none() | st.booleans() | st.integers() | REAL | st.text())
VALUES = nested(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
    ["", " ", "5", "5.0", 5, 5.0, "true", True, "1e999", "nan", "[1]", "['a']", '{"a": 1}', "[" * 99, "é"]))
TYPES = st.sampled_from(["string", "integer", "float", "boolean", "list(str)", "object", "Union[int, str]", None])
NAMES, ARGUMENTS = ["weather", "rate", "now", "gone"], ["city", "days", "metric", "amount", "tags", "more", "any", "x"]
CALLS = st.builds(Call, st.sampled_from(NAMES), st.dictionaries(st.sampled_from(ARGUMENTS), VALUES, max_size=3))
EDITS = st.tuples(st.integers(0, 120), st.integers(0, 6), st.text(alphabet="{}[]()\"'\\,:=-$ <a1\0\n", max_size=3))
many = settings(max_examples=100, deadline=None)


@many
@given(st.text(st.characters(), max_size=60) | st.text(alphabet="{}[]()<>\"'\\,:=-.$`ftn1 \n", max_size=60))
def test_any_text_can_be_read(text):
    parsed = parse_calls(text)
    assert (parsed.recovery == "") == parsed.strict and (parsed.recovery == "unparsable") == (not parsed.calls)
    json.dumps([c.arguments for c in parsed.calls], allow_nan=False, ensure_ascii=False).encode()


@many
@given(st.sampled_from([BLOCK, f"{BLOCK}\n{BLOCK}", f"[{ONE}]", "f(a=[1, {'b': \"c\"}], d=-2.5)"]),
       st.lists(EDITS, max_size=4))
def test_a_damaged_answer_can_be_read_or_is_unparsable(text, edits):
    for start, length, new in edits:
        text = text[:start] + new + text[start + length:]
    assert len(parse_calls(text).calls) <= 4
    assert 0.0 <= exact_match(text, sample(PARIS)).argument_f1 <= 1.0


@many
@given(st.lists(st.builds(Call, st.text(min_size=1), st.dictionaries(st.text(), FINITE, max_size=3)),
                min_size=1, max_size=3))
def test_an_answer_in_the_form_asked_for_is_read_as_it_was_written(calls):
    assert parse_calls(call_text(calls)) == Parsed(tuple(calls), True, "")


@many
@given(VALUES, VALUES, VALUES, TYPES)
def test_equality_is_reflexive_symmetric_and_transitive(a, b, c, type_):
    schema = {"type": type_}
    assert equal_values(a, a, schema)
    assert equal_values(a, b, schema) == equal_values(b, a, schema)
    assert not (equal_values(a, b, schema) and equal_values(b, c, schema)) or equal_values(a, c, schema)


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
    v = verdict(predicted, *gold)
    assert 0.0 <= v.name_f1 <= 1.0 and 0.0 <= v.argument_f1 <= 1.0
    assert v.exact == (v.reason == "") == equal_calls(parse_calls(call_text(predicted)).calls, gold, TOOLS)
    assert not v.strict or v.exact
    assert not v.exact or (v.parsed and v.name_correct and v.name_f1 == v.argument_f1 == 1.0)


@pytest.mark.skipif("TTSI_DATA" not in os.environ, reason="needs the benchmarks' files in the folder $TTSI_DATA")
@pytest.mark.parametrize("bench", data.PUBLISHED)
def test_the_gold_calls_of_the_benchmarks_are_exact_and_strict(bench):
    for real in data.load(bench, os.environ["TTSI_DATA"]):
        v = exact_match(call_text(real.answers), real)
        assert v.exact and v.strict and v.name_correct and v.name_f1 == v.argument_f1 == 1.0, real.id
        assert not exact_match(call_text(real.answers * 2), real).exact, real.id
