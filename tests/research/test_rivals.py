"""Each rival does what sets it apart. Where it can be, the lines of H, S and G are made by hand."""
from dataclasses import asdict, replace

import pytest
import torch
from small import (MISFIT, NONSENSE, ONE, OPTIONS, OTHER, SAMPLES, Made, agent, assessed, flags,
                   found, keep, lost, write_data)

import data
import train
from augment import Pair
from data import Sample, call_prompt, with_request
from data.calls import Call, call_text
from data.runs import OUT_OF_MEMORY, Kept, read_run
from evaluate import exact_match
from lora import new_params
from model import seeded
from research import rivals
from research.rivals import RIVALS, RivalConfig, Sampled, Split
from research.stream import adapt_with, answer_with

CONFIG = RivalConfig(**OPTIONS, then_vote=True, draws=2)
SURE, UNSURE, MIXED = [[(ONE, u) for u in us] for us in ([1.0] * 3, [0.0] * 3, [0.94, 0.95, 1.0])]
DRAWN, SAME = [OTHER, MISFIT, NONSENSE, ONE, MISFIT], call_text((Call("f", {"x": "1"}),))


def improve(agent, rival, h, s=None, g=(), seen=None, **options):
    """Outcomes where these are the lines of H (text, margin), S (texts) and G (pairs)."""
    lines = {"H": {x.id: assessed(x.id, *own) if own else lost(x.id) for x, own in zip(SAMPLES, h)},
             "G": found(*g)}
    if s:
        lines["S"] = {x.id: Sampled(x.id, texts=own) for x, own in zip(SAMPLES, s)}
    config, more = replace(CONFIG, **options), {"seen": seen} if seen else {}
    return rival(SAMPLES, config, Made(agent, config, **lines), **more)


def texts(outcomes):
    return [outcome.t and outcome.t.text for outcome in outcomes]


def greedy(agent, chat) -> str:
    """The answer by plain passes over everything."""
    ids, answer = sum(agent.tokenizer.chat(chat), []), []
    for _ in range(CONFIG.max_new_tokens):                          # this model does not end
        hidden = agent.model([ids + answer])
        answer.append(int(agent.model.lm_head(hidden[0, -1]).argmax()))
    return agent.tokenizer.decode(answer)


@pytest.mark.parametrize("rival, h, s, expected", [
    (rivals.vote, MIXED, [DRAWN] * 3, [MISFIT, None, None]),        # tau is 0.95
    (rivals.vote, UNSURE, [[OTHER, SAME, NONSENSE, ONE], [OTHER, ONE], [ONE, OTHER]],
     [SAME, OTHER, ONE]),                                           # the first among equals
    (rivals.retry, [(NONSENSE, 1.0), (ONE, 0.0), (MISFIT, 0.0)],            # however sure
     [DRAWN, [], [NONSENSE, "k()"]], [OTHER, None, MISFIT])])       # none fits: the direct answer
def test_vote_takes_what_most_call_and_retry_the_first_that_fits(rival, h, s, expected, agent):
    outcomes = improve(agent, rival, h, s)
    assert texts(outcomes) == expected
    for outcome, own in zip(outcomes, s):
        drawn = outcome.extra.get("sampled", {"texts": None})
        assert drawn["texts"] == (own if outcome.t else None)


def test_prune_leaves_out_the_optional_arguments_that_nobody_spoke_of(agent):
    tool = {"name": "f", "description": "", "required": ["x"], "parameters": {
        name: {"type": "string"} for name in "xyz"}}
    sample = Sample("toolalpaca-0", ({"role": "user", "content": "Do it in Oslo."},), (tool,))
    call = '{"name": "f", "arguments": {"x": "unsaid", "y": "oslo", "z": "unsaid"}}'
    for text, expected in [(call, '{"name": "f", "arguments": {"x": "unsaid", "y": "oslo"}}'),
                           (ONE, None), (NONSENSE, None)]:      # as it is: nothing is acted on
        h = {"H": {sample.id: assessed(sample.id, text)}}
        outcome, = rivals.prune([sample], CONFIG, Made(agent, CONFIG, **h))
        assert (outcome.t and outcome.t.text) == expected


