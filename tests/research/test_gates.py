"""A gate is a function of H's lines; only the oracle looks at a label."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
from small import ONE, OTHER, SAMPLES, Made, assessed, flags, keep, lost

import train
from augment import Found, Pair, synthesize
from data.calls import Call
from data.runs import Kept, read_run
from research import gates
from research.gates import GateConfig, let_through

LINES = [assessed("a", ONE, 0.1, 5.0), assessed("b", "nonsense", 0.9, 1.0),
         assessed("c", ONE, 0.5, 4.0), assessed("d", OTHER, 0.4, 0.5)]
WORDS = SimpleNamespace(encode=str.split, decode=lambda ids: "")       # all that scores need of it


def through(*more, answers=(Call("f", {"x": 1}),), **options) -> str:
    h = {line.id: line for line in [*LINES, *more]}
    samples = [replace(SAMPLES[0], id=id, answers=answers) for id in h]
    config, agent = GateConfig(tau=0.5, **options), SimpleNamespace(batch=3, tokenizer=WORDS)
    return "".join(sorted(let_through(agent, samples, config, Made(agent, config, H=h))))


def test_all_and_certain():
    assert (through(gate="all"), through(gate="certain")) == ("abcd", "bc")     # c is at tau


def test_random_draws_as_many_as_are_uncertain_whatever_their_margin():
    drawn = {through(gate="random", seed=seed) for seed in range(9)}
    assert all(len(ids) == 2 for ids in drawn) and len(drawn) > 2


def test_the_oracle_lets_those_through_whose_direct_answer_is_wrong_and_no_other_reads_a_label():
    assert through(gate="oracle") == "bd"
    for gate in ("all", "certain", "random", "score"):
        assert through(answers=(), gate=gate) == through(gate=gate)


def test_a_score_lets_those_through_that_are_above_its_threshold():
    score = {"gate": "score", "gate_score": "answer_nll"}           # a 5, b 1, c 4, d 0.5
    assert through(**score, threshold="0.9") == "abc"
    assert through(**score, threshold="4") == "a"                   # above, not at
    assert through(**score, budget=0.75) == "abc" and through(**score, budget=1.0) == "abcd"
    assert through(**score) == "ac"                                 # Otsu: 5, 4 | 1, 0.5
    undefined = assessed("e", "", 0.9, float("nan"))                # is sure of nothing
    assert through(undefined, **score, threshold="4") == "ae"


@pytest.mark.parametrize("gate", ["all", "certain", "random", "oracle", "score"])
def test_no_gate_lets_one_through_whose_h_failed(gate):
    assert through(lost("e"), gate=gate) == through(gate=gate)
    agent, lines = SimpleNamespace(batch=3, tokenizer=WORDS), {"a": lost("a")}
    config, samples = GateConfig(gate=gate), [replace(SAMPLES[0], id="a")]
    assert let_through(agent, samples, config, Made(agent, config, H=lines)) == set()


@pytest.mark.parametrize("gate, chosen", [("oracle", [1, 2]), ("certain", [1])])
def test_the_program_writes_and_trains_for_whom_the_gate_lets_through(gate, chosen, flags,
                                                                      tmp_path):
    flags = [*flags, "--gate", gate, "--tau", "0.5", "--epochs", "1"]
    config = train.fill_in(train.parse_args(flags, GateConfig))
    agent, samples = train.set_up(config)
    kept, seen = Kept(agent, config), [replace(x, answers=()) for x in samples]
    said = zip(seen, [(ONE, 0.1), ("nonsense", 0.9), (OTHER, 0.4)])
    h = keep(kept, train.assess, seen, [assessed(x.id, *line) for x, line in said])
    keep(kept, synthesize, seen, [Found(x.id, pairs=[Pair("a", "b")]) for x in seen], h)
    assert gates.main(flags) == 0                                   # which reads these lines
    run = read_run(tmp_path / "run")
    assert run.config["uses_labels"] == (gate == "oracle")
    assert [i for i, record in enumerate(run.records) if record.uncertain] == chosen
    assert [i for i, record in enumerate(run.records) if record.losses] == chosen


def test_a_gate_must_be_named():
    with pytest.raises(ValueError, match="--gate is needed"):
        through()
