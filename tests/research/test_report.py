"""Runs compared: the statistics against brute force, the tables by hand."""
import itertools
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hand_made import ONE, OTHER, record, verdict

from evaluate import Run, write_run
from research import report
from research.report import grouped, tables

CONFIG = {"bench": "sealtool", "data": "", "model": "tiny", "method": "ttsi", "seed": 0}
RECORDS = [record("a", False, True), record("b", True, False), record("c", True, True, 0.9),
           record("d", False, False), record("e", False, True)]


def run(records, **config) -> Run:
    return Run(Path("sealtool-run"), CONFIG | config, records)


SEVEN_TO_TWO = np.array([[1] * 7 + [-1] * 2 + [0] * 20])
SAME_FIVE = np.array([[1] * 4 + [0] * 6] * 5)       # p of four samples, and not of twenty


@pytest.mark.parametrize("statistic, arguments, value", [
    (report.p_value, ([SEVEN_TO_TWO],), 2 * (1 + 9 + 36) / 2 ** 9),             # McNemar
    (report.p_value, ([SEVEN_TO_TWO.repeat(2, 0)],), 2 * (1 + 9 + 36) / 2 ** 9),
    (report.p_value, ([SAME_FIVE],), 2 / 2 ** 4), (report.p_value, ([0 * SAME_FIVE],), 1),
    (report.holm, ([0.01, 0.04, 0.03, 0.005],), [0.03, 0.06, 0.06, 0.02]),
    (report.holm, ([0.5, 0.9],), [1, 1]),
    (report.detectable, (114,), (1.96 + 0.8416) * (0.15 / 114) ** 0.5),
    (report.detectable, (20,), (1.96 + 0.8416) ** 2 / 20),          # more change than 15 %
    (report.pass_at, (2, 5, 2), 0.7), (report.pass_at, (5, 5, 1), 1),
    (report.rouge_l, ("police killed the gunman", "police kill the gunman"), 0.75)])    # Lin 2004
def test_a_statistic_by_hand(statistic, arguments, value):
    assert statistic(*arguments) == pytest.approx(value, rel=1e-3)


def test_the_p_of_several_seeds_equals_that_of_all_sign_flips():
    gain = (1, 0.5, 0.5, 1, -0.5, 0, 0)
    sums = [abs(np.dot(gain, signs)) for signs in itertools.product((-1, 1), repeat=len(gain))]
    expected = np.mean(np.array(sums) >= sum(gain))
    assert report.p_value([np.array([gain, gain])]) == pytest.approx(expected)


@pytest.mark.parametrize("gains, sd", [
    ([[[1, 0] * 100]], 0.5 / 200 ** 0.5), ([[[1, 0] * 100] * 5], 0.5 / 200 ** 0.5),
    ([np.random.default_rng(1).integers(2, size=(20, 200))], 0.5 / 4000 ** 0.5 * 2 ** 0.5),
    ([[[1, -1] * 50], [[-1, 1] * 50]], 1 / 100 ** 0.5 / 2 ** 0.5)],
    ids=["one seed", "seeds all alike", "seeds as unlike as samples", "two benchmarks drawn apart"])
def test_the_interval_has_the_spread_of_samples_seeds_and_benchmarks(gains, sd):
    """Drawn alike, two benchmarks of opposite gains would cancel in every resample."""
    low, high = report.mean_interval([np.array(gain) for gain in gains])
    assert high - low == pytest.approx(2 * 1.96 * sd, rel=0.2)
    assert low < np.mean([np.mean(gain) for gain in gains]) < high


def test_seeds_are_one_group_and_its_figures_are_those_by_hand():
    other = [RECORDS[0], record("b", True, True, 0.9), *RECORDS[2:4], record("e", False, False)]
    runs = [run(RECORDS), run(other, seed=1, device="cuda"), run(RECORDS)]      # one twice
    row, = tables(grouped(runs))["Gains, in points of accuracy"]
    assert (row["run"], row["n"], row["seeds"], row["fixed"], row["harmed"]) == ("run", 5, 2, 3, 1)
    assert (row["before"], row["after"], row["gain"]) == (40, "60.0 ± 0.0", "+20.0 ± 0.0")
    assert row["Wilson's, before"] == "[11.8, 76.9]"
    # means over seeds: 1, -1/2, 0, 0, 1/2; of 8 sums of flips, 6 are as far from 0 as 1 is
    assert row["p"] == row["holm"] == "0.7500"
    assert (row["uncertain"], row["acted"], row["TPR"]) == pytest.approx((70, 70, 100))


def test_other_settings_are_no_further_seeds_and_what_uses_labels_says_so():
    first, second = grouped([run(RECORDS), run(RECORDS, seed=1, lr=1e-3, uses_labels=True)])
    assert len(first.seeds) == len(second.seeds) == 1 and "uses labels" in second.name


