"""The scores of uncertainty, and the measures of their quality: by hand, and against references."""
import math
from dataclasses import replace

import numpy as np
import pytest
from hand_made import GOLD, ONE, OTHER, failed, record, verdict
from sklearn import metrics

from data.chat import Tokenizer
from data.runs import Run, write_run
from research import scores
from train import TINY


SEEN = {"candidates": {"f": math.log(0.7), "g": math.log(0.2), "h": math.log(0.1)},
        "log_p": [-0.5, -1.5, 0.0], "entropy": [0.25, 0.75, 0.5]}
ALONE = {"candidates": {"f": -0.5}}
VOTES = {"extra": {"sampled": [{"text": ONE}, {"text": f"Yes: {ONE}"}, {"text": OTHER},
                               {"text": "no"}]}, "losses": []}


@pytest.mark.parametrize("seen, name, value", [
    (SEEN, "margin", 0.5), (SEEN, "least_confidence", 0.3), (SEEN, "log_odds", math.log(2 / 7)),
    (SEEN, "entropy", -0.7 * math.log(0.7) - 0.2 * math.log(0.2) - 0.1 * math.log(0.1)),
    (SEEN, "answer_nll", 2), (SEEN, "answer_perplexity", math.exp(2 / 3)),
    (SEEN, "answer_mean_entropy", 0.5), (SEEN, "answer_max_entropy", 0.75),
    (ALONE, "margin", 0), (ALONE, "log_odds", -math.inf), (ALONE, "normalised_entropy", 0),
    ({"candidates": dict.fromkeys("fghij", -1.0)}, "normalised_entropy", 1),
    ({"extra": {"orders": [[0, -99], [-99, 0]]}}, "mutual_information", math.log(2)),
    ({"extra": {"orders": [[-1, -1], [-2, -2]]}}, "mutual_information", 0),
    (VOTES, "vote_share", 0.5), (VOTES, "semantic_entropy", 1.5 * math.log(2))])
def test_a_score_by_hand(seen, name, value):
    """Two ways to write one call mean the same."""
    assert scores.scores_of_line(record("x", True, True, **seen))[name] == pytest.approx(value)


def test_what_the_request_does_not_spell_is_counted():
    direct = verdict(True, ONE.replace("1", '1, "y": "bo", "z": "Al"'))
    line = replace(record("x", True, True), request="At 1 for Bo.", base=direct)
    assert scores.scores_of_line(line)["unsaid"] == 1


def test_a_score_is_computed_where_all_lines_have_its_data():
    voted, other = record("x", True, True, **VOTES), record("y", True, True, margin=0.25)
    adapted = record("z", True, True, **VOTES | {"losses": [0.5]})      # by another model
    assert "vote_share" in scores.scores_of([voted, voted])
    assert scores.scores_of([other])["margin"] == pytest.approx([0.75])
    for lines in ([voted, other], [adapted]):
        assert not {"vote_share", "name_nll"} & set(scores.scores_of(lines))    # the 2nd: tokenizer


def test_the_parts_of_an_answer_and_the_lengths_of_names():
    tokenizer = Tokenizer(TINY)
    ids = tokenizer.encode('<tool_call>\n{"name": "get_user", "arguments": {"name": "Ana", '
                           '"n": 12, "of": {"x": "y z"}}}\n</tool_call>')
    parts = scores.answer_parts(tokenizer, ids)
    name, values = ("".join(tokenizer.decode([ids[i]]) for i in parts[part])
                    for part in ("name", "values"))
    assert "get_user" in name and "Ana" not in name
    assert all(value in values for value in ("Ana", "12", "y z"))
    assert "user" not in values and "arguments" not in values
    candidates = {name: -1.0 - len(tokenizer.encode(name)) for name in ("f", "get_user")}
    found = scores.scores_of_line(record("x", True, True, candidates=candidates, ids=[]), tokenizer)
    assert found["mean_margin"] == pytest.approx(1) and found["margin"] < 1     # -1 a token each
    assert found["values_nll"] == math.inf                      # it says no value
    assert set(scores.SCORES) == set(found)


FALLING, ERROR = np.array([4, 3, 2, 1]), np.array([True, False, True, False])


@pytest.mark.parametrize("measure, arguments, value", [
    (scores.threshold_between, ([1, 5, 2, math.inf, 3], 2), 3),
    (scores.threshold_between, ([1, 1], 2), -math.inf),
    (scores.otsu, ([-math.inf, 0, 0.1, 0.9, 1, math.inf],), 0.1), (scores.otsu, ([],), 0),
    (scores.otsu, ([0, 1, 2, 7, 8, 13],), 2),                   # one outlier is no group of weight
    (scores.areas, (FALLING, ERROR), {
        "AUROC": 3 / 4, "AURC": (0 + 1 / 2 + 1 / 3 + 1 / 2) / 4,
        "E-AURC": 0.125, "PRR": (1 / 2 - 1 / 3) / (1 / 2 - 5 / 24)}),
    (scores.calibration, (np.array([0.95, 0.95, 0.55, 0.55]), np.array([1, 0, 1, 1]) > 0), {
        "ECE": 0.45, "ECE (equal mass)": 0.475, "MCE": 0.45,
        "Brier": (0.0025 + 0.9025 + 2 * 0.2025) / 4,
        "NLL": -(math.log(0.95) + math.log(0.05) + 2 * math.log(0.55)) / 4}),
    (scores.gate_rates, (FALLING > 2, ERROR), {"TPR": 0.5, "FPR": 0.5, "precision": 0.5}),
    (scores.qini, (FALLING, np.array([1, 0, -1, 0])), {"Qini": 10}),    # a random gate gains 0
    (scores.qini, (FALLING, np.array([1, 0, 1, 0])), {"Qini": 5})])     # and here it does
