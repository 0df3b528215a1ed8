"""The scores of uncertainty, and the measures of their quality: by hand, and against references."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics

from evaluate import Record, Verdict, write_run
from model import Tokenizer
from research import scores
from research.scores import SCORES, Evidence


def evidence(*p: float, **more) -> Evidence:
    """Candidates of the probabilities p, and an answer of three tokens, the second one a name."""
    seen = Evidence("x", np.log(p), np.array([-0.5, -1.5, 0.0]), np.array([0.25, 0.75, 0.5]), 7,
                    {"name": [1], "values": []}, np.ones(len(p)))
    return replace(seen, **more)


def record(i: int, base: bool, answer: bool, margin: float, **more) -> Record:
    """A sample with two tools whose direct answer is `base`, and `answer` afterwards."""
    def verdict(exact):
        return Verdict("f(x=1)", exact, "", exact, True, "", exact, float(exact), float(exact))
    p = (1 + margin) / 2
    seen = Record(
        f"x-{i}", "What?", margin, margin < 0.6, "adapted" if margin < 0.6 else "certain",
        {"f": math.log(p), "g": math.log(1 - p)}, verdict(base), verdict(answer), [], [], [], [],
        {"H": 1.0}, {"H": 9}, '{"name": "f", "arguments": {}}', True, [-1.0, -float(not base)],
        [0.5, 0.5], [1], 7 + i)
    return replace(seen, **more)


def column(*values) -> np.ndarray:
    return np.array(values, float)


# --- The scores -----------------------------------------------------------------------------------

SEEN, ONE, EVEN = evidence(0.7, 0.2, 0.1), evidence(1.0), [[0.5, 0.5], [0.5, 0.5]]
LONG = evidence(1, 1, candidates=column(-1, -4), lengths=column(1, 4))
VOTES = evidence(0.5, 0.5, meanings=["a", "a", "b", "c"])


@pytest.mark.parametrize("name, seen, value", [
    ("margin", SEEN, 0.5), ("least_confidence", SEEN, 0.3), ("log_odds", SEEN, math.log(2 / 7)),
    ("entropy", SEEN, -0.7 * math.log(0.7) - 0.2 * math.log(0.2) - 0.1 * math.log(0.1)),
    ("candidates", SEEN, 3), ("prompt_tokens", SEEN, 7), ("answer_tokens", SEEN, 3),
    ("answer_nll", SEEN, 2), ("answer_perplexity", SEEN, math.exp(2 / 3)), ("name_nll", SEEN, 1.5),
    ("answer_mean_entropy", SEEN, 0.5), ("answer_max_entropy", SEEN, 0.75),
    ("name_max_entropy", SEEN, 0.75), ("values_nll", SEEN, math.nan),       # a part that is missing
    ("margin", ONE, 0), ("log_odds", ONE, -math.inf), ("normalised_entropy", ONE, 0),
    ("normalised_entropy", evidence(*[0.2] * 5), 1), ("mean_margin", LONG, 1),
    ("mutual_information", evidence(1, 1, orders=np.log(np.eye(2) + 1e-12)), math.log(2)),
    ("mutual_information", evidence(1, 1, orders=np.log(EVEN)), 0),
    ("vote_share", VOTES, 0.5), ("semantic_entropy", VOTES, 1.5 * math.log(2))])
def test_a_score_by_hand(name, seen, value):
    assert SCORES[name].value(seen) == pytest.approx(value, abs=1e-9, nan_ok=True)


def test_a_score_is_computed_where_all_lines_have_its_data():
    sampled = [{"text": "f(x=1)"}, {"text": '{"name": "f", "arguments": {"x": 1}}'}, {"text": "no"}]
    first = record(0, True, True, 0.5, extra={"sampled": sampled, "orders": [[-1.0, -2.0]] * 2})
    found = scores.scores_of([first])
    assert found["vote_share"] == pytest.approx([1 / 3])        # two ways to write one call
    assert found["mutual_information"] == pytest.approx([0])
    assert "name_nll" not in found                              # which needs a tokenizer
    found = scores.scores_of([first, record(1, True, True, 0.5)])
    assert "vote_share" not in found and found["margin"] == pytest.approx([0.5, 0.5])


def test_the_parts_of_an_answer_and_the_lengths_of_names():
    tokenizer = Tokenizer(scores.TINY)
    ids = tokenizer.encode('<tool_call>\n{"name": "get_user", "arguments": {"name": "Ana", '
                           '"n": 12, "of": {"x": "y z"}}}\n</tool_call>')
    seen = scores.evidence(record(0, True, True, 0.5, ids=ids), tokenizer)
    name, values = ("".join(tokenizer.decode([ids[i]]) for i in seen.parts[part])
                    for part in ("name", "values"))
    assert "get_user" in name and "Ana" not in name
    assert all(value in values for value in ("Ana", "12", "y z"))
    assert "user" not in values and "arguments" not in values
    assert seen.lengths.tolist() == [len(tokenizer.encode(name)) + 1 for name in "fg"]


# --- Thresholds and measures ----------------------------------------------------------------------

FALLING, ERROR = column(4, 3, 2, 1), np.array([True, False, True, False])


@pytest.mark.parametrize("measure, arguments, value", [
    (scores.threshold_between, ([1, 2, 3, 4], 1), 3.5),
    (scores.threshold_between, ([2, 2, 1], 1), 2),              # ties: fewer
    (scores.threshold_between, ([1, 1], 2), -math.inf),
    (scores.threshold_between, ([1, 5, math.nan, 2, 4, 3], 2), 4.5),
    (scores.otsu, ([-math.inf, 0, 0.1, 0.9, 1, math.nan],), 0.5), (scores.otsu, ([],), 0),
    (scores.otsu, ([0, 1, 2, 7, 8, 13],), 4.5),                 # one outlier is no group of weight
    (scores.ranking, (FALLING, ERROR), {
        "AUROC": 3 / 4, "AUPR": 5 / 6, "FPR@95": 0.5, "AURC": (0 + 1 / 2 + 1 / 3 + 1 / 2) / 4,
        "E-AURC": 0.125, "PRR": (1 / 2 - 1 / 3) / (1 / 2 - 5 / 24)}),
    (scores.ranking, (FALLING, FALLING > 0), dict.fromkeys(scores.RANKING, math.nan)),
    (scores.cumulative, (column(-math.inf, math.nan, 2), column(0, 1, 0)), [0, 1, 1, 1]),
    (scores.calibration, (column(0.95, 0.95, 0.55, 0.55), np.array([True, False, True, True])), {
        "ECE": 0.45, "ECE (equal mass)": 0.475, "MCE": 0.45,
        "Brier": (0.0025 + 0.9025 + 2 * 0.2025) / 4,
        "NLL": -(math.log(0.95) + math.log(0.05) + 2 * math.log(0.55)) / 4}),
    (scores.temperature, (np.array([[4, 0, -np.inf]] * 4), np.array([0, 0, 0, 1])),
     4 / math.log(3)),                                          # sigmoid(4 / T) = 3 / 4
    (scores.gate_rates, (FALLING > 2, ERROR), {"TPR": 0.5, "FPR": 0.5, "precision": 0.5}),
    (scores.gain_budget, (FALLING, column(1, 0, -1, 0)), [0, 0.25, 0.25, 0, 0]),
    (scores.qini, (FALLING, column(1, 0, -1, 0)), 0.1),         # where a random gate gains nothing
    (scores.qini, (FALLING, column(1, 0, 1, 0)), 0.25 / 5),     # and where it does
    (scores.interval, (column(1, math.nan, 1),), (1, 1))])
def test_a_measure_by_hand(measure, arguments, value):
    assert measure(*arguments) == pytest.approx(value, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("n, levels", [(12, 3), (80, 6), (200, 1000)])
def test_what_is_counted_by_hand_equals_scikit_learn(n, levels):
    rng = np.random.default_rng(n)
    score, error, p = rng.integers(levels, size=n) * 1.0, rng.random(n) < 0.4, rng.random(n)
    found, least = scores.ranking(score, error), np.sort(score[error])[::-1]
    assert found["AUROC"] == pytest.approx(metrics.roc_auc_score(error, score))
    flagged = score >= least[math.ceil(0.95 * len(least)) - 1]      # until 95 % of the errors are
    assert found["FPR@95"] == pytest.approx(flagged[~error].mean())
    assert scores.calibration(p, error)["NLL"] == pytest.approx(metrics.log_loss(error, p))


def test_tied_risks_are_the_mean_over_their_orders():
    error = [0, 1, 0, 1, 1]
    orders = [scores.risk_coverage(scores.cumulative(column(1, 2, 3, 4, 5), column(0, *middle, 1)))
              for middle in itertools.permutations(error[1:4])]
    tied = scores.risk_coverage(scores.cumulative(column(1, 2, 2, 2, 3), column(*error)))
    assert tied == pytest.approx(np.mean(orders, axis=0))


def test_cross_fitting_never_looks_at_a_samples_own_label():
    rows = np.array([[2.0 + i % 3, 0.0] for i in range(20)])
    gold = np.array([int(i % 4 == 0) for i in range(20)])
    other = gold.copy()
    other[7] = 1 - other[7]
    one, two = scores.cross_fitted(rows, gold), scores.cross_fitted(rows, other)
    assert (one[2::5] == two[2::5]).all() and (one != two).any()        # sample 7 is of fold 2


def test_the_first_choice_of_samples_that_have_one():
    without = record(2, True, True, 0.5, candidates={"f": -1.0})
    found = scores.choices([
        record(0, True, True, 0.5), record(1, True, True, 0.5, gold="h()"), without,
        record(3, True, True, 0.5, gold=""),
        record(4, True, True, 0.5, candidates={"g": 0.0, "f": -1.0, "h": -2.0})])
    assert found.gold.tolist() == [0, -1, 1] and found.right.tolist() == [True, False, False]
    assert found.p[:2] == pytest.approx([0.75, 0.75]) and found.scores.shape == (3, 3)
    assert scores.choices([without]) is None


def test_the_interval_of_a_mean_is_the_textbooks():
    x = np.random.default_rng(3).normal(size=400)
    drawn = scores.bootstrap(lambda x: {"mean": x.mean()}, 1000, x)["mean"]
    low, high = x.mean() - 1.96 / 20, x.mean() + 1.96 / 20
    assert scores.interval(drawn) == pytest.approx((low, high), abs=0.02)


def test_the_report_finds_the_score_that_knows(tmp_path, capsys):
    """The log-probability of the answer is low where it is wrong, and the margin is not. Where all
    are wrong, nothing is ranked."""
    config = {"bench": "sealtool", "model": "tiny", "tau": 0.6}
    records = [record(i, i % 3 > 0, i % 3 > 0 or i % 2 > 0, i % 5 / 5) for i in range(30)]
    write_run(tmp_path / "run", config, records)
    write_run(tmp_path / "wrong", config | {"model": "x/none"}, records[:1])
    runs = [str(tmp_path / name) for name in ("run", "wrong")]
    assert scores.main([*runs, "--times", "15"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    best = next(line for line in lines if line[-2:] == ["the", "best"] and "AUROC" not in line)
    assert best[0] == "answer_nll" and best[1:4] == ["1.00", "[1.00,", "1.00]"]
    assert next(line for line in lines if line[:1] == ["margin"])[-1] == "worse"
    assert "all 1 direct answers are wrong" in printed and "Without the model's" in printed
    assert scores.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
