"""What an adapter is given to learn, and where a label may go."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import (FACTS, MISFIT, ONE, OPTIONS, OTHER, SAMPLES, Made, agent, assessed, flags, found,
                   lost)

import train
from augment import Found, Pair, synthesize
from data import load, request_text, shuffled, with_request
from data.calls import Call
from data.runs import Lines, definitions, read_run
from lora import new_params
from model import seeded
from research import lessons
from research.lessons import LessonConfig, divergence, subject, task_of

CONFIG, TWO = LessonConfig(**OPTIONS), '{"name": "h", "arguments": {"x": 2}}'
H = {x.id: assessed(x.id, '{"name": "h", "arguments": {}}') for x in SAMPLES}
PAIRS = [[Pair(f"like {i}", "an answer")] for i in range(3)]
EVERYONE = Lines({x.id: x for x in SAMPLES})


def through(writer, h=H, **options) -> Found:
    """What G finds for the first sample with this writer."""
    config = replace(CONFIG, **options)
    agent = train.Agent(task_of(config), None, None, None, writer, FACTS, 1)
    return synthesize(agent, SAMPLES[:1], config, h)[0]


def written(*calls, text=f'{TWO}\n"Do 2."', **options) -> Found:
    """What a writer leads to who writes this, and answers the new request with `calls`."""
    def writer(prompts, limit, temperature, top_p, keys):
        return list(calls) if keys[0][2] == "label" else [text] * len(keys)
    return through(writer, **options)


def improve(agent, config, everyone=EVERYONE, samples=SAMPLES, **made) -> list[train.Outcome]:
    """Outcomes where these are the lines of H, and of other stages."""
    return lessons.improve(samples, config, Made(agent, config, **{"H": H, **made}), everyone)


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
        through(writer, {SAMPLES[0].id: assessed(SAMPLES[0].id, answer)}, pair="shown")
        call = answer if answer != "Hm." else '{"name": "h", "arguments": {}}'
        assert starts[0] == f'1. "Do 0."\n{call}\n2. '


def test_two_writes_for_the_two_likeliest_tools_in_turn():
    begun = []

    def writer(prompts, limit, temperature, top_p, keys):
        begun.append(prompts[0].form.start)
        return [f'{TWO}\n"no digit"']
    through(writer, pair="two", k=2)
    starts = [start for start in begun if start.endswith('"x":')]
    assert [start[10] for start in starts] == list("hfhfhf")


def test_words_writes_for_the_tool_that_shares_most_words_with_the_request():
    tools = tuple({**tool, "description": text} for tool, text in zip(
        SAMPLES[0].tools, ("Undo it.", "Do 0 or 1.", "Ask.")))
    begun = []

    def writer(prompts, limit, temperature, top_p, keys):
        begun.append(prompts[0].form.start[10])
        return [""]
    config = replace(CONFIG, pair="words")
    agent = train.Agent(task_of(config), None, None, None, writer, FACTS, 1)
    synthesize(agent, [replace(SAMPLES[0], tools=tools)], config, H)
    assert begun == ["g"] * 3           # H finds h likeliest


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


def keys(agent, everyone="", algorithm=None, **options) -> dict[str, str]:
    """What the lines of each stage depend on with these options."""
    config = replace(CONFIG, **options)
    task = task_of(config)
    facts = {**FACTS, **task.code, "everyone": everyone}
    kept = Made(replace(agent, task=task, facts=facts), config, H=H)
    if algorithm:
        algorithm([], config, kept)
    else:
        lessons.improve([], config, kept, EVERYONE)
    return {key["stage"]: str(key) for key in kept.keys.values()}


def test_what_differs_is_kept_apart_and_what_the_core_does_is_shared(agent):
    for option in ({}, {"pair": "joint"}, {"uses_labels": True}, {"k": 2}):
        assert keys(agent, **option) == keys(agent, algorithm=train.self_improve, **option)
    ways = [{}, {"pair": "request"}, {"pair": "two"}, {"pair": "words"}, {"filter": "none"},
            {"filter": "consistent"}, {"lesson": "unrelated"},
            {"lesson": "unrelated", "seed": 1}, {"lesson": "gold"},
            {"lesson": "gold", "seed": 1}, {"measure_kl": True},
            {"lesson": "unrelated", "measure_kl": True}, {"lesson": "gold", "measure_kl": True}]
    learnt = [list(keys(agent, **way).values())[-1] for way in ways]
    assert len(set(learnt)) == len(ways)
    one, other = [keys(agent, lesson="gold", everyone=labels) for labels in ("these", "others")]
    assert one.keys() == {"gold", "lessons"} and all(one[name] != other[name] for name in one)


def test_unrelated_learns_the_pairs_of_another_sample_with_its_tools(agent):
    config = replace(CONFIG, lesson="unrelated")
    for x, outcome in zip(SAMPLES, improve(agent, config, G=found(*PAIRS))):
        other = subject(x, config, EVERYONE)
        lesson = [(with_request(other, pair.request), pair.text) for pair in outcome.g.pairs]
        assert other != x and outcome.g.pairs == PAIRS[SAMPLES.index(other)]
        alone, = train.learn(agent, [x], [lesson], CONFIG)
        assert outcome.t.losses == pytest.approx(alone.losses, rel=1e-5)
    drawn = {subject(SAMPLES[0], replace(config, seed=i), EVERYONE).id for i in range(20)}
    assert drawn == {SAMPLES[1].id, SAMPLES[2].id}


def test_nothing_is_learnt_of_another_sample_whose_h_failed_and_unequal_lessons_go_apart(agent):
    config = replace(CONFIG, lesson="unrelated")
    others = {x.id: subject(x, config, EVERYONE).id for x in SAMPLES}
    assert sorted(others.values()) != sorted(others)                # two have drawn the same
    pairs = found(PAIRS[0], PAIRS[0] + PAIRS[1], PAIRS[0])
    for gone in others.values():
        h = {x.id: lost(x.id) if x.id == gone else H[x.id] for x in SAMPLES}
        for x, outcome in zip(SAMPLES, improve(agent, config, H=h, G=pairs)):
            has_none = gone in (x.id, others[x.id])
            steps = 0 if has_none else CONFIG.epochs * len(pairs[others[x.id]].pairs)
            assert len(outcome.t.losses if outcome.t else []) == steps
            assert (outcome.g is None) == has_none


def test_gold_is_the_samples_own_dialogue_with_its_calls_as_the_model_writes(agent):
    calls = Call("f", {"x": "<tool_call>"}), Call("g")
    plain = '{"name": "f", "arguments": {"x": "<tool_call>"}}\n{"name": "g", "arguments": {}}'
    turns = ({"role": "user", "content": "Do it."}, {"role": "assistant", "content": "What?"})
    samples = [*SAMPLES[:2], replace(SAMPLES[2], messages=(*turns, *SAMPLES[2].messages))]
    everyone = Lines({x.id: replace(x, answers=calls) for x in samples})
    outcomes = improve(agent, replace(CONFIG, lesson="gold"), everyone, samples)
    for x, outcome in zip(samples, outcomes):
        assert outcome.g.pairs == [Pair(request_text(x), plain)]
        alone, = train.learn(agent, [x], [[(x, plain)]], CONFIG)
        assert outcome.t.losses == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.parametrize("lesson", ["unrelated", "gold"])
def test_the_program_says_whether_it_uses_labels(lesson, flags, tmp_path):
    assert lessons.main([*flags, "--limit", "1", "--lesson", lesson]) == 0
    assert read_run(tmp_path / "run").config["uses_labels"] == (lesson == "gold")


def test_what_needs_other_samples_or_a_file_of_them_is_refused(flags, tmp_path, capsys):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(json.loads((tmp_path / "data.json").read_text())[:1]))
    asked = [*flags, "--data", str(path), "--lesson", "unrelated"]
    assert lessons.main(asked) == 2 and "has no other sample" in capsys.readouterr().err
    assert lessons.main([*asked, "--ask", "Do it"]) == 2
    assert "--ask is train.py's alone" in capsys.readouterr().err


def test_a_key_holds_the_code_of_what_is_imported_as_a_module():
    """`from research import benchmarks` in lessons.py: whose functions --pair words calls."""
    path = Path(lessons.__file__)
    assert (path.with_name("benchmarks.py"), "fresh") in definitions(path)["benchmarks"][1]


def test_another_samples_tools_are_shuffled_like_ones_own(flags, tmp_path):
    assert lessons.main([*flags, "--tools", "shuffled", "--lesson", "unrelated"]) == 0
    samples = load("toolalpaca", str(tmp_path / "data.json"))
    orders = [[tool["name"] for tool in shuffled(x, 0).tools] for x in samples]
    assert orders != [["f", "g", "h"]] * 3
    lines = [path.read_text().split("\n")[1:-1] for path in tmp_path.glob("stages/H-*")]
    seen = [json.loads(line)["candidates"] for own in lines for line in own]
    assert sorted(map(list, seen)) == sorted(orders)                # each once, and no other


@pytest.mark.parametrize("adapt", ["full", "suffix"])
def test_the_kl_is_0_before_training_and_grows_with_it(agent, adapt):
    config = replace(CONFIG, adapt=adapt, measure_kl=True)
    fresh = new_params(agent.model, CONFIG.rank, [seeded("a")])
    assert abs(divergence(agent, SAMPLES[0], fresh, config)["kl"]) < 1e-6
    near, far = [improve(agent, replace(config, lr=lr), G=found(PAIRS[0], [], []))
                 for lr in (1e-3, 1e-1)]
    assert 0 < 10 * near[0].extra["kl"] < far[0].extra["kl"]
    assert near[1].extra == {}                                      # nothing was learnt
    other = replace(SAMPLES[0], tools=SAMPLES[1].tools)             # they are read in either case
    fresh = {name: (A, torch.ones_like(B)) for name, (A, B) in fresh.items()}
    kl = [divergence(agent, x, fresh, config)["kl"] for x in (SAMPLES[0], other)]
    assert kl[0] != kl[1]