def test_an_answer_is_drawn_by_its_seed_id_and_number_whatever_is_drawn_beside_it(agent):
    config = replace(CONFIG, draws=4)
    apart = [rivals.draw(agent, [x], config)[0] for x in SAMPLES]
    assert apart == rivals.draw(agent, SAMPLES, config)
    first, second = apart[0].texts, rivals.draw(agent, SAMPLES[:1], replace(config, seed=1))
    assert len({*first, *second[0].texts}) > 5 and first != second[0].texts
    few, = rivals.draw(agent, SAMPLES[:1], replace(config, draws=3))
    assert few.texts == first[:3]


def test_again_shows_the_direct_answer_and_asks_once_more(agent):
    chat = [*call_prompt(SAMPLES[0]), {"role": "assistant", "content": "the answer"},
            {"role": "user", "content": rivals.ASK_AGAIN}]
    h = [("the answer", 0.0), (ONE, 1.0), (NONSENSE, 1.0)]
    assert texts(improve(agent, rivals.again, h)) == [greedy(agent, chat), None, None]


def test_told_says_in_the_prompt_of_every_sample_what_to_leave_out(agent):
    chats = []
    for sample in SAMPLES:
        system, last = call_prompt(sample)
        asked = f"{last['content']}\n\n{rivals.LEAVE_OUT}"
        chats.append([system, {"role": "user", "content": asked}])
    assert texts(improve(agent, RIVALS["told"], SURE)) == [greedy(agent, chat) for chat in chats]


def test_tticl_shows_the_pairs_before_the_request_and_trains_nothing(agent):
    h, pairs = [(ONE, 0.0), (ONE, 0.0), (ONE, 1.0)], [Pair("Do it.", "so")]
    first, empty, sure = improve(agent, rivals.tticl, h, g=[pairs, []])
    system, asked = call_prompt(SAMPLES[0])
    shown = call_prompt(with_request(SAMPLES[0], "Do it."))[1]
    chat = [system, shown, {"role": "assistant", "content": "so"}, asked]
    assert first.t.text == greedy(agent, chat) and first.t.losses == [] and first.g.pairs == pairs
    assert empty.t is None and sure.g is None


def test_icl_shows_k_labelled_examples_drawn_for_each_sample_and_asks_of_all(agent):
    split = Split({i: replace(SAMPLES[0], answers=(Call("f", {"x": i}),)) for i in range(5)})
    read, encode = [], agent.tokenizer.encode
    labels = [call_text(x.answers) for x in split.values()]
    agent.tokenizer.encode = lambda text: read.append(text) or encode(text)
    assert None not in texts(improve(agent, RIVALS["icl"], SURE, k=2, seen=[split]))
    shown = [label for text in read for label in labels if label in text]
    assert len(shown) == 3 * 2 and not shown[:2] == shown[2:4] == shown[4:]
    assert all(shown[i] != shown[i + 1] for i in (0, 2, 4))


@pytest.mark.parametrize("adapt", ["full", "suffix", "answer"])
def test_then_vote_samples_each_samples_own_model(agent, adapt):
    """At temperature 0 a sampled answer is the greedy one: of the adapter, or of the base model."""
    g, h = [[Pair("Do 0.", "a text")], []], [(ONE, 0.0), (ONE, 0.0), (ONE, 1.0)]
    learnt, *others = improve(agent, rivals.then_vote, h, g=g, adapt=adapt, epochs=3, lr=2e-2,
                              temperature=0.0)
    base = [greedy(agent, call_prompt(x)) for x in SAMPLES]
    assert learnt.extra["sampled"]["texts"] == [learnt.t.text] * 2 != [base[0]] * 2
    assert [o.extra["sampled"]["texts"] for o in others] == [[text] * 2 for text in base[1:]]


def test_after_the_base_method_every_sampled_answer_is_the_base_models(agent):
    s = [[ONE], [OTHER], []]
    outcomes = improve(agent, rivals.then_vote, UNSURE, s, method="base")
    assert texts(outcomes) == [None] * 3 and [o.extra["sampled"]["texts"] for o in outcomes] == s


