"""The scores of uncertainty, and the measures of their quality: by hand, and against references."""
import itertools
import math
from dataclasses import replace
from pathlib import Path

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


def verdict(exact: bool, text: str = "f(x=1)") -> Verdict:
    return Verdict(text, exact, "" if exact else "wrong name: f for g", exact, True, "", exact,
                   float(exact), float(exact))


def record(i: int, base: bool, answer: bool, margin: float, **more) -> Record:
    """A sample with two tools whose direct answer is `base`, and `answer` afterwards."""
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

@pytest.mark.parametrize("name, value", [
    ("margin", 0.5), ("least_confidence", 0.3), ("log_odds", math.log(2 / 7)), ("candidates", 3),
    ("entropy", -0.7 * math.log(0.7) - 0.2 * math.log(0.2) - 0.1 * math.log(0.1)),
    ("prompt_tokens", 7), ("answer_tokens", 3), ("answer_nll", 2), ("name_nll", 1.5),
    ("answer_perplexity", math.exp(2 / 3)), ("answer_mean_entropy", 0.5),
    ("answer_max_entropy", 0.75), ("name_max_entropy", 0.75)])
def test_a_score_by_hand(name, value):
    assert SCORES[name].value(evidence(0.7, 0.2, 0.1)) == pytest.approx(value)


def test_one_candidate_is_sure_and_a_part_that_is_missing_says_nothing():
    one = evidence(1.0)
    for name in ("margin", "least_confidence", "entropy", "normalised_entropy"):
        assert SCORES[name].value(one) == 0
    assert SCORES["log_odds"].value(one) == -math.inf
    assert math.isnan(SCORES["values_nll"].value(one))


def test_normalised_entropy_is_one_where_nothing_is_known_whatever_n():
    for n in (2, 5):
        assert SCORES["normalised_entropy"].value(evidence(*[1 / n] * n)) == pytest.approx(1)


def test_the_mean_margin_divides_by_the_lengths():
    e = evidence(1, 1, candidates=column(-1, -4), lengths=column(1, 4))
    assert SCORES["mean_margin"].value(e) == 1 and SCORES["margin"].value(e) < 0.2


def test_mutual_information_is_what_the_orders_disagree_on():
    def mi(*rows): return SCORES["mutual_information"].value(evidence(1, 1, orders=np.log(rows)))
    assert mi([1 - 1e-12, 1e-12], [1e-12, 1 - 1e-12]) == pytest.approx(math.log(2))
    assert mi([0.5, 0.5], [0.5, 0.5]) == pytest.approx(0)


def test_votes_by_hand():
    e = evidence(0.5, 0.5, meanings=["a", "a", "b", "c"])
    assert SCORES["vote_share"].value(e) == 0.5
    assert SCORES["semantic_entropy"].value(e) == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(4))


def test_every_score_that_knows_something_rises_with_doubt():
    parts = {"name": [1], "values": [1]}
    sure = evidence(0.9, 0.1, log_p=column(0, -0.1, 0), entropy=column(0.1, 0.1, 0.1), parts=parts,
                    orders=np.log([[0.9, 0.1], [0.9, 0.1]]), meanings=["a"] * 3)
    unsure = replace(sure, candidates=np.log([0.5, 0.5]), log_p=column(0, -2, 0),
                     entropy=column(1, 1, 1), orders=np.log([[0.9, 0.1], [0.1, 0.9]]),
                     meanings=["a", "a", "b"])
    for name in SCORES.keys() - {"random", "candidates", "prompt_tokens", "answer_tokens"}:
        assert SCORES[name].value(unsure) > SCORES[name].value(sure), name


def test_a_score_is_computed_where_all_lines_have_its_data():
    sampled = [{"text": "f(x=1)"}, {"text": '{"name": "f", "arguments": {"x": 1}}'}, {"text": "no"}]
    first = record(0, True, True, 0.5, extra={"sampled": sampled, "orders": [[-1.0, -2.0]] * 2})
    found = scores.scores_of([first])
    assert found["vote_share"] == pytest.approx([1 / 3])        # two ways to write one call
    assert found["mutual_information"] == pytest.approx([0])
    assert "name_nll" not in found                              # which needs a tokenizer
    assert found["margin"] == pytest.approx([0.5]) and found["answer_nll"].tolist() == [1]
    found = scores.scores_of([first, record(1, True, True, 0.5)])
    assert "vote_share" not in found and len(found["margin"]) == 2


