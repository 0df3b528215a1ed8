"""What an adapter is given to learn, and where a label may go."""
import json
from dataclasses import replace

import pytest
import torch

import train
from augment import WAYS, Found, Pair, synthesize
from data import Sample, call_prompt
from data.calls import Call
from evaluate import read_run
from lora import new_params
from model import Tokenizer, load_model, seeded
from research import lessons
from research.lessons import LABELS, LessonConfig, another, divergence, stages, way_of
from train import Agent, Kept, PrefixCaches

ONE, TWO, MISFIT = "f(x=1)", '{"name": "f", "arguments": {"x": 2}}', "f(y=1)"


def sample(i) -> Sample:
    tool = {"name": "f", "description": f"{i}", "parameters": {"x": {"type": "integer"}}}
    return Sample(f"toolalpaca-{i}", ({"role": "user", "content": f"Do {i}."},), (tool,))


SAMPLES = [sample(i) for i in range(3)]
CONFIG = LessonConfig(model="small", tau=1.0, max_new_tokens=6, epochs=2, lr=1e-2)
LINE = train.Assessed(id="", request="", candidates={"f": 0.0}, margin=0.0, prompt_tokens=9,
                      text='{"name": "f", "arguments": {}}', ids=[], log_p=[], entropy=[])
FACTS = {"samples": "", "weights": "", "tokenizer": "t", "writer": "", "labels": ""}


@pytest.fixture
def agent(checkpoint):
    model = load_model(checkpoint)
    return Agent(model, Tokenizer(checkpoint), PrefixCaches(model), None, FACTS, 1)


def improve(agent, folder, pairs=(), gold=None, **options):
    """Outcomes where these are the pairs of samples 0, 1 and 2, which the model is unsure of."""
    config = replace(CONFIG, out=str(folder / "run"), **options)
    kept = Kept(config, FACTS)
    kept(train.H, SAMPLES, lambda xs: [replace(LINE, id=x.id) for x in xs])
    if pairs:
        kept(stages(config)[0], SAMPLES, lambda xs: [Found(x.id, p) for x, p in zip(xs, pairs)])
    return lessons.improve(agent, SAMPLES, config, kept, SAMPLES, gold or {})


# -------------------------------------------------------------------------------------- the filters

def found(*calls, written='{"name": "f", "arguments": {"x": 2}}\n"Do 2."', **options) -> Found:
    """What a writer leads to who writes this, and answers the new request with `calls`."""
    def writer(prompts, limit, temperature, top_p, keys):
        texts = {"pair": [written], "label": list(calls)}
        return [texts[own[0][2]][:len(own)] for own in keys]
    config = replace(CONFIG, **options)
    return synthesize(writer, SAMPLES[:1], {SAMPLES[0].id: LINE}, config, way_of(config))[0]


def test_without_a_filter_of_its_own_the_core_writes():
    assert way_of(CONFIG) is WAYS["call"] and way_of(replace(CONFIG, pair="joint")) is WAYS["joint"]


def test_request_first_takes_the_majority_of_the_answers_that_fit():
    pair, = found(MISFIT, MISFIT, ONE, TWO, ONE, written='New."\n3. ...', pair="request").pairs
    assert (pair.request, pair.text) == ("New.", ONE)
    alone = found(ONE, TWO, MISFIT, MISFIT, MISFIT, written='New."', pair="request")
    assert {tried.reason for tried in alone.rejected} == {"fewer than 2 fitting calls agree"}
    copied = found(written='Do 0."', pair="request")
    assert copied.pairs == [] and copied.texts == ['Do 0."'] * 3        # nothing was sampled for it


def test_two_writes_for_the_two_likeliest_tools_in_turn():
    tools = tuple({**SAMPLES[0].tools[0], "name": name} for name in "fgh")
    line = replace(LINE, text="{}", candidates={"f": -2.0, "g": -9.0, "h": -1.0})
    asked, config = [], replace(CONFIG, pair="two", k=2)

    def writer(prompts, limit, temperature, top_p, keys):
        asked.append(prompts[0].form.parts[0])
        return [['{"name": "f", "arguments": {"x": 2}}\n"no digit"']]
    synthesize(writer, [replace(SAMPLES[0], tools=tools)], {SAMPLES[0].id: line}, config,
               way_of(config))
    written = [start for start in asked if start.endswith('"x":')]
    assert [start[10] for start in written] == list("hfhfhf")


def test_none_keeps_whatever_has_a_request_and_an_answer():
    misfit = '{"name": "g", "arguments": {}}\n"Do 0."'
    assert found(written=misfit).pairs == []
    assert [p.request for p in found(written=misfit, filter="none").pairs] == ["Do 0."]
    assert found(written="no call", filter="none").pairs == []


