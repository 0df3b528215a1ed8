"""The rivals of TT-SI and the controls: each does what sets it apart, on the bundled model."""
import dataclasses

import pytest

import data
import evaluate
import train
from augment import Pair
from data import call_prompt, call_text
from data.calls import Call
from data.tiny import make
from model import PrefixCaches, Tokenizer, load_model
from train import TINY, Agent, Config

CONFIG = Config(bench="toolalpaca", lr=train.TINY_LR, max_new_tokens=48, tau=1.0, gate="all")
SAMPLES = [data.parse_sample(item, f"toolalpaca-{i}", "test") for i, item in enumerate(make.generate("toolalpaca", "train", 7, 3))]
RIGHT = [call_text(sample.answers) for sample in SAMPLES]


@pytest.fixture(scope="module")
def agent() -> Agent:
    model = load_model(TINY)
    return Agent(model, Tokenizer(TINY), PrefixCaches(model))


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    monkeypatch.setattr(train, "fine_tune", None)               # calling it would fail


def run(agent, method, **options) -> list[train.Record]:
    return train.self_improve(agent, [s.without_answers() for s in SAMPLES], dataclasses.replace(CONFIG, method=method, **options))


def asked(monkeypatch, agent) -> list[str]:
    """The prompts that greedy answers are asked for, as text, the direct ones first."""
    prompts, real = [], train.answer

    def answer(agent, rows, config, cache=None, watch=None):
        prompts.extend(agent.tokenizer.decode(row) for row in rows)
        return real(agent, rows, config, cache, watch)
    monkeypatch.setattr(train, "answer", answer)
    return prompts


def test_tticl_puts_the_pairs_before_the_request(agent, monkeypatch):
    pair = Pair("Count my apples.", (Call("f", {}),), "the text of the pair", 3)
    monkeypatch.setattr(train, "synthesize", lambda writer, samples, *rest: [([pair], [])] * len(samples))
    prompts = asked(monkeypatch, agent)
    records = run(agent, "tticl")
    for prompt, sample in zip(prompts[len(SAMPLES):], SAMPLES):
        request = sample.messages[-1]["content"]
        assert prompt.index("Count my apples.") < prompt.index("the text of the pair") < prompt.index(request)
    assert [r.outcome for r in records] == ["adapted"] * 3 and not any(r.losses for r in records)


def test_ttd_trains_on_what_the_teacher_writes(agent, monkeypatch):
    wrote = []

    def synthesize(writer, samples, *rest):
        wrote.append(writer)
        return [([Pair("a request", (), "the teacher's text", 3)], [])] * len(samples)
    monkeypatch.setattr(train, "synthesize", synthesize)
    monkeypatch.setattr(train, "fine_tune", lambda agent, examples, *rest: wrote.append(examples) or ([[0.0]] * len(examples),) * 2)
    run(dataclasses.replace(agent, teacher="the teacher"), "ttd", teacher="somewhere")
    assert wrote[0] == "the teacher" and agent.tokenizer.decode(wrote[1][0][0][1]).startswith("the teacher's text")


@pytest.mark.parametrize("flags", [["--method", "ttd"], ["--teacher", "tiny"]])
def test_a_teacher_and_ttd_belong_together(flags, capsys):
    assert train.main(["--bench", "toolalpaca", *flags]) == 2 and "--teacher" in capsys.readouterr().err


def test_a_run_with_a_teacher(tmp_path):
    assert train.main(["--bench", "toolalpaca", "--model", "tiny", "--device", "cpu", "--limit", "2", "--method", "ttd", "--teacher", "tiny",
                       "--out", str(tmp_path)]) == 0
    assert "teacher" in evaluate.read_json(tmp_path / "facts.json")


def test_again_shows_the_direct_answer_and_asks_once_more(agent, monkeypatch):
    prompts = asked(monkeypatch, agent)
    records = run(agent, "again")
    for prompt, record in zip(prompts[len(SAMPLES):], records):
        assert prompt.index(record.request) < prompt.index(record.base["text"]) < prompt.index("Think again")


def scripted(monkeypatch, *texts):
    monkeypatch.setattr(train, "sample_texts", lambda m, t, p, prompts, limit, temperature, top_p, keys: [list(texts)] * len(prompts))


def test_vote_counts_calls_and_not_spellings(agent, monkeypatch):
    right, spaced = RIGHT[0], RIGHT[0].replace('": ', '":   ')
    scripted(monkeypatch, "nonsense", right, call_text((Call("other", {}),)), spaced, call_text((Call("third", {}),)))
    record = run(agent, "vote")[0]
    assert record.answer["text"] == right and [s["text"] for s in record.sampled][3] == spaced


def test_retry_keeps_what_fits_and_else_takes_the_first_that_does(agent, monkeypatch):
    bases = ["nonsense", RIGHT[1], "nonsense"]
    monkeypatch.setattr(train, "answer", lambda agent, rows, config, cache, watch: [
        (watch(range(len(rows)), agent.model.logits(agent.model(train.torch.tensor([row for row in rows]))[:, -1])), ({"text": text}, 1))[1]
        for text in bases])
    scripted(monkeypatch, "still nonsense", RIGHT[0])
    first, second, third = run(agent, "retry")
    assert (first.answer["text"], first.outcome) == (RIGHT[0], "adapted")
    assert (second.answer["text"], second.sampled) == (RIGHT[1], [])
    assert third.answer["text"] == "nonsense"                   # the other's answer does not fit its tools


def test_the_gates_are_what_they_say(agent):
    margins = [r.margin for r in run(agent, "base")]
    tau = sorted(margins)[1]                                    # one is below it
    for gate, acted in (("score", [m < tau for m in margins]), ("certain", [m >= tau for m in margins]), ("all", [True] * 3)):
        records = run(agent, "vote", gate=gate, tau=tau, samples=2)
        assert [bool(r.sampled) for r in records] == acted and [r.uncertain for r in records] == [m < tau for m in margins]


@pytest.mark.parametrize("method", ["base", "tticl", "vote", "retry", "again"])
def test_labels_never_reach_a_method(agent, method):
    canaries = [dataclasses.replace(s, answers=(Call("canary", {"x": "canary"}),)) for s in SAMPLES]
    config = dataclasses.replace(CONFIG, method=method, samples=2, max_new_tokens=16)
    def texts(samples): return [(r.base, r.answer, r.pairs, r.sampled) for r in train.self_improve(agent, samples, config)]
    assert texts(canaries) == texts([s.without_answers() for s in SAMPLES]) and "canary" not in str(texts(canaries))


def test_pass_at_k_is_any_of_the_sampled(tmp_path, capsys):
    assert train.main(["--bench", "toolalpaca", "--model", "tiny", "--device", "cpu", "--limit", "3", "--method", "vote", "--gate", "all",
                       "--samples", "3", "--out", str(tmp_path)]) == 0
    records = evaluate.read_records(tmp_path)
    share = sum(any(s["exact"] for s in r["sampled"]) for r in records) / 3
    assert all(len(r["sampled"]) == 3 for r in records) and f"pass@3 {100 * share:.1f}" in capsys.readouterr().out