def test_what_not_all_seeds_have_is_left_out_and_told():
    group, = grouped([run(RECORDS), run(RECORDS[1:4], seed=1), run([], seed=2)])
    assert [[r.id for r in seed] for seed in group.seeds] == [["b", "c", "d"]] * 2
    assert "2 samples, which not all seeds have" in group.name


def test_several_benchmarks_are_corrected_for_and_have_a_mean():
    """6 of 6 mended, and 0 of 2; a run that differs in more than the benchmark is no such other."""
    six = run([record(i, False, True) for i in range(6)])
    two = run([record(i, False, False) for i in range(2)], bench="apibank", data="b.json")
    apart = replace(two, config={**two.config, "k": 2})
    first, other, both, alone = tables(grouped([six, two, apart]))["Gains, in points of accuracy"]
    assert (first["p"], first["holm"]) == ("0.0312", "0.0625") and other["holm"] == "1.0000"
    assert (both["bench"], both["n"], both["fixed"], both["before"]) == ("mean of 2", 8, 6, 0)
    assert (both["gain"], both["p"], both["interval"]) == ("+50.0", first["p"], "[+50.0, +50.0]")
    assert alone["bench"] == "apibank"


def sampled(*exact: bool) -> dict:
    """Right answers all say the same, wrong ones too."""
    return {"sampled": [asdict(verdict(e, ONE if e else OTHER)) for e in exact]}


def test_what_a_method_costs_by_hand():
    """A draw costs what one sampled answer does, 0.2 s; extra is what acting added."""
    drawn = record("a", False, True, extra=sampled(*[True] * 5), seconds={"H": 1.5, "sampled": 1.0})
    learnt = record("a", False, True, seconds={"H": 1.5, "G": 2.0, "T": 1.6})
    groups = grouped([run([drawn], method="vote"), run([learnt, record("b", True, True, 0.9)])])
    vote, ttsi = (report.costs([group], groups) for group in groups)
    assert (vote["extra seconds"], vote["draws"], vote["median sampled"]) == (1.0, 5.0, 1.0)
    assert (ttsi["extra seconds"], ttsi["draws"]) == pytest.approx((3.6, 18))
    assert (ttsi["seconds"], ttsi["fixed name"]) == (pytest.approx(3.3), 1)


def test_votes_and_pass_at_k_by_hand():
    """The vote is the majority's; of a benchmark whose samples have none there is no row."""
    rows = [replace(r, extra=sampled(*[j < i for j in range(5)]), seconds={"H": 1, "sampled": 1})
            for i, r in enumerate(RECORDS)]
    some = [*rows[:4], RECORDS[4]]
    groups = grouped([run(rows, method="vote"), run(some, bench="nobody")])
    row, = tables(groups)["Direct answers, majority vote, pass@k (the paper's Table 1)"]
    assert (row["direct"], row["vote"], row["pass@1"], row["pass@5"]) == ("40.0",) * 3 + ("80.0",)


def test_the_pairs_by_hand():
    pair = {"request": "Is it cold in Oslo?", "read_back": True,
            "text": '{"name": "f", "arguments": {"in": [{"city": "Oslo"}, 5]}}'}
    gold = '{"name": "f", "arguments": {"city": "Oslo"}}'
    more = {"pairs": [pair | {"request": "In Oslo"}], "request": "In Oslo now?", "gold": "g()"}
    group, = grouped([run([
        record("a", False, True, pairs=[pair], request="Is it warm in Rome? 5", gold=gold,
               norms=[2.0, 9.0], extra={"kl": 0.5}), record("b", False, True, **more)])])
    row = report.pairs(group)
    assert (row["pairs"], row["valid"], row["unique"], row["distinct-2"]) == (2, 0.5, 1, 1)
    assert row["ROUGE-L"] == pytest.approx((2 * 3 / 11 + 2 * 2 / 5) / 2)    # is it in: of 5 and 6
    assert (row["copied values"], row["gold's tool"], row["read back"]) == (0.5, 0.5, 2)
    assert (row["leaks"], row["largest norm"], row["KL"]) == (1, 9.0, 0.5)
    assert (row["first loss"], row["last loss"]) == (0.5, 0.25)
    assert row["rejected"] == "unknown argument 2"


def test_the_program_prints_tables_and_names_a_folder_that_is_none(tmp_path, capsys):
    write_run(tmp_path / "run", CONFIG, RECORDS)
    assert report.main([str(tmp_path / "run")]) == 0
    assert "| sealtool | run |" in capsys.readouterr().out
    assert report.main([str(tmp_path / "none")]) == 2
