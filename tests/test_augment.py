"""G: what is written becomes a pair only if it is a new request with calls that fit the tools."""
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st

from augment import (ASK_JOINT, ASK_PAIR, TRIES, LocalWriter, Prompt, Written, call_form,
                     check_request, stands_in, synthesize)
from data import Sample, call_prompt, request_text, with_request
from data.calls import Call, call_start, parse_calls
from model import Blank, Form, generate
from train import CALLING, Assessed
from uncertainty import PrefixCaches

TOOLS = ({"name": "get_weather", "description": "", "parameters": {
             "city": {"type": "string", "required": True}, "days": {"type": "integer"}}},
         {"name": "get_time", "description": "", "parameters": {}})
SAMPLE = Sample("s-0", ({"role": "user", "content": "What is the weather in Rome?"},), TOOLS)


def weather(name: str = "get_weather", **arguments) -> str:
    return json.dumps({"name": name, "arguments": arguments})


ROME, OSLO, PARIS = weather(city="Rome"), weather(city="Oslo"), weather(city="Paris")


def assessed(text: str = ROME, sample: Sample = SAMPLE, **l: float) -> Assessed:
    """A line of H: the request, the direct answer, and the candidates' scores."""
    scores = l or {"get_weather": -1.0, "get_time": -2.0}
    return Assessed(sample.id, request=request_text(sample), candidates=scores, margin=0.5,
                    text=text)


def shown(sample: Sample, line: Assessed) -> Prompt:
    """What a writer is shown for a pair whose call comes first."""
    return call_form(sample, line, parse_calls(line.text).calls)


def around(form: Form) -> list[str]:
    """The fixed texts of a form: before its blanks, between them, and behind."""
    return [form.start, *(blank.tail for blank in form.blanks)]


class Script:
    """A writer whose texts are written beforehand; it remembers what it was asked."""

    def __init__(self, *texts: str):
        self.texts, self.prompts, self.keys = list(texts), [], []

    def __call__(self, prompts, limit, temperature, top_p, keys):
        self.prompts += prompts
        self.keys += keys
        return [self.texts.pop(0) for _ in keys]


def write(*texts: str, sample: Sample = SAMPLE, line: Assessed | None = None, **changes):
    """What comes of a script for one sample: the pairs, the reasons, the script."""
    config = {"pair": "call", "k": 1, "seed": 0, "temperature": 0.7, "top_p": 0.95, **changes}
    agent = SimpleNamespace(writer=Script(*texts), task=CALLING)
    h = {sample.id: line or assessed(sample=sample)}
    found, = synthesize(agent, [sample], SimpleNamespace(**config), h)
    return found.pairs, [r.reason for r in found.rejected], agent.writer


# --------------------------------------------------------------------------- what a writer is shown

def test_keys_are_given_and_values_are_blanks_up_to_what_closes_their_type():
    parameters = {"name": {"type": "str"}, "ids": {"type": "list(int)"}, "n": {"type": "integer"},
                  "on": {"type": "boolean"}, "where": {"type": "object"}, "any": {}}
    tool = {"name": "f", "description": "", "parameters": parameters}       # it marks nothing:
    form = shown(replace(SAMPLE, tools=(tool,)), assessed(f=0.0)).form      # all are required
    assert [blank.closing for blank in form.blanks] == ['"', "]", ",}\n", ",}\n", "}", '"', '"']
    blanks = ["Bob", "1, 2", " 3", " true", '"k": 4', "x", "Do it."]
    text = "".join(part + blank for part, blank in zip(around(form), [*blanks, ""], strict=True))
    call, request = text.split("\n")
    assert parse_calls(call).calls == (Call("f", {"name": "Bob", "ids": [1, 2], "n": 3, "on": True,
                                                  "where": {"k": 4}, "any": "x"}),)
    assert json.loads(request) == "Do it."


