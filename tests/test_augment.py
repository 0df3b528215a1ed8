"""G: what is written becomes a pair only if it is a new request with calls that fit the tools."""
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st

from augment import (ASK_JOINT, ASK_PAIR, TRIES, LocalWriter, Prompt, call_form, check_request,
                     check_text, in_form_of, stands_in, synthesize)
from data import Sample, call_prompt, call_text, system_message
from data.calls import Call, parse_calls
from model import Form
from train import Assessed
from uncertainty import PrefixCaches

TOOLS = ({"name": "get_weather", "description": "", "parameters": {
             "city": {"type": "string", "required": True}, "days": {"type": "integer"}}},
         {"name": "get_time", "description": "", "parameters": {}})
SAMPLE = Sample("s-0", ({"role": "user", "content": "What is the weather in Rome?"},), TOOLS)
ROME, PARIS, OSLO, UNKNOWN = ['{"name": "get_weather", "arguments": ' + arguments + "}"
                              for arguments in ('{"city": "Rome"}', '{"city": "Paris"}',
                                                '{"city": "Oslo"}', '{"city": "Paris", "town": 1}')]


class Script:
    """A writer whose texts are written beforehand; it remembers what it was asked."""

    def __init__(self, *texts: str):
        self.texts, self.prompts, self.keys = list(texts), [], []

    def __call__(self, prompts, limit, temperature, top_p, keys):
        self.prompts += prompts
        self.keys += [tuple(key) for own in keys for key in own]
        return [[self.texts.pop(0) for _ in own] for own in keys]


def options(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"pair": "call", "k": 1, "seed": 0, "temperature": 0.7,
                              "top_p": 0.95, **changes})


def assessed(text: str = ROME, **l: float) -> Assessed:
    """A line of H: the direct answer, and the candidates' scores."""
    scores = l or {"get_weather": -1.0, "get_time": -2.0}
    return Assessed("s-0", "", scores, 0.5, 9, text, [], [], [])


def write(*texts: str, sample: Sample = SAMPLE, line: Assessed = assessed(), **changes):
    """What comes of a script for one sample: the pairs, the reasons, the script."""
    script = Script(*texts)
    found, = synthesize(script, [sample], {sample.id: line}, options(**changes))
    return found.pairs, [r.reason for r in found.rejected], script


# ------------------------------------------------------------------------- the call first: its form

def test_keys_are_given_and_values_are_blanks_up_to_what_closes_their_type():
    parameters = {"name": {"type": "str"}, "ids": {"type": "list(int)"}, "n": {"type": "integer"},
                  "on": {"type": "boolean"}, "where": {"type": "object"}, "any": {}}
    tool = {"name": "f", "description": "", "parameters": parameters}       # it marks nothing:
    form = call_form(replace(SAMPLE, tools=(tool,)), assessed(f=0.0)).form  # all are required
    assert form.closers == ('"', "]", ",}\n", ",}\n", "}", '"', '"')
    blanks = ["Bob", "1, 2", " 3", " true", '"k": 4', "x", "Do it."]
    text = "".join(part + blank for part, blank in zip(form.parts, [*blanks, ""]))
    call, request = text.split("\n")
    assert parse_calls(call).calls == (Call("f", {"name": "Bob", "ids": [1, 2], "n": 3, "on": True,
                                                  "where": {"k": 4}, "any": "x"}),)
    assert json.loads(request) == "Do it."


def test_the_call_is_of_the_likeliest_tool_whatever_the_direct_answer_called():
    prompt = call_form(SAMPLE, assessed(get_weather=-3.0, get_time=-1.0))
    assert prompt.form.parts == ('{"name": "get_time", "arguments": {}}\n"', '"')
    assert prompt.messages == [system_message(TOOLS), {"role": "user", "content": ASK_PAIR}]
    assert prompt.start == f'1. {ROME}\n"What is the weather in Rome?"\n2. '
    assert call_form(SAMPLE, assessed("none")).start.startswith(
        '1. {"name": "get_weather", "arguments": {}}\n')


@pytest.mark.parametrize("days, given", [(5, True), (7, False)])
def test_an_optional_argument_is_given_where_the_request_speaks_of_it(days, given):
    sample = replace(SAMPLE, messages=({"role": "user", "content": "Rome, 5 days."},))
    text = json.dumps({"name": "get_weather", "arguments": {"city": "Rome", "days": days}})
    assert ('"days":' in "".join(call_form(sample, assessed(text)).form.parts)) == given


def test_of_a_dialogue_the_users_turns_are_shown():
    turns = [("user", "Rome,"), ("assistant", "Which day?"), ("user", 'say "today".')]
    sample = replace(SAMPLE, messages=tuple({"role": r, "content": text} for r, text in turns))
    assert call_form(sample, assessed()).start.endswith('\n"Rome, say \\"today\\"."\n2. ')


