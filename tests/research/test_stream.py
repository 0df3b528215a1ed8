"""Without the reset, what one sample teaches is there when the next is answered."""
import json
from dataclasses import replace

import pytest
import torch

import train
from augment import Found, Pair
from data import Sample
from evaluate import read_run
from lora import new_params
from model import Tokenizer, fingerprint, load_model, seeded
from research import stream
from research.stream import StreamConfig, adapt_with, answer_with
from train import Agent, Kept, PrefixCaches, lessons_of

TOOLS = ({"name": "f", "description": "", "parameters": {}},
         {"name": "g", "description": "", "parameters": {}})
SAMPLES = [Sample(f"toolalpaca-{i}", ({"role": "user", "content": f"Do {i}."},), TOOLS)
           for i in range(3)]
CONFIG = StreamConfig(model="small", tau=1.0, max_new_tokens=6, epochs=4, lr=3e-2)
FACTS = {"samples": "", "weights": "", "tokenizer": "t", "writer": ""}


@pytest.fixture
def agent(checkpoint):
    model = load_model(checkpoint)
    return Agent(model, Tokenizer(checkpoint), PrefixCaches(model), None, FACTS, 1)


def improve(agent, folder, pairs, samples=SAMPLES, params=None, **options):
    """Outcomes where these are the pairs of samples 0, 1 and 2."""
    config = replace(CONFIG, out=str(folder / "run"), **options)
    kept = Kept(config, agent.facts)
    kept(train.G, samples, lambda xs: [Found(x.id, own) for x, own in zip(xs, pairs)])
    return stream.improve(agent, samples, config, kept, {} if params is None else params)


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_an_adapter_that_is_held_learns_and_answers_as_the_cores(agent, adapt):
    config = replace(CONFIG, adapt=adapt)
    lessons = lessons_of(SAMPLES[0], Found("", [Pair("a", "b"), Pair("c", "d")]))
    params = new_params(agent.model, config.rank, [seeded(0, SAMPLES[0].id, "lora")])
    core, = train.adapt(agent, SAMPLES[:1], [lessons], config)
    assert adapt_with(agent, SAMPLES[0], lessons, params, config) == core
    assert answer_with(agent, SAMPLES[:1], params, config)[0].text == core.text


def test_with_the_reset_it_is_algorithm_1_and_without_it_each_starts_from_the_last(agent, tmp_path):
    lesson = Pair("one and the same request", "one answer")
    pairs, params = [[lesson], [], [lesson]], {}
    first, second, third = improve(agent, tmp_path / "sample", pairs, params=params)
    lessons = [lessons_of(SAMPLES[i], Found("", pairs[i])) for i in (0, 2)]
    core = train.adapt(agent, [SAMPLES[0], SAMPLES[2]], lessons, CONFIG)
    assert [replace(outcome.t, seconds=0.0) for outcome in (first, third)] == core
    assert second.t is None and params == {}
    on = improve(agent, tmp_path / "never", [[lesson]] * 3, reset="never")
    losses = [outcome.t.losses[0] for outcome in on]                # of each, before it learns
    assert losses[2] < losses[1] < losses[0]
    assert third.t.losses[0] == pytest.approx(losses[0], rel=0.1)   # a fresh one knows nothing


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_once_it_has_begun_the_adapter_answers_everyone_and_theta_0_stays(agent, tmp_path, adapt):
    params, weights = {}, fingerprint(agent.model)
    before, learner, after = improve(agent, tmp_path, [[], [Pair("a", "an answer")], []],
                                     params=params, reset="never", adapt=adapt)
    assert before.t is None and learner.t.losses
    line, = answer_with(agent, SAMPLES[2:], params, replace(CONFIG, adapt=adapt))
    assert after.t.losses == [] and after.t.text == line.text != after.h.text
    assert fingerprint(agent.model) == weights
    for ids, cache in agent.prefixes.caches.items():
        fresh = PrefixCaches(agent.model).read(ids)
        assert all((a == b).all() for a, b in zip(fresh.values, cache.values))


def test_what_explodes_is_dropped_and_the_adapter_before_it_goes_on(agent, tmp_path):
    params, pairs = {}, [[Pair("a", "b")]] * 3
    improve(agent, tmp_path / "good", pairs, SAMPLES[:1], params, reset="never")
    before = stream.copy_of(params)
    outcome, = improve(agent, tmp_path / "bad", pairs, SAMPLES[1:2], params, reset="never", lr=1e18)
    assert params and not outcome.t.finite
    for name, pair in before.items():
        assert all((a == b).all() for a, b in zip(pair, params[name]))


def test_who_does_not_fit_the_memory_gets_no_line_and_other_errors_are_raised():
    def work(sample):
        if sample is SAMPLES[1]:
            raise error("of this sample")
        return sample.id
    error = torch.OutOfMemoryError
    assert stream.one_by_one(SAMPLES, work) == [SAMPLES[0].id, SAMPLES[2].id]
    error = RuntimeError
    with pytest.raises(RuntimeError):
        stream.one_by_one(SAMPLES, work)


def test_the_program_and_what_it_refuses(checkpoint, tmp_path, monkeypatch, capsys):
    item = {"query": "Do it.", "tools": TOOLS, "answers": [{"name": "f", "arguments": {}}]}
    path = tmp_path / "data.json"
    path.write_text(json.dumps([item, item]))
    flags = ["--bench", "toolalpaca", "--model", str(checkpoint), "--data", str(path),
             "--device", "cpu", "--max-new-tokens", "4", "--out", str(tmp_path / "run"),
             "--reset", "never", "--tau", "0"]
    assert stream.main(flags) == 0
    assert read_run(tmp_path / "run").config["reset"] == "never"
    assert stream.main([*flags, "--method", "base"]) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert stream.main(flags) == 2 and "one process" in capsys.readouterr().err