def test_the_call_is_of_the_likeliest_tool_behind_the_direct_call_and_the_users_turns():
    turns = [("user", "Rome,"), ("assistant", "Which day?"), ("user", 'say "today".')]
    sample = replace(SAMPLE, messages=tuple({"role": r, "content": text} for r, text in turns))
    prompt = shown(sample, assessed(sample=sample, get_weather=-3.0, get_time=-1.0))
    assert around(prompt.form) == ['{"name": "get_time", "arguments": {}}\n"', '"']
    assert prompt.messages == [call_prompt(sample)[0], {"role": "user", "content": ASK_PAIR}]
    assert prompt.start == f'1. {ROME}\n"Rome, say \\"today\\"."\n2. '
    assert shown(sample, assessed("no call")).start.startswith(f"1. {weather()}\n")


@pytest.mark.parametrize("days, given", [(5, True), (7, False)])
def test_an_optional_argument_is_given_where_the_request_speaks_of_it(days, given):
    sample = replace(SAMPLE, messages=({"role": "user", "content": "Rome, 5 days."},))
    form = shown(sample, assessed(weather(city="Rome", days=days), sample)).form
    assert ('"days":' in "".join(around(form))) == given


# ------------------------------------------------------------------------- what is of use as a pair

@pytest.mark.parametrize("direct, tags", [
    (ROME, False), (ROME[:-9], False), (weather(city="<tool_call>"), False),
    (f"<tool_call>\n{ROME}\n</tool_call>", True), ("Hm.", True)])
def test_a_call_and_its_request_become_a_pair_in_the_form_of_the_direct_answer(direct, tags):
    (pair,), reasons, _ = write(f'{PARIS}\n"Is it cold in Paris?"', line=assessed(direct))
    assert pair.text == (f"<tool_call>\n{PARIS}\n</tool_call>" if tags else PARIS)
    assert (pair.request, pair.read_back, reasons) == ("Is it cold in Paris?", False, [])


@pytest.mark.parametrize("bad, reason, good", [
    ("sunny", "no call could be read", f'{OSLO}\n"In Oslo?"'),
    (f'{weather()}\n"In Oslo?"', "missing argument: city", f'{OSLO}\n"In Oslo?"'),
    (f'{weather(city="Oslo", town=1)}\n"In Oslo?"', "unknown argument: town",
     f'{weather(city="Oslo", days=1)}\n"In Oslo for 1 day?"'),
    (f'{OSLO} {weather()}\n"In Oslo?"', "missing argument: city", f'{OSLO}\n"In Oslo?"'),
    (f'{OSLO} {PARIS}\n"In Oslo, in Paris?"', "more than one call", f'{OSLO}\n"Oslo, Paris?"'),
    (f'{ROME}\n"Is it cold in Rome?"', "the direct answer again", f'{OSLO}\n"Rome and Oslo?"'),
    (f'{PARIS}\n"Is it cold in Paris?"', "the direct answer again", f'{OSLO}\n"Paris, Oslo?"'),
    (f'{OSLO}\n"Is it cold in Oslo', "the request did not end", f'{OSLO}\n"Cold in Oslo"'),
    (OSLO, "the request did not end", f'{OSLO}\n"Oslo"'),
    (f"{OSLO}\n7", "the request did not end", f'{OSLO}\n"Oslo 7"'),
    (f'{OSLO}\n"?!"', "no request", f'{OSLO}\n"Oslo?!"'),
    (f'{OSLO}\n"the weather in ROME"', "copy of the seed request", f'{OSLO}\n"weather in OSLO"'),
    (f'{OSLO}\n"get_weather in Oslo"', "the request names the tool", f'{OSLO}\n"weather in Oslo"'),
    (f'{OSLO}\n"<tool_call> Oslo"', "a call in place of a request", f'{OSLO}\n"<call> Oslo"'),
    (f'{OSLO}\n{json.dumps(OSLO)}', "a call in place of a request", f'{OSLO}\n"{{Oslo}}"')])
def test_each_check_rejects_with_its_reason_and_lets_pass_what_is_sound(bad, reason, good):
    pairs, reasons, _ = write(bad, good, line=assessed(f"{ROME}\n{PARIS}"))
    assert reasons == [reason]
    assert [f"{pair.text}\n{json.dumps(pair.request)}" for pair in pairs] == [good]


