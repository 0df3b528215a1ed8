"""A gate is a pure function of H's lines; only the oracle looks at a label."""
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

import train
from augment import Found, Pair
from data import Sample
from data.calls import Call
from evaluate import read_run
from research import gates
from research.gates import GateConfig, at_random, let_through
from train import Assessed, Kept

CONFIG = GateConfig(gate="all", tau=0.5)
TOOLS = ({"name": "f", "description": "", "parameters": {}},)
WORDS = SimpleNamespace(encode=str.split, decode=lambda ids: "")       # all that scores need of it


def line(id, margin, text, nll) -> Assessed:
    return Assessed(id=id, request="", candidates={"f": 0.0, "g": -1.0}, margin=margin, text=text,
                    ids=[1], log_p=[-nll], entropy=[0.0], prompt_tokens=9)


LINES = [line("a", 0.1, "f()", 5.0), line("b", 0.9, "nonsense", 1.0), line("c", 0.5, "f()", 4.0),
         line("d", 0.4, "g()", 0.5)]
SAMPLES = [Sample(x.id, ({"role": "user", "content": ""},), TOOLS, (Call("f", {}),)) for x in LINES]


def through(samples=SAMPLES, lines=LINES, **options) -> str:
    return "".join(sorted(let_through(lines, samples, replace(CONFIG, **options), WORDS)))


def test_all_and_certain():
    assert (through(gate="all"), through(gate="certain")) == ("abcd", "bc")     # c is at tau


def test_random_draws_as_many_as_are_uncertain_whatever_their_margin():
    drawn = {through(gate="random", seed=seed) for seed in range(9)}
    assert all(len(ids) == 2 for ids in drawn) and len(drawn) > 2
    assert at_random(LINES, 3, 0) == at_random(LINES[::-1], 3, 0)               # no order matters
    assert at_random(LINES, 2, 0) < at_random(LINES, 3, 0)


def test_the_oracle_lets_those_through_whose_direct_answer_is_wrong_and_no_other_reads_a_label():
    assert through(gate="oracle") == "bd"
    unlabelled = [sample.without_answers() for sample in SAMPLES]
    for gate in ("all", "certain", "random", "score"):
        assert through(unlabelled, gate=gate) == through(gate=gate)


def test_a_score_lets_those_through_that_are_above_its_threshold():
    score = {"gate": "score", "gate_score": "answer_nll"}           # a 5, b 1, c 4, d 0.5
    assert through(**score, threshold="0.9") == "abc"
    assert through(**score, threshold="4") == "a"                   # above, not at
    assert through(**score, budget=0.75) == "abc" and through(**score, budget=1.0) == "abcd"
    assert through(**score) == "ac"                                 # Otsu: 5, 4 | 1, 0.5
    undefined = [*LINES, line("e", 0.9, "", float("nan"))]          # is sure of nothing
    assert through(lines=undefined, **score, threshold="4") == "ae"


@pytest.mark.parametrize("options, said", [
    ({"gate": ""}, "--gate is needed"), ({"method": "base"}, "--method base"),
    ({"budget": 2.0}, "--budget 2.0"), ({"budget": 0.5, "threshold": "1"}, "choose one"),
    ({"threshold": "high"}, "--threshold high"), ({"threshold": "nan"}, "--threshold nan"),
    ({"gate": "score", "gate_score": "vote_share"}, "vote_share: H's lines do not hold")])
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        through(**options)


@pytest.mark.parametrize("gate, chosen", [("oracle", "bd"), ("certain", "bc")])
def test_the_program_writes_and_trains_for_whom_the_gate_lets_through(gate, chosen, checkpoint,
                                                                      tmp_path):
    item = {"query": "Do it.", "tools": TOOLS, "answers": [{"name": "f", "arguments": {}}]}
    path = tmp_path / "data.json"
    path.write_text(json.dumps([item] * 4))
    flags = ["--bench", "toolalpaca", "--model", str(checkpoint), "--data", str(path),
             "--device", "cpu", "--max-new-tokens", "4", "--out", str(tmp_path / "run"),
             "--gate", gate, "--tau", "0.5", "--epochs", "1"]
    config = train.choose(train.parse_args(flags, GateConfig))
    agent, samples = train.set_up(config)
    made = [replace(x, id=sample.id) for x, sample in zip(LINES, samples)]
    kept = Kept(config, agent.facts)                                # the program reads these lines
    kept(train.H, samples, lambda xs: made)
    kept(train.G, samples, lambda xs: [Found(x.id, [Pair("a", "b")]) for x in xs])
    assert gates.main(flags) == 0
    run = read_run(tmp_path / "run")
    assert run.config["uses_labels"] == (gate == "oracle")
    assert [r.uncertain for r in run.records] == [id in chosen for id in "abcd"]
    for record in run.records:
        assert record.uncertain == (record.outcome not in ("certain", "direct"))
        assert record.uncertain == bool(record.losses)
