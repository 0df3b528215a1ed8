"""G: what the model writes becomes a pair only if it is a new request with calls that fit the tools."""
import pytest

import augment
from augment import check_request, local_writer, majority, pair_prompt, request_text, synthesize
from data import Sample, call_text, system_message
from data.calls import Call
from model import PrefixCaches

TOOLS = ({"name": "get_weather", "description": "", "parameters": {"city": {"type": "string", "required": True},
                                                                   "days": {"type": "integer"}}},
         {"name": "get_time", "description": "", "parameters": {"zone": {"type": "string", "required": True}}})
SAMPLE = Sample("s-0", ({"role": "user", "content": "What is the weather in Rome?"},), TOOLS, (Call("get_weather", {"city": "Rome"}),))
PARIS, OSLO = Call("get_weather", {"city": "Paris"}), Call("get_weather", {"city": "Oslo"})
UNKNOWN = Call("get_weather", {"city": "Paris", "town": "Paris"})


@pytest.mark.parametrize("request_, reason", [
    ("How warm is it in Paris?", ""), ("", "no request"), ("?!", "no request"),
    ("what is the weather in ROME", "copy of the seed request"), ("the weather in Rome", "copy of the seed request"),
    ('{"name": "get_weather"}', "a call in place of a request"), ("<tool_call>", "a call in place of a request")])
def test_a_request_must_be_new_and_a_request(request_, reason):
    assert check_request(request_, "What is the weather in Rome?") == reason


def test_the_label_is_the_majority_of_the_calls_that_fit_the_schema():
    texts = [call_text((c,)) for c in (UNKNOWN, UNKNOWN, UNKNOWN, OSLO, PARIS, PARIS)] + ["no call at all"]
    text, votes, reasons = majority(texts, SAMPLE)
    assert (text, votes) == (call_text((PARIS,)), 2)                      # three votes for what the schema forbids do not count
    assert sum(reasons.values()) == 4 and "no call could be read" in reasons


def test_one_draw_alone_is_no_majority():
    assert majority([call_text((c,)) for c in (OSLO, PARIS)], SAMPLE) == ("", 1, {"fewer than 2 calls agree": 1})
    assert majority([call_text((c,)) for c in (OSLO, UNKNOWN)], SAMPLE)[::2] == ("", {"unknown argument: town": 1})


def test_votes_are_for_meanings_not_for_spellings():
    same = ['{"name": "get_weather", "arguments": {"city": "Paris", "days": 5}}',
            '{"name": "get_weather", "arguments": {"days": "5", "city": " Paris"}}']
    assert majority([call_text((OSLO,)), *same], SAMPLE)[1] == 2