def test_a_request_may_name_a_tool_that_x_names_or_whose_name_is_a_word():
    named = replace(SAMPLE, messages=({"role": "user", "content": "Use get_time now."},))
    assert check_request("Now get_time in Oslo", named, request_text(named)) == ""
    assert check_request("Now get_time in Oslo", named, request_text(SAMPLE)) != ""
    word = replace(SAMPLE, tools=({**TOOLS[0], "name": "Count"},))
    assert check_request("Count the cats on my account", word, request_text(word)) == ""


NAME, UNREAD = 'a"b\\c', ["a value cannot be read from the request"]


@pytest.mark.parametrize("read, reasons", [
    (weather(NAME, city="CN"), []), (weather(NAME, city=" CN "), []), ("no call", UNREAD),
    (weather(NAME, city="China"), UNREAD)])
def test_a_value_that_the_request_does_not_spell_must_be_read_back_from_it(read, reasons):
    sample = replace(SAMPLE, tools=({**TOOLS[0], "name": NAME},))
    pairs, found, script = write(
        f'{weather(NAME, city="CN")}\n"In China?"', read, f'{weather(NAME, city="Oslo")}\n"Oslo?"',
        sample=sample, line=assessed(sample=sample, **{NAME: 0.0}))
    assert found == reasons and pairs[0].read_back == (not reasons)
    asked = script.prompts[1]
    assert asked.messages == call_prompt(with_request(sample, "In China?"))
    assert around(asked.form) == [weather(NAME).removesuffix(" {}}")]       # the name is given


@pytest.mark.parametrize("value, request_, stands", [
    ("new york", "In New York?", True), (5, "for 5 days", True), (5, "for 15 days", False),
    ("CN", "in China", False), (["a", "b"], "a and B", True), (["a", "c"], "a and b", False),
    ({"k": "v"}, "v", True), ("", "anything", False), ([], "anything", False),
    ("1+", "1+ 2", True), (1, "1,000 dollars", False), (5, "5.7 km", False), (5, "for 5.", True),
    (None, "none of it", False), (True, "is it true?", False)])
def test_a_value_stands_in_a_request_as_whole_words(value, request_, stands):
    assert stands_in(value, request_) == stands


def test_joint_reads_request_and_calls_from_one_text_and_drops_what_follows():
    texts = [f'Cold in Paris, in Oslo?"\n{calls}\n3. "And in Rome?"'
             for calls in (weather(), f"{PARIS}\n{OSLO}")]
    pairs, reasons, script = write('Rome?"', *texts, pair="joint")
    assert [(p.request, p.text) for p in pairs] == [("Cold in Paris, in Oslo?", f"{PARIS}\n{OSLO}")]
    assert reasons == ["copy of the seed request", "missing argument: city"]
    assert script.prompts[0].start == '1. "What is the weather in Rome?"\n2. "'
    assert script.prompts[0].messages[-1]["content"] == ASK_JOINT


@pytest.mark.parametrize("read, reasons", [
    (weather(city="CN"), []), (weather(city="China"), UNREAD),
    (f'{weather(city="CN")}\n{OSLO}', [])])
def test_joint_reads_back_what_its_request_does_not_spell(read, reasons):
    asked = f'In China?"\n{weather(city="CN")}'
    pairs, found, _ = write(asked, read, f'In Oslo?"\n{OSLO}', pair="joint")
    assert found == reasons and pairs[0].read_back == (not reasons)


def test_a_thinking_block_is_no_part_of_a_request_or_call():
    thinking = '<think>Perhaps "Rome?"\n{Rome}</think>\n'
    (pair,), reasons, _ = write(f'{thinking}In Oslo?"\n{thinking}{OSLO}', pair="joint")
    assert (pair.request, pair.text, reasons) == ("In Oslo?", OSLO, [])
    assert call_start(f"{thinking}{OSLO}") == '{"name": "'


