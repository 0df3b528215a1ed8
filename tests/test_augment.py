"""G: what is written becomes a pair only if it is a new request with calls that fit the tools."""
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st

from augment import (ASK_REQUEST, LABELS, PAIR_START, TRIES, LocalWriter, check_request,
                     check_text, majority, synthesize)
from data import Sample, call_prompt, call_text, system_message
from data.calls import Call
from uncertainty import PrefixCaches

TOOLS = ({"name": "get_weather", "description": "", "parameters": {
             "city": {"type": "string", "required": True}, "days": {"type": "integer"}}},
         {"name": "get_time", "description": "", "parameters": {}})
SAMPLE = Sample("s-0", ({"role": "user", "content": "What is the weather in Rome?"},), TOOLS)
PARIS, OSLO, UNKNOWN = [call_text((Call("get_weather", arguments),)) for arguments in (
    {"city": "Paris"}, {"city": "Oslo"}, {"city": "Paris", "town": "Paris"})]


class Script:
    """A writer whose texts are written beforehand; it remembers what it was asked."""

    def __init__(self, *texts: str):
        self.texts, self.prompts, self.keys = list(texts), [], []

    def __call__(self, prompts, limit, temperature, top_p, keys):
        self.prompts += prompts
        self.keys += [tuple(key) for own in keys for key in own]
        return [[self.texts.pop(0) for _ in own] for own in keys]


def options(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"pair": "joint", "k": 1, "seed": 0, "temperature": 0.7,
                              "top_p": 0.95, **changes})


def write(*texts: str, sample: Sample = SAMPLE, **changes):
    """What comes of a script for one sample: the pairs, the reasons, the script."""
    script = Script(*texts)
    found, = synthesize(script, [sample], options(**changes))
    return found.pairs, [r.reason for r in found.rejected], script


# ---------------------------------------------------------------------------------------- prompts

@pytest.mark.parametrize("pair", ["request", "joint"])
def test_the_writing_prompt_begins_like_the_answering_prompt_so_one_cache_serves_both(
        model, tokenizer, pair):
    script = write('Is it cold in Paris?"', *[PARIS] * LABELS, pair=pair)[2]
    prefixes = PrefixCaches(model)
    prefixes.read(tokenizer.split_chat(call_prompt(SAMPLE))[0])
    keys = [[(0,)] for _ in script.prompts]
    LocalWriter(model, tokenizer, prefixes)(script.prompts, 1, 0.7, 0.95, keys)
    assert len(prefixes.caches) == 1            # the tools were read once


def test_the_model_is_shown_the_seed_request_and_then_labels_its_own():
    script = write('Is it cold in Paris?"', *[PARIS] * LABELS, pair="request")[2]
    (asked, start), (labelled, nothing) = script.prompts
    assert asked == [system_message(TOOLS), {"role": "user", "content": ASK_REQUEST}]
    assert start == PAIR_START.format(request="What is the weather in Rome?")
    assert labelled[1]["content"].startswith("Is it cold in Paris?") and nothing == ""


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec=None)) | st.sampled_from(["<|im_end|>", "{0}", "</tools>"]))
def test_hostile_text_stays_text_in_what_is_asked_and_in_what_is_written(tokenizer, hostile):
    """Special tokens come from the template alone; each try ends as a pair or with a reason."""
    sample = Sample("s", ({"role": "user", "content": f"{hostile} x"},), TOOLS)
    pairs, reasons, script = write(*[hostile] * TRIES * (1 + LABELS), sample=sample, pair="request")
    assert pairs == [] and len(reasons) == TRIES and all(reasons)
    for messages, start in script.prompts:
        ids = tokenizer.chat(messages) + tokenizer.encode(start)
        assert (ids.count(tokenizer.im_start), ids.count(tokenizer.im_end)) == (3, 2)


# ------------------------------------------------------------------------------- checks and votes

@pytest.mark.parametrize("text, reason", [
    ("How warm is it in Paris?", ""), ("", "no request"), ("?!", "no request"),
    ("what is the weather in ROME", "copy of the seed request"),
    ("the weather in Rome", "copy of the seed request"),
    ('{"name": "get_weather"}', "a call in place of a request"),
    ("<tool_call>", "a call in place of a request")])
