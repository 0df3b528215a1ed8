"""Without the reset, what one sample teaches is there when the next is answered."""
from dataclasses import replace

import pytest
from small import OPTIONS, SAMPLES, agent, assessed, flags, found, made

import train
from augment import Pair
from evaluate import read_run
from research import stream
from research.stream import StreamConfig, answer_with

CONFIG = StreamConfig(**{**OPTIONS, "epochs": 4, "lr": 3e-2})
PAIRS = [Pair("one and the same request", "one answer"), Pair("another", "one more")]
H = {x.id: assessed(x.id, "direct") for x in SAMPLES}


def improve(agent, pairs, params, samples=SAMPLES, **options):
    """Outcomes where these are the pairs of samples 0, 1 and 2."""
    config = replace(CONFIG, **options)
    return stream.improve(agent, samples, config, made(H=H, G=found(*pairs)), params)


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_with_the_reset_it_is_algorithm_1_and_without_it_each_starts_from_the_last(agent, adapt):
    params = {}
    first, second, third = improve(agent, [PAIRS, [], PAIRS], params, adapt=adapt)
    core = train.self_improve(agent, SAMPLES, replace(CONFIG, adapt=adapt),
                              made(H=H, G=found(PAIRS, [], PAIRS)))
    for ours, theirs in ((first.t, core[0].t), (third.t, core[2].t)):
        assert vars(ours) == {**vars(theirs), "seconds": ours.seconds, "seen": {}}
    assert second.t is None and params == {}
    on = improve(agent, [PAIRS] * 3, params, reset="never", adapt=adapt)
    losses = [outcome.t.losses[0] for outcome in on]                # of each, before it learns
    assert losses[2] < losses[1] < losses[0]
    assert third.t.losses[0] == pytest.approx(losses[0], rel=0.1)   # a fresh one knows nothing


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_once_it_has_begun_the_adapter_answers_everyone(agent, adapt):
    params = {}
    before, learner, after = improve(agent, [[], PAIRS, []], params, reset="never", adapt=adapt)
    assert before.t is None and learner.t.losses and after.t.losses == []
    adapted, base = [answer_with(agent, SAMPLES[2:], own, replace(CONFIG, adapt=adapt))[0].text
                     for own in (params, {})]
    assert after.t.text == adapted != base


def test_what_explodes_is_dropped_and_the_adapter_before_it_goes_on(agent):
    params = {}
    improve(agent, [PAIRS], params, SAMPLES[:1], reset="never")
    before = stream.copy_of(params)
    outcome, = improve(agent, [PAIRS], params, SAMPLES[:1], reset="never", lr=1e18)
    assert params and not outcome.t.finite
    for name, pair in before.items():
        assert all((a == b).all() for a, b in zip(pair, params[name]))


def test_the_program_runs_in_one_process(flags, tmp_path, monkeypatch, capsys):
    flags = [*flags, "--reset", "never", "--tau", "0"]
    assert stream.main(flags) == 0
    assert read_run(tmp_path / "run").config["reset"] == "never"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert stream.main(flags) == 2 and "one process" in capsys.readouterr().err