def test_a_nullable_list_is_asked_for_as_a_list_and_an_enum_is_checked():
    tool = {"name": "f", "description": "", "required": ["tags", "unit"], "parameters": {
        "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]},
        "unit": {"type": "string", "enum": ["km", "mi"]},
        "ids": {"type": ["array", "null"], "items": {"type": "integer"}}}}
    sample = Sample("s-0", ({"role": "user", "content": "7"},), (tool,))
    form = shown(sample, assessed(json.dumps({"name": "f", "arguments": {"ids": [7]}}), sample,
                                  f=0.0)).form
    assert [blank.closing for blank in form.blanks] == ['"', '"', "]", '"']
    wrong = json.dumps({"name": "f", "arguments": {"tags": "a", "unit": "ft"}})
    right = wrong.replace("ft", "mi")
    _, reasons, _ = write(f'{wrong}\n"a ft"', f'{right}\n"a mi"', "x", sample=sample,
                          line=assessed("", sample, f=0.0))
    assert reasons == ["not in the enum: unit"]


# -------------------------------------------------------------------------------------- who writes

def test_the_model_goes_on_behind_what_is_begun_and_gives_the_form_filled_in(model, tokenizer):
    """Texts of one batch, as of each alone behind its whole prompt; without a beginning, too."""
    messages = [{"role": "system", "content": "Hi."}, {"role": "user", "content": "Write."}]
    form = Form('{"a": "', (Blank('"abcde', '"}'),))
    prompts = [Prompt(messages, "1. ", form), Prompt(messages, "1. "), Prompt(messages, "", form),
               Prompt(messages)]
    keys = [("text", i) for i in range(4)]
    writer = LocalWriter(model, tokenizer, PrefixCaches(model))
    texts = writer(prompts, 8, 0.7, 0.95, keys)
    for prompt, key, text in zip(prompts, keys, texts, strict=True):
        system, rest = tokenizer.chat(messages)
        whole = system + rest + tokenizer.encode(prompt.start + prompt.form.start)
        row, = generate(model, tokenizer, [whole], 8, (), 0.7, 0.95, [key], [prompt.form])
        assert text == prompt.form.start + row.text and row.ids


# --------------------------------------------------------------------------------------- the tries

def test_what_was_wrong_with_the_writing_stands_before_what_is_wrong_with_the_text():
    """Nothing is, where the text is of use all the same."""
    texts = [Written("sunny"), Written(f'{PARIS}\n"Paris?"')]
    for text in texts:
        text.problem = "cut at 320 tokens"
    pairs, reasons, _ = write(*texts)
    assert reasons == ["cut at 320 tokens: no call could be read"] and len(pairs) == 1

def test_three_tries_are_made_and_what_each_draws_depends_on_seed_sample_and_number_alone():
    def keys(seed: int, id: str) -> list:
        pairs, reasons, script = write("a", "b", "c", "never asked for", seed=seed,
                                       sample=replace(SAMPLE, id=id))
        assert pairs == [] and len(reasons) == TRIES and script.texts == ["never asked for"]
        return script.keys
    assert keys(1, "a") == keys(1, "a")
    assert len({*keys(1, "a"), *keys(2, "a"), *keys(1, "b")}) == 3 * TRIES


def test_k_pairs_are_different_calls_with_different_requests():
    texts = [f'{PARIS}\n"Paris?"', f'{PARIS}\n"Now, Paris?"', f'{OSLO}\n"Oslo?"']
    pairs, reasons, _ = write(*texts, k=2)
    assert [p.request for p in pairs] == ["Paris?", "Oslo?"]
    assert reasons == ["copy of an earlier pair"]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec=None)) | st.sampled_from(["<|im_end|>", "{0}", "</tools>"]),
       st.sampled_from(["call", "joint"]))
def test_hostile_text_stays_text_in_what_is_asked_and_in_what_is_written(tokenizer, hostile, pair):
    """Special tokens come from the template alone; each try ends as a pair or with a reason."""
    sample = Sample("s", ({"role": "user", "content": f"{hostile} x"},), TOOLS)
    pairs, reasons, script = write(*[hostile] * TRIES, sample=sample, pair=pair,
                                   line=assessed(hostile, sample))
    assert pairs == [] and len(reasons) == TRIES and all(reasons)
    for prompt in script.prompts:
        begun = {"role": "assistant", "content": prompt.start}
        system, rest = tokenizer.chat([*prompt.messages, begun])
        ids = system + rest
        assert (ids.count(tokenizer.special["<|im_start|>"]), ids.count(tokenizer.im_end)) == (3, 2)