def test_a_measure_by_hand(measure, arguments, value):
    assert measure(*arguments) == pytest.approx(value)


@pytest.mark.parametrize("n, levels", [(12, 3), (200, 1000)])
def test_auroc_and_nll_equal_scikit_learns(n, levels):
    rng = np.random.default_rng(n)
    score, error, p = rng.integers(levels, size=n), rng.random(n) < 0.4, rng.random(n)
    assert scores.areas(score, error)["AUROC"] == pytest.approx(metrics.roc_auc_score(error, score))
    assert scores.calibration(p, error)["NLL"] == pytest.approx(metrics.log_loss(error, p))


def test_cross_fitting_finds_the_share_that_is_right_without_a_samples_own_label():
    rows, gold = np.array([[4.0, 0, -np.inf]] * 20), np.array([0] * 15 + [1] * 5)
    assert scores.cross_fitted(rows, gold) == pytest.approx(3 / 4, abs=1e-4)    # of all other folds
    gold[7] = 1
    assert [*(scores.cross_fitted(rows, gold) < 0.749)] == [i % 5 != 2 for i in range(20)]


def test_the_first_choice_of_samples_that_have_one():
    found, gold = scores.choices([
        record(0, True, True), record(1, True, True, gold=GOLD.replace("f", "h")),
        record(2, True, True, **ALONE), record(3, True, True, gold=""),
        record(4, True, True, **SEEN)])
    assert gold.tolist() == [0, -1, 0] and found.shape == (3, 3)
    assert found.argmax(1).tolist() == [0, 0, 0] and found[0, 2] == -math.inf


def test_the_interval_of_a_mean_is_the_textbooks():
    x = np.random.default_rng(3).normal(size=400)
    shown = scores.with_intervals(lambda x: {"mean": x.mean()}, np.arange(400), x)["mean"]
    found = [float(number.strip("[,]")) for number in shown.split()]
    assert found == pytest.approx([x.mean(), x.mean() - 1.96 / 20, x.mean() + 1.96 / 20], abs=0.02)


def test_samples_of_one_dialogue_are_drawn_together():
    """Four copies of a sample say no more than one: the interval stays as wide."""
    x = np.random.default_rng(3).normal(size=100)
    widths = {}
    for name, clusters in (("copies", np.arange(100).repeat(4)), ("apart", np.arange(400))):
        shown = scores.with_intervals(lambda x: {"mean": x.mean()}, clusters, x.repeat(4))["mean"]
        low, high = [float(number.strip("[,]")) for number in shown.split()[1:]]
        widths[name] = high - low
    assert widths["copies"] == pytest.approx(2 * widths["apart"], abs=0.03)


def test_the_score_that_knows_is_ranked_first():
    """The log-probability of the answer is low where it is wrong, and the margin is not."""
    records = [record(i, i % 3 > 0, True, margin=i % 5 / 5) for i in range(30)]
    found, error = scores.scores_of(records), np.array([not r.base.exact for r in records])
    known = {name: found[name] for name in ("margin", "answer_nll", "random")}
    best, *others = scores.rank_scores(known, error, np.arange(30))
    assert (best["score"], best["AUROC"]) == ("answer_nll", "1.00 [1.00, 1.00]")
    assert (best["AUPR"], best["FPR@95"]) == (1, 0)
    assert all("0.00" not in other["the best's lead"] for other in others)


def test_the_program_prints_tables_and_says_where_nothing_can_be_ranked(tmp_path, capsys):
    config = {"model": "x/none", "method": "ttsi"}
    write_run(Run(tmp_path / "run", config, [record(0, False, True)] * 2), {})
    assert scores.main([str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "all 2 direct answers are alike" in printed and "| this gate: 100% | 1.00 " in printed


def plainly(measure, clusters, *columns, digits=2) -> dict[str, str]:
    """The measures without their bootstrap."""
    return {name: f"{value:.{digits}f}" for name, value in measure(*columns).items()}


def test_those_whose_h_failed_are_left_out_and_counted(tmp_path, capsys, monkeypatch):
    records = [record(i, i % 2 > 0, True, margin=i / 10) for i in range(6)]
    for name, more in (("some", [failed("x")]), ("none", [])):
        config = {"model": "x/none", "method": "ttsi"}
        write_run(Run(tmp_path / name, config, [*records, *more]), {})
    write_run(Run(tmp_path / "lost", {"model": "x/none"}, [failed("x")]), {})
    printed = {}
    monkeypatch.setattr(scores, "with_intervals", plainly)
    for name in ("some", "none", "lost"):
        assert scores.main([str(tmp_path / name)]) == 0
        printed[name] = capsys.readouterr().out
    said, _, rest = printed["some"].partition("\n\n")
    assert said.startswith("some: H failed for 1 of 7 samples")
    assert rest.replace("some:", "none:") == printed["none"]
    assert printed["lost"].strip() == "lost: H failed for 1 of 1 samples; they are left out."


def test_samples_without_a_gold_answer_are_left_out_and_counted(tmp_path, capsys):
    bare = replace(verdict(True), exact=None)
    asked = [replace(record("a", True, True), base=bare, answer=bare)]
    for name, records in {"asked": asked, "some": [*asked, record("b", False, True)]}.items():
        write_run(Run(tmp_path / name, {}, records), {})
    run, = scores.scored_runs([tmp_path / "asked", tmp_path / "some"])
    assert run.folder.name == "some" and [r.id for r in run.records] == ["b"]
    said = capsys.readouterr().out
    assert "asked: 1 of 1 samples have no gold answer" in said and "some: 1 of 2" in said