def test_the_parts_of_an_answer_and_the_lengths_of_names():
    tokenizer = Tokenizer(scores.TINY)
    ids = tokenizer.encode('<tool_call>\n{"name": "get_user", "arguments": {"name": "Ana", '
                           '"n": 12, "of": {"x": "y z"}}}\n</tool_call>')
    parts = scores.answer_parts(tokenizer, ids)
    read = {part: "".join(tokenizer.decode([ids[i]]) for i in parts[part]) for part in parts}
    assert "get_user" in read["name"] and "Ana" not in read["name"]
    assert all(value in read["values"] for value in ("Ana", "12", "y z"))
    assert "user" not in read["values"] and "arguments" not in read["values"]
    seen = scores.evidence(record(0, True, True, 0.5, ids=ids), tokenizer)
    assert seen.lengths.tolist() == [len(tokenizer.encode(name)) + 1 for name in "fg"]


# --- Thresholds without labels --------------------------------------------------------------------

@pytest.mark.parametrize("values, count, threshold", [
    ([1, 2, 3, 4], 1, 3.5), ([1, 2, 2, 3], 2, 2.5), ([2, 2, 1], 1, 2),      # ties: fewer
    ([1, 1], 2, -math.inf), ([1, 5, math.nan, 2, 4, 3], 2, 4.5), ([1, math.nan], 1, 1)])
def test_a_threshold_parts_the_largest_from_the_rest(values, count, threshold):
    assert scores.threshold_between(values, count) == threshold


def test_otsu_by_hand():
    assert scores.otsu([0, 0.1, 0.9, 1]) == 0.5 and scores.otsu([0, 0.1, 0.2, 1]) == 0.6
    assert scores.otsu([0, 1, 2, 7, 8, 13]) == 4.5              # one outlier is no group of weight
    assert scores.otsu([-math.inf, 0, 0.1, 0.9, 1, math.nan]) == 0.5
    assert scores.otsu([]) == 0


# --- Measures -------------------------------------------------------------------------------------

def test_ranking_by_hand():
    assert scores.ranking(column(4, 3, 2, 1), column(1, 0, 1, 0)) == pytest.approx({
        "AUROC": 3 / 4, "AUPR": 5 / 6, "FPR@95": 0.5, "AURC": (0 + 1 / 2 + 1 / 3 + 1 / 2) / 4,
        "E-AURC": 0.125, "PRR": (1 / 2 - 1 / 3) / (1 / 2 - 5 / 24)})


def test_ties_count_half_one_class_is_no_number_and_nan_is_the_least_sure():
    found = scores.ranking(column(1, 1, 1, 1), column(1, 0, 1, 0))
    assert (found["AUROC"], found["AUPR"], found["AURC"], found["PRR"]) == (0.5, 0.5, 0.5, 0)
    assert all(map(math.isnan, scores.ranking(column(1, 2), column(1, 1)).values()))
    assert scores.ranking(column(math.nan, 2, -math.inf), column(1, 0, 0))["AUROC"] == 1


@pytest.mark.parametrize("n, levels", [(12, 3), (80, 6), (200, 1000)])
def test_what_is_counted_by_hand_equals_scikit_learn(n, levels):
    rng = np.random.default_rng(n)
    score, error, p = rng.integers(levels, size=n) * 1.0, rng.random(n) < 0.4, rng.random(n)
    found, least = scores.ranking(score, error), np.sort(score[error])[::-1]
    assert found["AUROC"] == pytest.approx(metrics.roc_auc_score(error, score))
    flagged = score >= least[math.ceil(0.95 * len(least)) - 1]      # until 95 % of the errors are
    assert found["FPR@95"] == pytest.approx(flagged[~error].mean())
    found = scores.calibration(p, error)
    assert found["NLL"] == pytest.approx(metrics.log_loss(error, p))
    assert found["Brier"] == pytest.approx(metrics.brier_score_loss(error, p))


def test_tied_risks_are_the_mean_over_their_orders():
    error = [0, 1, 0, 1, 1]
    orders = [scores.risk_coverage(scores.cumulative(column(1, 2, 3, 4, 5), column(0, *middle, 1)))
              for middle in itertools.permutations(error[1:4])]
    tied = scores.risk_coverage(scores.cumulative(column(1, 2, 2, 2, 3), column(*error)))
    assert tied == pytest.approx(np.mean(orders, axis=0))


def test_calibration_by_hand():
    found = scores.calibration(column(0.95, 0.95, 0.55, 0.55), np.array([True, False, True, True]))
    assert found == pytest.approx({
        "ECE": 0.45, "ECE (equal mass)": 0.475, "MCE": 0.45,
        "Brier": (0.0025 + 0.9025 + 2 * 0.2025) / 4,
        "NLL": -(math.log(0.95) + math.log(0.05) + 2 * math.log(0.55)) / 4})
    bins = scores.reliability(column(0.0, 0.1, 0.11, 1.0), column(1, 1, 1, 1))
    assert [count for count, _, _ in bins] == [2, 1, 1]         # an edge belongs to the bin below


