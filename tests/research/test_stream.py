"""Without the reset, what one sample teaches is there when the next is answered."""
from dataclasses import replace

import pytest
from small import OPTIONS, SAMPLES, Made, agent, assessed, flags, found, lost

import train
from augment import Pair
from data.runs import Missing, read_run
from research import stream
from research.stream import StreamConfig, answer_with

CONFIG = StreamConfig(**{**OPTIONS, "epochs": 4, "lr": 3e-2})
PAIRS = [Pair("one and the same request", "one answer"), Pair("another", "one more")]
H = {x.id: assessed(x.id, "direct") for x in SAMPLES}


def improve(agent, pairs, params, samples=SAMPLES, h=H, **options):
    """Outcomes where these are the pairs of samples 0, 1 and 2."""
    config = replace(CONFIG, **options)
    return stream.learn_on(samples, config, Made(agent, config, H=h, G=found(*pairs)), params)


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_each_starts_from_the_last(agent, adapt):
    config, params = replace(CONFIG, adapt=adapt), {}
    on = improve(agent, [PAIRS] * 3, params, adapt=adapt)
    losses = [outcome.t.losses[0] for outcome in on]                # of each, before it learns
    assert losses[2] < losses[1] < losses[0]
    *_, core = train.self_improve(SAMPLES, config, Made(agent, config, H=H, G=found(*[PAIRS] * 3)))
    assert core.t.losses[0] == pytest.approx(losses[0], rel=0.1)    # a fresh one knows nothing


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_once_it_has_begun_the_adapter_answers_everyone(agent, adapt):
    params = {}
    before, learner, after = improve(agent, [[], PAIRS, []], params, adapt=adapt)
    assert before.t is None and learner.t.losses and after.t.losses == []
    adapted, base = [answer_with(agent, SAMPLES[2:], own, replace(CONFIG, adapt=adapt))[0].text
                     for own in (params, {})]
    assert after.t.text == adapted != base


def test_what_explodes_is_dropped_and_the_adapter_before_it_goes_on(agent):
    params = {}
    improve(agent, [PAIRS], params, SAMPLES[:1])
    before = stream.copy_of(params)
    outcome, = improve(agent, [PAIRS], params, SAMPLES[:1], lr=1e18)
    assert params and outcome.t.failed == "non-finite"
    for name, pair in before.items():
        assert all((a == b).all() for a, b in zip(pair, params[name]))


def test_it_does_not_answer_for_whom_h_failed(agent):
    h = {**H, SAMPLES[1].id: lost(SAMPLES[1].id)}
    learner, gone, after = improve(agent, [PAIRS, [], []], {}, h=h)
    assert learner.t and gone.t is None and after.t


def test_what_is_too_long_is_not_learnt_and_the_adapter_goes_on(agent):
    long, params = [Pair("too long " * 999, "")], {}
    outcomes = improve(agent, [PAIRS, long, PAIRS], params)
    assert [outcome.t.failed for outcome in outcomes] == ["", "too long", ""]
    assert outcomes[2].t.losses[0] < outcomes[0].t.losses[0]


def test_where_nothing_is_to_be_computed_the_adapter_is_missing(agent):
    kept = Made(agent, CONFIG, H=H, G=found([], [], []))
    kept.computing = False
    with pytest.raises(Missing):
        stream.learn_on(SAMPLES, CONFIG, kept, {})


def test_the_program_runs_in_one_process(flags, tmp_path, monkeypatch, capsys):
    flags = [*flags, "--reset", "never", "--tau", "0"]
    assert stream.main(flags) == 0
    assert read_run(tmp_path / "run").config["reset"] == "never"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert stream.main(flags) == 2 and "one process" in capsys.readouterr().err


def test_with_the_reset_the_program_does_what_train_py_does(flags, tmp_path):
    flags, core = [*flags, "--tau", "1"], tmp_path / "elsewhere" / "run"
    assert stream.main(flags) == train.main([*flags, "--out", str(core)]) == 0
    ours, theirs = [[replace(record, seconds={}) for record in read_run(folder).records]
                    for folder in (tmp_path / "run", core)]
    assert ours == theirs
