"""What an adapter is given to learn, and where a label may go."""
from dataclasses import replace

import pytest
import torch
from small import MISFIT, ONE, OPTIONS, OTHER, SAMPLES, agent, assessed, flags, found, made

import train
from augment import Found, Pair, synthesize
from data import call_prompt
from data.calls import Call
from evaluate import read_run
from lora import new_params
from model import seeded
from research import lessons
from research.lessons import LessonConfig, another, divergence, stages, write

CONFIG, TWO = LessonConfig(**OPTIONS), '{"name": "h", "arguments": {"x": 2}}'
H = {x.id: assessed(x.id, '{"name": "h", "arguments": {}}') for x in SAMPLES}
PAIRS = [[Pair(f"like {i}", "an answer")] for i in range(3)]


def written(*calls, text=f'{TWO}\n"Do 2."', **options) -> Found:
    """What a writer leads to who writes this, and answers the new request with `calls`."""
    def writer(prompts, limit, temperature, top_p, keys):
        return list(calls) if keys[0][2] == "label" else [text] * len(keys)
    return synthesize(writer, SAMPLES[:1], H, replace(CONFIG, **options), write)[0]


def test_request_first_takes_the_majority_of_the_answers_that_fit():
    pair, = written(MISFIT, MISFIT, ONE, TWO, ONE, text='New."\n3. ...', pair="request").pairs
    assert (pair.request, pair.text) == ("New.", ONE)
    alone = written(ONE, TWO, MISFIT, MISFIT, MISFIT, text='New."', pair="request")
    assert {tried.reason for tried in alone.rejected} == {"fewer than 2 fitting calls agree"}
    copied = written(text='Do 0."', pair="request")
    assert copied.pairs == [] and copied.texts == ['Do 0."'] * 3        # nothing was sampled for it


def test_shown_is_a_request_and_then_a_call_of_any_tool():
    pair, = written(text=f'"Do \\"2\\"."\n{OTHER}', pair="shown").pairs
    assert (pair.request, pair.text) == ('Do "2".', OTHER)
    for text, reason in [('"Do', "the request did not end"), ('"New."\n', "no call could be read"),
                         (f'"Do 0."\n{OTHER}', "copy of the seed request"),
                         (f'"New."\n{MISFIT}', "missing argument: x")]:
        assert written(text=text, pair="shown").rejected[0].reason == reason


def test_shown_shows_the_direct_answers_call_or_else_the_likeliest_tool():
    for answer in ('{"name": "f", "arguments": {"x": 5}}', "Hm."):
        starts = []

        def writer(prompts, limit, temperature, top_p, keys):
            starts.append(prompts[0].start)
            return ['"New."\n']
        h = {SAMPLES[0].id: assessed(SAMPLES[0].id, answer)}
        synthesize(writer, SAMPLES[:1], h, replace(CONFIG, pair="shown"), write)
        call = answer if answer != "Hm." else '{"name": "h", "arguments": {}}'
        assert starts[0] == f'1. "Do 0."\n{call}\n2. '


def test_two_writes_for_the_two_likeliest_tools_in_turn():
    asked = []

    def writer(prompts, limit, temperature, top_p, keys):
        asked.append(prompts[0].form.parts[0])
        return [f'{TWO}\n"no digit"']
    synthesize(writer, SAMPLES[:1], H, replace(CONFIG, pair="two", k=2), write)
    starts = [start for start in asked if start.endswith('"x":')]
    assert [start[10] for start in starts] == list("hfhfhf")


def test_a_filter_keeps_less_or_more():
    assert len(written().pairs) == 1                                # schema, as train.py
    misfit = '{"name": "k", "arguments": {}}\n"Do 0."'
    assert written(text=misfit).pairs == []
    assert [p.request for p in written(text=misfit, filter="none").pairs] == ["Do 0."]
    assert written(text="no call", filter="none").pairs == []
    assert len(written(TWO, MISFIT, TWO, ONE, TWO, filter="consistent").pairs) == 1
    for answers in ([TWO, TWO, ONE, ONE, MISFIT], [ONE, ONE, ONE, TWO, TWO]):
        other = written(*answers, filter="consistent")
        assert other.pairs == [] and len(other.texts) == 3 * (1 + 5)
        assert other.rejected[0].reason == "most answers to it call something else"