def test_a_request_must_be_new_and_a_request(text, reason):
    assert check_request(text, "What is the weather in Rome?") == reason


def test_each_call_must_fit_the_tools():
    assert check_text(PARIS, SAMPLE) == check_text(PARIS + OSLO, SAMPLE) == ""
    assert check_text(UNKNOWN, SAMPLE) == check_text(PARIS + UNKNOWN, SAMPLE) == (
        "unknown argument: town")
    assert check_text("sunny", SAMPLE) == "no call could be read"


def test_the_label_is_the_majority_of_the_calls_that_fit():
    label = majority([UNKNOWN, UNKNOWN, UNKNOWN, OSLO, PARIS, PARIS, "no call at all"], SAMPLE)
    assert (label.text, label.votes, label.reason) == (PARIS, 2, "")


def test_one_draw_alone_is_no_majority():
    label = majority([OSLO, PARIS], SAMPLE)
    assert (label.text, label.reason) == ("", "fewer than 2 calls agree")
    assert majority([OSLO, UNKNOWN], SAMPLE).reason == "unknown argument: town"


def test_votes_are_for_meanings_not_for_spellings():
    same = ['{"name": "get_weather", "arguments": {"city": "Paris", "days": 5}}',
            '{"name": "get_weather", "arguments": {"days": "5", "city": " Paris"}}']
    assert majority([OSLO, *same], SAMPLE).votes == 2


# -------------------------------------------------------------------------------------- the tries

def test_request_first_then_its_call_by_vote():
    pairs, reasons, script = write('Cold in Paris?"', UNKNOWN, PARIS, OSLO, PARIS, UNKNOWN,
                                   pair="request")
    assert [(p.request, p.text, p.votes) for p in pairs] == [("Cold in Paris?", PARIS, 2)]
    assert not reasons and len(set(script.keys)) == 1 + LABELS      # each text is its own draw


def test_joint_reads_request_and_call_from_one_text():
    pairs, reasons, _ = write(f'Cold in Paris?"\n{PARIS}\n')
    assert [(p.request, p.text) for p in pairs] == [("Cold in Paris?", PARIS)] and not reasons


def test_after_three_tries_there_is_no_pair_and_each_try_has_a_reason_and_a_draw_of_its_own():
    tries = ['What is the weather in Rome?"', f'Paris?"\n{UNKNOWN}', 'Paris?"\nsunny']
    pairs, reasons, script = write(*tries, "never asked for")
    assert pairs == [] and script.texts == ["never asked for"]
    assert reasons == ["copy of the seed request", "unknown argument: town",
                       "no call could be read"]
    assert len(set(script.keys)) == 3


def test_k_pairs_are_different_ones():
    cold, warm = f'Cold?"\n{PARIS}', f'Warm?"\n{PARIS}'
    pairs, reasons, _ = write(cold, cold, warm, k=2)
    assert [p.request for p in pairs] == ["Cold?", "Warm?"]
    assert reasons == ["copy of an earlier pair"]


def test_a_draw_depends_on_seed_and_sample_alone():
    def keys(seed: int, id: str) -> list:
        return write(f'?!"\n{PARIS}', f'Cold?"\n{PARIS}', seed=seed,
                     sample=Sample(id, SAMPLE.messages, TOOLS))[2].keys
    assert keys(1, "a") == keys(1, "a") and keys(1, "a") != keys(2, "a") != keys(2, "b")


def test_the_model_writes_each_of_many_texts_as_it_does_alone(model, tokenizer):
    writer = LocalWriter(model, tokenizer, PrefixCaches(model))
    prompts = [(call_prompt(SAMPLE), start) for start in ("", "A longer start")]
    keys = [[("a", 1), ("a", 2)], [("b", 1)]]
    together = writer(prompts, 12, 1.0, 0.95, keys)
    alone = [[writer([prompt], 12, 1.0, 0.95, [[key]])[0][0] for key in own]
             for prompt, own in zip(prompts, keys)]
    assert together == alone and together[0][0] != together[0][1]