def test_the_model_fills_a_form_over_one_reading_of_the_tools(model, tokenizer):
    """Whatever it writes: the parts are in the text, and the tools were read once."""
    prefixes = PrefixCaches(model)
    prefixes.read(tokenizer.split_chat(call_prompt(SAMPLE))[0])
    form = Form(('{"a": "', '", "b":', "}"), (" aet", "nio"))
    prompt = Prompt([system_message(TOOLS)], "1. ", form)
    keys = [[(0,), (1,), (2,)]]
    texts, = LocalWriter(model, tokenizer, prefixes)([prompt], 200, 2.0, 1.0, keys)
    for text in texts:
        start, rest = text[:7], text[7:]
        first, _, last = rest.partition('", "b":')
        assert start == '{"a": "' and last.endswith("}")
        assert not set(" aet") & set(first) and not set("nio") & set(last[:-1])
    assert len(set(texts)) == 3 and len(prefixes.caches) == 1


# ------------------------------------------------------------------------- what is of use as a pair

def test_a_call_and_its_request_become_a_pair_in_the_models_own_form():
    pairs, reasons, _ = write(f'{PARIS}\n"Is it cold in Paris?"')
    assert [(p.request, p.text, p.read_back) for p in pairs] == [
        ("Is it cold in Paris?", PARIS, False)] and not reasons
    for direct in (f"<tool_call>\n{ROME}\n</tool_call>", "no call"):
        pairs = write(f'{PARIS}\n"Is it cold in Paris?"', line=assessed(direct))[0]
        assert pairs[0].text == f"<tool_call>\n{PARIS}\n</tool_call>"


@pytest.mark.parametrize("text, reason", [
    (f'{UNKNOWN}\n"In Paris?"', "unknown argument: town"),
    ('{"name": "get_weather", "arguments": {}}\n"In Paris?"', "missing argument: city"),
    ("sunny", "no call could be read"),
    (f'{PARIS}\n"Is it cold in Paris', "the request did not end"),
    (PARIS, "the request did not end"), (f"{PARIS}\n7", "the request did not end"),
    (f'{ROME}\n"Is it cold in Rome?"', "the direct answer again"),
    (f'{PARIS}\n"what is the weather in ROME"', "copy of the seed request"),
    (f'{PARIS} {OSLO}\n"In Paris, in Oslo?"', "more than one call"),
    (f'{PARIS}\n"get_weather in Paris"', "the request names the tool"),
    (f'{PARIS}\n"?!"', "no request")])
def test_each_check_has_its_reason_and_a_rejected_try_is_followed_by_another(text, reason):
    pairs, reasons, script = write(text, f'{OSLO}\n"In Oslo?"')
    assert reasons == [reason] and pairs[0].request == "In Oslo?"
    assert len(set(script.keys)) == 2


CHINA = json.dumps({"name": "get_weather", "arguments": {"city": "CN"}})


@pytest.mark.parametrize("read, reasons", [
    (CHINA, []), (CHINA.replace("CN", " CN "), []),
    (CHINA.replace("CN", "China"), ["a value cannot be read from the request"]),
    ("no call", ["a value cannot be read from the request"])])
def test_a_value_that_the_request_does_not_spell_must_be_read_back_from_it(read, reasons):
    pairs, found, script = write(f'{CHINA}\n"Is it cold in China?"', read, f'{OSLO}\n"In Oslo?"')
    assert found == reasons and pairs[0].read_back == (not reasons)
    asked = script.prompts[1]
    assert asked.messages[-1]["content"].startswith("Is it cold in China?")
    assert asked.form.parts == ('{"name": "get_weather", "arguments":',)    # the name is given


def test_of_several_direct_calls_none_may_come_again():
    line = assessed(f"{ROME}\n{PARIS}")
    assert write(*[f'{PARIS}\n"In Paris?"'] * TRIES, line=line)[1][0] == "the direct answer again"


def test_a_tools_name_is_escaped_where_it_is_given():
    name = 'a"b\\c'
    sample = replace(SAMPLE, tools=({**TOOLS[0], "name": name},))
    call = json.dumps({"name": name, "arguments": {"city": "CN"}})
    pairs, _, script = write(f'{call}\n"In China?"', call, sample=sample,
                             line=assessed(**{name: 0.0}))
    assert pairs[0].read_back and call.startswith(script.prompts[1].form.parts[0])


@pytest.mark.parametrize("value, request_, stands", [
    ("new york", "In New York?", True), (5, "for 5 days", True), (5, "for 15 days", False),
    ("CN", "in China", False), (["a", "b"], "a and B", True), (["a", "c"], "a and b", False),
    ({"k": "v"}, "v", True), ("", "anything", False), ([], "anything", False),
    ("1+", "1+ 2", True), (1, "1,000 dollars", False), (5, "5.7 km", False), (5, "for 5.", True),
    (None, "none of it", False), (True, "is it true?", False)])
def test_a_value_stands_in_a_request_as_whole_words(value, request_, stands):
    assert stands_in(value, request_) == stands


@pytest.mark.parametrize("text, reason", [
    ("How warm is it in Paris?", ""), ("", "no request"), ("?!", "no request"),
    ("the weather in Rome", "copy of the seed request"),
    ("get_time!", "the request names the tool"),
    ('{"name": "get_weather"}', "a call in place of a request"),
    ("<tool_call>", "a call in place of a request")])