def test_the_temperature_by_hand():
    rows = np.array([[4, 0, -np.inf]] * 4)                      # sigmoid(4 / T) = 3 / 4
    found = scores.temperature(rows, np.array([0, 0, 0, 1]))
    assert found == pytest.approx(4 / math.log(3), rel=1e-3)


def test_cross_fitting_never_looks_at_a_samples_own_label():
    rows = np.array([[2.0 + i % 3, 0.0] for i in range(20)])
    gold = np.array([int(i % 4 == 0) for i in range(20)])
    other = gold.copy()
    other[7] = 1 - other[7]
    one, two = scores.cross_fitted(rows, gold), scores.cross_fitted(rows, other)
    assert (one[2::5] == two[2::5]).all() and (one != two).any()        # sample 7 is of fold 2


def test_the_first_choice_of_samples_that_have_one():
    found = scores.choices([
        record(0, True, True, 0.5), record(1, True, True, 0.5, gold="h()"),
        record(2, True, True, 0.5, candidates={"f": -1.0}), record(3, True, True, 0.5, gold=""),
        record(4, True, True, 0.5, candidates={"g": 0.0, "f": -1.0, "h": -2.0})])
    assert found.gold.tolist() == [0, -1, 1] and found.right.tolist() == [True, False, False]
    assert found.p[:2] == pytest.approx([0.75, 0.75]) and found.scores.shape == (3, 3)
    assert scores.choices([record(2, True, True, 0.5, candidates={"f": -1.0})]) is None


def test_gates_and_gains_by_hand():
    flagged, error = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert scores.gate_rates(flagged, error) == {"TPR": 0.5, "FPR": 0.5, "precision": 0.5}
    assert math.isnan(scores.gate_rates(~flagged & flagged, error)["precision"])
    score, gain = column(4, 3, 2, 1), column(1, 0, -1, 0)
    assert scores.gain_budget(score, gain).tolist() == [0, 0.25, 0.25, 0, 0]
    assert scores.qini(score, gain) == pytest.approx(0.1)       # where a random gate gains nothing
    assert scores.qini(score, column(1, 0, 1, 0)) == pytest.approx(0.25 / 5)    # and where it does


def test_the_interval_of_a_mean_is_the_textbooks():
    x = np.random.default_rng(3).normal(size=400)
    drawn = scores.bootstrap(lambda x: {"mean": x.mean()}, 1000, x)["mean"]
    low, high = x.mean() - 1.96 / 20, x.mean() + 1.96 / 20
    assert scores.interval(drawn) == pytest.approx((low, high), abs=0.02)
    assert scores.interval(column(1, math.nan, 1)) == (1, 1)


# --- The program ----------------------------------------------------------------------------------

def write(folder: Path, records: list[Record], **config) -> str:
    write_run(folder, {"bench": "sealtool", "model": "tiny", "tau": 0.6, **config}, records)
    return str(folder)


def test_the_report_finds_the_score_that_knows(tmp_path, capsys):
    """The log-probability of the answer is low where it is wrong, and the margin is not."""
    records = [record(i, i % 3 > 0, i % 3 > 0 or i % 2 > 0, i % 5 / 5) for i in range(30)]
    run = write(tmp_path / "run", records)
    assert scores.main([run, run, "--times", "15"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    best = next(line for line in lines if line[-2:] == ["the", "best"] and "AUROC" not in line)
    assert best[0] == "answer_nll" and best[1:4] == ["1.00", "[1.00,", "1.00]"]
    assert next(line for line in lines if line[:1] == ["margin"])[-1] == "worse"
    assert next(line for line in lines if line[:2] == ["temperature,", "cross-fitted"])
    assert next(line for line in lines if line[:3] == ["budget", "30", "%"])
    assert lines[-1][0] == "prompt_tokens" and len(lines[-1]) == 7      # AUROC in each of two runs


def test_where_all_are_wrong_nothing_is_ranked_and_a_missing_run_is_one_line(tmp_path, capsys):
    run = write(tmp_path / "run", [record(i, False, False, 0.9) for i in range(5)], model="x/none")
    assert scores.main([run, "--times", "10"]) == 0
    printed = capsys.readouterr().out
    assert "all 5 direct answers are wrong" in printed and "Without the model's" in printed
    assert scores.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