@pytest.mark.parametrize("rival", ["prune", "told", "vote", "retry", "again", "tticl", "then_vote"])
def test_where_h_failed_a_rival_does_nothing(agent, rival):
    rival = {**RIVALS, "then_vote": rivals.then_vote}[rival]
    outcomes = improve(agent, rival, [(NONSENSE, 0.0), None, (NONSENSE, 0.0)], [DRAWN] * 3,
                       [[], [], []])
    assert (outcomes[1].g, outcomes[1].t, outcomes[1].extra) == (None, None, {})


def test_where_sampling_failed_the_direct_answer_stands(agent):
    s = {x.id: Sampled(x.id, failed=OUT_OF_MEMORY) for x in SAMPLES}
    lines = {"H": {x.id: assessed(x.id, NONSENSE) for x in SAMPLES}, "S": s}
    assert texts(rivals.vote(SAMPLES, CONFIG, Made(agent, CONFIG, **lines))) == [None] * 3
    assert texts(rivals.retry(SAMPLES, CONFIG, Made(agent, CONFIG, **lines))) == [NONSENSE] * 3


def test_a_run_holds_verdicts_on_what_was_sampled(flags, tmp_path):
    flags = [*flags, "--rival", "vote", "--tau", "1"]
    config = train.fill_in(train.parse_args(flags, RivalConfig))
    agent, samples = train.set_up(config)
    drawn, kept = [[ONE, OTHER], [ONE, ONE], [NONSENSE, MISFIT]], Kept(agent, config)
    seen = [replace(x, answers=()) for x in samples]
    keep(kept, train.assess, seen, [assessed(x.id, NONSENSE) for x in seen])
    keep(kept, rivals.draw, seen, [Sampled(x.id, texts=own) for x, own in zip(seen, drawn)])
    assert rivals.main(flags) == 0                                  # which reads these lines
    run = read_run(tmp_path / "run")
    assert run.config["method"] == "vote"
    for record, sample, own in zip(run.records, samples, drawn):
        assert record.extra["sampled"] == [asdict(exact_match(text, sample)) for text in own]
        assert record.answer.text == own[0] and record.seconds["sampled"] >= 0
    assert [r.answer.exact for r in run.records] == [True, True, False]


def test_sft_trains_as_the_core_does(agent):
    x = replace(SAMPLES[0], answers=(Call("f", {"x": 1}),))
    params = rivals.supervised(agent, [x], CONFIG)
    plain = new_params(agent.model, CONFIG.rank, [seeded(0, "sft", "lora")])
    adapt_with(agent, x, [(x, call_text(x.answers))], CONFIG, plain)
    for name, pair in plain.items():
        torch.testing.assert_close(params[name], pair, rtol=0, atol=1e-4)
    long = replace(x, messages=({"role": "user", "content": "too long " * 999},))
    with pytest.raises(ValueError, match="--train-data: .* tokens exceed"):     # and no sample's
        rivals.answer_supervised(agent, SAMPLES, CONFIG, Split({0: long}))
    with pytest.raises(RuntimeError, match="non-finite"):
        rivals.supervised(agent, [x], replace(CONFIG, lr=1e18))


def test_the_one_adapter_of_sft_answers_every_sample(flags, tmp_path):
    split = write_data(tmp_path / "split.json", *"abc", x=2)
    flags = [*flags, "--rival", "sft", "--train-data", split, "--adapt", "suffix"]  # it is full
    assert rivals.main(flags) == 0
    config = train.fill_in(train.parse_args(flags, RivalConfig))
    agent, samples = train.set_up(config)
    params = rivals.supervised(agent, data.load("toolalpaca", split), config)
    said = answer_with(agent, samples, params, replace(config, adapt="full"))
    records = read_run(tmp_path / "run").records
    assert [line.text for line in said] == [record.answer.text for record in records]


@pytest.mark.parametrize("more, said", [
    ("", "choose a --rival"), ("--rival vote --then-vote", "choose a --rival"),
    ("--rival icl", "--train-data"), ("--rival vote --train-data x", "--train-data"),
    ("--rival icl --limit 1 --train-data {}", "1 of its requests are test samples")])
def test_what_cannot_be_meant_is_refused(more, said, flags, tmp_path, capsys):
    split = write_data(tmp_path / "split.json", "New.", "  Do  two. ", x=2)     # spaced otherwise
    assert rivals.main([*flags, *more.format(split).split()]) == 2
    assert said in capsys.readouterr().err