def test_consistent_needs_more_than_half_to_call_what_was_written():
    assert len(found(TWO, MISFIT, TWO, ONE, TWO, filter="consistent").pairs) == 1
    for answers in ([TWO, TWO, ONE, ONE, MISFIT], [ONE, ONE, ONE, TWO, TWO]):
        other = found(*answers, filter="consistent")
        assert other.pairs == [] and len(other.texts) == 3 * (1 + LABELS)
        assert other.rejected[0].reason == "most answers to it call something else"


def test_what_differs_is_kept_apart_and_what_the_core_does_is_shared():
    def key(**options):
        config = replace(CONFIG, **options)
        return str([stage.key({**vars(config), **FACTS}) for stage in stages(config)])
    assert stages(CONFIG) == (train.G, train.T)
    ways = [{}, {"pair": "request"}, {"filter": "none"}, {"filter": "consistent"},
            {"lesson": "unrelated"},
            {"lesson": "unrelated", "seed": 1}, {"lesson": "gold"},
            {"lesson": "gold", "seed": 1}, {"measure_kl": True}]
    assert len({key(**way) for way in ways}) == len(ways)


# -------------------------------------------------------------------------------------- the lessons

def test_unrelated_learns_the_pairs_of_another_sample_with_its_tools(agent, tmp_path):
    pairs = [[Pair(f"like {i}", "an answer")] for i in range(3)]
    outcomes = improve(agent, tmp_path, pairs, lesson="unrelated")
    for x, outcome in zip(SAMPLES, outcomes):
        other = another(x, SAMPLES, CONFIG.seed)
        lesson = train.lessons_of(other, Found("", pairs[SAMPLES.index(other)]))
        assert other != x and outcome.g.pairs == pairs[SAMPLES.index(other)]
        assert outcome.t.losses == train.adapt(agent, [x], [lesson], CONFIG)[0].losses
    drawn = {another(SAMPLES[0], SAMPLES, seed).id for seed in range(20)}
    assert drawn == {SAMPLES[1].id, SAMPLES[2].id}


def test_gold_is_the_samples_own_request_with_its_calls_as_the_model_writes(agent, tmp_path):
    calls = (Call("f", {"x": "<tool_call>"}), Call("g", {}))
    plain = '{"name": "f", "arguments": {"x": "<tool_call>"}}\n{"name": "g", "arguments": {}}'
    for x, outcome in zip(SAMPLES, improve(agent, tmp_path, gold=dict.fromkeys(
            [x.id for x in SAMPLES], calls), lesson="gold")):
        lesson = [(call_prompt(x), plain)]
        assert outcome.t.losses == train.adapt(agent, [x], [lesson], CONFIG)[0].losses


def test_the_program_hands_labels_over_for_gold_alone_and_says_so(checkpoint, tmp_path, capsys):
    gold = [{"name": "f", "arguments": {}}]
    item = {"query": "Do it.", "tools": SAMPLES[0].tools, "answers": gold}
    path = tmp_path / "data.json"
    path.write_text(json.dumps([item, item]))
    flags = ["--bench", "toolalpaca", "--model", str(checkpoint), "--data", str(path),
             "--device", "cpu", "--max-new-tokens", "4", "--limit", "1"]
    for lesson in ("unrelated", "gold"):
        assert lessons.main([*flags, "--out", str(tmp_path / lesson), "--lesson", lesson]) == 0
        assert read_run(tmp_path / lesson).config["uses_labels"] == (lesson == "gold")
    assert lessons.main([*flags, "--method", "base"]) == 2
    assert lessons.main([*flags, "--method", "ttd", "--teacher", "tiny", "--lesson", "gold"]) == 2
    assert capsys.readouterr().err.count("--method") == 2


# ------------------------------------------------------------------------------------------- the KL

@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_the_kl_is_0_before_training_and_grows_with_it(agent, tmp_path, adapt):
    fresh = new_params(agent.model, CONFIG.rank, [seeded("a")])
    assert abs(divergence(agent, SAMPLES[0], fresh, replace(CONFIG, adapt=adapt))) < 1e-6
    pairs = [[Pair("a request", "an answer")], [], []]
    near, far = [improve(agent, tmp_path / str(lr), pairs, measure_kl=True, adapt=adapt, lr=lr)
                 for lr in (1e-3, 1e-1)]
    assert 0 < 10 * near[0].extra["kl"] < far[0].extra["kl"]
    assert near[1].extra == {}                                      # nothing was learnt
    other = replace(SAMPLES[0], tools=SAMPLES[1].tools)             # they are read in either case
    fresh = {name: (A, torch.ones_like(B)) for name, (A, B) in fresh.items()}
    kl = [divergence(agent, x, fresh, replace(CONFIG, adapt=adapt)) for x in (SAMPLES[0], other)]
    assert kl[0] != kl[1]
    plain = improve(agent, tmp_path / "plain", pairs, adapt=adapt, lr=1e-3)
    assert (plain[0].t.text, plain[0].t.losses) == (near[0].t.text, near[0].t.losses)