def test_what_differs_is_kept_apart_and_what_the_core_does_is_shared():
    def key(**options):
        config = replace(CONFIG, **options)
        facts = dict.fromkeys(("samples", "weights", "tokenizer", "writer", "labels"))
        return str([stage.key({**vars(config), **facts}) for stage in stages(config)])
    assert stages(CONFIG) == (train.G, train.T)
    ways = [{}, {"pair": "request"}, {"filter": "none"}, {"filter": "consistent"},
            {"lesson": "unrelated"}, {"lesson": "unrelated", "seed": 1}, {"lesson": "gold"},
            {"lesson": "gold", "seed": 1}, {"measure_kl": True}]
    assert len({key(**way) for way in ways}) == len(ways)


def test_unrelated_learns_the_pairs_of_another_sample_with_its_tools(agent):
    config = replace(CONFIG, lesson="unrelated")
    outcomes = lessons.improve(agent, SAMPLES, config, made(H=H, G=found(*PAIRS)), SAMPLES)
    for x, outcome in zip(SAMPLES, outcomes):
        other = another(x, SAMPLES, CONFIG.seed)
        lesson = train.lessons_of(other, outcome.g)
        assert other != x and outcome.g.pairs == PAIRS[SAMPLES.index(other)]
        assert outcome.t.losses == train.adapt(agent, [x], [lesson], CONFIG)[0].losses
    drawn = {another(SAMPLES[0], SAMPLES, seed).id for seed in range(20)}
    assert drawn == {SAMPLES[1].id, SAMPLES[2].id}


def test_gold_is_the_samples_own_request_with_its_calls_as_the_model_writes(agent):
    labelled = [replace(x, answers=(Call("f", {"x": "<tool_call>"}), Call("g"))) for x in SAMPLES]
    plain = '{"name": "f", "arguments": {"x": "<tool_call>"}}\n{"name": "g", "arguments": {}}'
    config = replace(CONFIG, lesson="gold")
    for x, outcome in zip(SAMPLES, lessons.improve(agent, SAMPLES, config, made(H=H), labelled)):
        lesson = [(call_prompt(x), plain)]
        assert outcome.t.losses == train.adapt(agent, [x], [lesson], CONFIG)[0].losses


@pytest.mark.parametrize("lesson", ["unrelated", "gold"])
def test_the_program_says_whether_it_uses_labels(lesson, flags, tmp_path):
    assert lessons.main([*flags, "--limit", "1", "--lesson", lesson]) == 0
    assert read_run(tmp_path / "run").config["uses_labels"] == (lesson == "gold")


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_the_kl_is_0_before_training_and_grows_with_it(agent, adapt):
    config = replace(CONFIG, adapt=adapt, measure_kl=True)
    fresh = new_params(agent.model, CONFIG.rank, [seeded("a")])
    assert abs(divergence(agent, SAMPLES[0], fresh, config)) < 1e-6
    kept = made(H=H, G=found(PAIRS[0], [], []))
    near, far = [lessons.improve(agent, SAMPLES, replace(config, lr=lr), kept, SAMPLES)
                 for lr in (1e-3, 1e-1)]
    assert 0 < 10 * near[0].extra["kl"] < far[0].extra["kl"]
    assert near[1].extra == {}                                      # nothing was learnt
    other = replace(SAMPLES[0], tools=SAMPLES[1].tools)             # they are read in either case
    fresh = {name: (A, torch.ones_like(B)) for name, (A, B) in fresh.items()}
    kl = [divergence(agent, x, fresh, config) for x in (SAMPLES[0], other)]
    assert kl[0] != kl[1]