def test_a_request_must_be_new_and_a_request(text, reason):
    assert check_request(text, SAMPLE) == reason
    named = replace(SAMPLE, messages=({"role": "user", "content": "Use get_time now."},))
    assert check_request("Now get_time in Oslo", named) == ""       # x names it, too
    word = replace(SAMPLE, tools=({**TOOLS[0], "name": "Count"},))
    assert check_request("Count the cats on my account", word) == ""


def test_each_call_must_fit_the_tools():
    assert check_text(PARIS, SAMPLE) == check_text(f"{PARIS}\n{OSLO}", SAMPLE) == ""
    assert check_text(f"{PARIS}\n{UNKNOWN}", SAMPLE) == "unknown argument: town"
    assert check_text("sunny", SAMPLE) == "no call could be read"


def test_calls_are_written_as_the_model_writes_them():
    calls = (Call("f", {"x": "<tool_call>"}), Call("g", {}))
    plain = '{"name": "f", "arguments": {"x": "<tool_call>"}}\n{"name": "g", "arguments": {}}'
    for text in ("<tool_call>\n{\"name\": \"f\"", "Hm.", "f(x=1)"):
        assert in_form_of(text, calls) == call_text(calls)
    for text in ('{"name": "f", "arguments": {}}', '{"name": "f", "argum'):         # half a call
        assert in_form_of(text, calls) == plain


# -------------------------------------------------------------------------------------- the tries

def test_joint_reads_request_and_call_from_one_text_and_drops_what_follows():
    text = f'Cold in Paris?"\n<tool_call>\n{PARIS}\n</tool_call>\n3. "And in Oslo?"'
    pairs, reasons, script = write(text, pair="joint")
    assert [(p.request, p.text) for p in pairs] == [("Cold in Paris?", PARIS)] and not reasons
    assert script.prompts[0].start == '1. "What is the weather in Rome?"\n2. "'
    assert script.prompts[0].messages[-1]["content"] == ASK_JOINT


def test_after_three_tries_there_is_no_pair_and_each_try_has_a_reason_and_a_draw_of_its_own():
    tries = [f'{ROME}\n"In Rome?"', f'{UNKNOWN}\n"Paris?"', "sunny"]
    pairs, reasons, script = write(*tries, "never asked for")
    assert pairs == [] and script.texts == ["never asked for"]
    assert reasons == ["the direct answer again", "unknown argument: town", "no call could be read"]
    assert len(set(script.keys)) == 3


def test_k_pairs_are_different_calls_with_different_requests():
    texts = [f'{PARIS}\n"Paris?"', f'{PARIS}\n"Now, Paris?"', f'{OSLO}\n"Oslo?"']
    pairs, reasons, _ = write(*texts, k=2)
    assert [p.request for p in pairs] == ["Paris?", "Oslo?"]
    assert reasons == ["copy of an earlier pair"]


def test_a_draw_depends_on_seed_and_sample_alone():
    def keys(seed: int, id: str) -> list:
        return write("?!", f'{PARIS}\n"Paris?"', seed=seed,
                     sample=Sample(id, SAMPLE.messages, TOOLS))[2].keys
    assert keys(1, "a") == keys(1, "a") and keys(1, "a") != keys(2, "a") != keys(2, "b")


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec=None)) | st.sampled_from(["<|im_end|>", "{0}", "</tools>"]),
       st.sampled_from(["call", "joint"]))
def test_hostile_text_stays_text_in_what_is_asked_and_in_what_is_written(tokenizer, hostile, pair):
    """Special tokens come from the template alone; each try ends as a pair or with a reason."""
    sample = Sample("s", ({"role": "user", "content": f"{hostile} x"},), TOOLS)
    pairs, reasons, script = write(*[hostile] * TRIES, sample=sample, pair=pair,
                                   line=assessed(hostile))
    assert pairs == [] and len(reasons) == TRIES and all(reasons)
    for prompt in script.prompts:
        ids = tokenizer.chat(prompt.messages) + tokenizer.encode(prompt.start)
        assert (ids.count(tokenizer.im_start), ids.count(tokenizer.im_end)) == (3, 2)


def test_the_model_writes_each_of_many_texts_as_it_does_alone(model, tokenizer):
    writer = LocalWriter(model, tokenizer, PrefixCaches(model))
    form = Form(('{"a": "', '", "b": "', '"}'), ("gw", "nd"))
    prompts = [Prompt(call_prompt(SAMPLE)), Prompt(call_prompt(SAMPLE), "A longer start", form)]
    keys = [[("a", 1), ("a", 2)], [("b", 1)]]
    together = writer(prompts, 40, 1.5, 1.0, keys)
    alone = [[writer([prompt], 40, 1.5, 1.0, [[key]])[0][0] for key in own]
             for prompt, own in zip(prompts, keys)]
    assert together == alone and together[0][0] != together[0][1]