def test_a_dialogue_becomes_one_line_with_its_speakers():
    turns = ({"role": "user", "content": "Book it.\nPlease"}, {"role": "assistant", "content": "For when?"},
             {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
             {"role": "tool", "content": "ok"}, {"role": "user", "content": "Monday"})
    assert request_text(Sample("d", turns, TOOLS)) == "User: Book it. Please Assistant: For when? User: Monday"


@pytest.mark.parametrize("mode", ["request", "joint"])
def test_the_prompt_begins_like_the_answers_so_that_they_share_a_cache_and_holds_no_label(mode, tokenizer):
    messages = pair_prompt(SAMPLE, mode)
    assert messages[0] == system_message(TOOLS)
    assert ("tool_call" in messages[1]["content"]) == (mode == "joint")     # asked for a request, no call is spoken of


class Script:
    """Stands in for the model's writing: gives the next texts, and remembers how it was asked."""

    def __init__(self, tokenizer, *rounds):
        self.tokenizer, self.rounds, self.asked = tokenizer, list(rounds), []

    def __call__(self, model, tokenizer, prefixes, prompts, limit, temperature, top_p, keys):
        texts = self.rounds.pop(0)
        assert len(prompts) == len(keys) == 1 and len(keys[0]) == len(texts)
        self.asked.append((self.tokenizer.decode(prompts[0][1]), keys[0]))
        return [texts]


def write(monkeypatch, model, tokenizer, *rounds, sample=SAMPLE, **options):
    script = Script(tokenizer, *rounds)
    monkeypatch.setattr(augment, "sample_texts", script)
    found, = synthesize(local_writer(model, tokenizer, PrefixCaches(model)), [sample], **options)
    assert len(found.texts) == sum(len(keys) for _, keys in script.asked)       # all that was written counts
    return found.pairs, found.rejected, script


def test_request_first_then_its_call_by_vote(monkeypatch, model, tokenizer):
    labels = [call_text((c,)) for c in (UNKNOWN, PARIS, OSLO, PARIS, UNKNOWN)]
    pairs, rejected, script = write(monkeypatch, model, tokenizer, ['Is it cold in Paris?"'], labels)
    assert (pairs[0].request, pairs[0].calls, pairs[0].votes, rejected) == ("Is it cold in Paris?", (PARIS,), 2, [])
    assert 'Rome?"\n2. "' in script.asked[0][0] and "Is it cold in Paris?" in script.asked[1][0]


def test_joint_reads_request_and_call_from_one_text(monkeypatch, model, tokenizer):
    pairs, rejected, _ = write(monkeypatch, model, tokenizer, ['Cold in Paris?"\n' + call_text((PARIS,))], mode="joint")
    assert [(p.request, p.calls) for p in pairs] == [("Cold in Paris?", (PARIS,))] and not rejected


def test_three_tries_each_with_its_own_draw_then_no_pair_and_every_reason_is_kept(monkeypatch, model, tokenizer):
    tries = [['What is the weather in Rome?"'], ['Paris?"\n' + call_text((UNKNOWN,))], ['Paris?"\nsunny']]
    pairs, rejected, script = write(monkeypatch, model, tokenizer, *tries, mode="joint")
    assert pairs == [] and len({keys[0] for _, keys in script.asked}) == 3
    assert [r.reason for r in rejected] == ["copy of the seed request", "unknown argument: town", "no call could be read"]


def test_k_pairs_are_different_ones(monkeypatch, model, tokenizer):
    tries = [[f'{q}"\n' + call_text((PARIS,))] for q in ("Cold in Paris?", "Cold in Paris?", "Warm in Paris?")]
    pairs, rejected, _ = write(monkeypatch, model, tokenizer, *tries, mode="joint", k=2)
    assert [p.request for p in pairs] == ["Cold in Paris?", "Warm in Paris?"]
    assert [r.reason for r in rejected] == ["copy of an earlier pair"]


def test_a_draw_depends_on_seed_and_sample_alone(monkeypatch, model, tokenizer):
    def seeds(**options):
        return write(monkeypatch, model, tokenizer, ['Paris?"\n' + call_text((PARIS,))], mode="joint", **options)[2].asked[0][1]
    other = Sample("s-1", SAMPLE.messages, TOOLS)
    assert seeds(seed=1) == seeds(seed=1) != seeds(seed=2) and seeds(seed=1) != seeds(seed=1, sample=other)


# -------------------------------------------------------------------------------------------------- filters, measures

MAJORITY = [call_text((c,)) for c in (PARIS, PARIS, PARIS, OSLO, UNKNOWN)]


@pytest.mark.parametrize("labels, filter, kept", [
    (MAJORITY, "consistent", True), (MAJORITY[1:] + MAJORITY[-1:], "consistent", False), (MAJORITY[1:] + MAJORITY[-1:], "schema", True),
    (["no call"], "none", True)])
def test_filters_of_the_majority(monkeypatch, model, tokenizer, labels, filter, kept):
    pairs, rejected, _ = write(monkeypatch, model, tokenizer, *[['Cold in Paris?"'], labels] * 3, filter=filter)
    assert bool(pairs) == kept and len(rejected) == 3 * (not kept) and (not kept or pairs[0].text == labels[0])
    assert not kept or pairs[0].fits == (filter != "none")


@pytest.mark.parametrize("written, filter, reason", [
    (PARIS, "consistent", ""), (OSLO, "consistent", "the majority calls something else"), (UNKNOWN, "none", ""), (UNKNOWN, "schema", "unknown argument: town")])
def test_filters_of_a_joint_pair(monkeypatch, model, tokenizer, written, filter, reason):
    rounds = [[f'Cold in Paris?"\n{call_text((written,))}'], MAJORITY] if filter == "consistent" else [[f'Cold in Paris?"\n{call_text((written,))}']]
    pairs, rejected, _ = write(monkeypatch, model, tokenizer, *rounds * 3, mode="joint", filter=filter)
    assert [r.reason for r in rejected] == [reason] * 3 if reason else [p.text for p in pairs] == [call_text((written,))]


@pytest.mark.parametrize("filter", ["schema", "none"])
def test_a_joint_pair_that_ends_after_its_request_is_none(monkeypatch, model, tokenizer, filter):
    pairs, rejected, _ = write(monkeypatch, model, tokenizer, *[['Cold in Paris?"']] * 3, mode="joint", filter=filter)
    assert not pairs and {r.reason for r in rejected} == {"no call could be read"}


def test_measures_of_text_by_hand():
    assert augment.rouge_l("the cat sat", "the cat sat") == 1 and augment.rouge_l("a b", "c d") == 0
    assert augment.rouge_l("police killed the gunman", "police kill the gunman") == 0.75           # Lin 2004's example
    assert augment.rouge_l("the gunman kill police", "police kill the gunman") == 0.5
    assert augment.distinct_2(["a b c", "a b"]) == pytest.approx(2 / 3)
    assert augment.argument_values([{"name": "f", "arguments": {"a": 1, "b": ["x", {"c": True}]}}]) == ["1", "x", "True"]
