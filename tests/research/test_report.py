"""Runs compared: the statistics against scipy and brute force, the tables by hand."""
import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from evaluate import Record, Run, Verdict, write_run
from research import report
from research.report import compare, costs, figures, grouped, pairs

CONFIG = {"bench": "sealtool", "data": "", "model": "Qwen/Qwen2.5-1.5B-Instruct", "method": "ttsi",
          "tau": 0.95, "seed": 0, "limit": 0}


def verdict(exact: bool, text: str = "f(x=1)") -> Verdict:
    return Verdict(text, exact, "" if exact else "wrong name: f for g", exact, True, "", exact,
                   float(exact), float(exact))


def record(id: str, base: bool, answer: bool, outcome: str = "adapted", **more) -> Record:
    pair = {"request": "Why?", "text": '{"name": "f", "arguments": {}}', "read_back": False}
    seen = Record(
        id, "What?", 0.5, outcome != "certain", outcome, {"f": -0.5, "g": -2.5}, verdict(base),
        verdict(answer), [pair] if outcome == "adapted" else [],
        [{"text": "bad", "reason": "unknown argument: y"}], [0.5, 0.25], [1.0, 2.0],
        {"H": 1.5}, {"H": 10}, '{"name": "f", "arguments": {}}', True, [], [], [], 9)
    return replace(seen, **more)


RECORDS = [record("a", False, True), record("b", True, False), record("c", True, True, "certain"),
           record("d", False, False, "no pair"), record("e", False, True)]


def run(records: list[Record], **config) -> Run:
    return Run(Path("run"), CONFIG | config, records)


# --- Statistics -----------------------------------------------------------------------------------

SEVEN_TO_TWO = np.array([[1] * 7 + [-1] * 2 + [0] * 20])
SAME_FIVE = np.array([[1] * 4 + [0] * 6] * 5)       # p of four samples, and not of twenty


@pytest.mark.parametrize("statistic, arguments, value", [
    (report.wilson, (3, 10), (0.1078, 0.6032)), (report.mcnemar, (0, 0), 1),
    (report.mcnemar, (6, 1), 2 * (1 + 7) / 2 ** 7),
    (report.p_value, ([SEVEN_TO_TWO],), 2 * (1 + 9 + 36) / 2 ** 9),
    (report.sign_flip, (SEVEN_TO_TWO[0],), 2 * (1 + 9 + 36) / 2 ** 9),
    (report.p_value, ([SAME_FIVE],), 2 / 2 ** 4), (report.p_value, ([0 * SAME_FIVE],), 1),
    (report.holm, ([0.01, 0.04, 0.03, 0.005],), [0.03, 0.06, 0.06, 0.02]),
    (report.holm, ([0.5, 0.9],), [1, 1]),
    (report.detectable, (114,), (1.96 + 0.8416) * (0.15 / 114) ** 0.5),
    (report.detectable, (20,), (1.96 + 0.8416) ** 2 / 20),          # more change than 15 %
    (report.rouge_l, ("police killed the gunman", "police kill the gunman"), 0.75),     # Lin 2004
    (report.rouge_l, ("the gunman kill police", "police kill the gunman"), 0.5),
    (report.distinct_2, (["a b c", "a b"],), 2 / 3)])
def test_a_statistic_by_hand(statistic, arguments, value):
    assert statistic(*arguments) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("gain", [(1, 0.5, 0.5, 1, -0.5, 0, 0), (1, 1, -1, -1), (0.2, 0.4, 0.8)])
def test_sign_flips_equal_all_flips(gain):
    sums = [abs(np.dot(gain, signs)) for signs in itertools.product((-1, 1), repeat=len(gain))]
    expected = np.mean([s >= abs(sum(gain)) - 1e-12 for s in sums])
    assert report.sign_flip(np.array(gain)) == pytest.approx(expected)


@pytest.mark.parametrize("k, drawn, right", [(1, 5, 2), (2, 5, 2), (5, 5, 1), (3, 6, 0), (2, 4, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(k, drawn, right):
    subsets = list(itertools.combinations([True] * right + [False] * (drawn - right), k))
    assert report.pass_at(k, drawn, right) == pytest.approx(np.mean([any(s) for s in subsets]))


def test_the_nested_bootstrap_has_the_spread_of_the_samples_and_of_the_seeds():
    def drawn(gain): return report.nested_bootstrap(gain, np.random.default_rng(0))
    gain = np.array([[1, 0] * 100])                             # SD of the mean: 0.5 / sqrt(200)
    assert drawn(gain).mean() == pytest.approx(0.5, abs=0.005)
    assert drawn(gain).std() == pytest.approx(0.5 / 200 ** 0.5, rel=0.1)
    assert drawn(gain.repeat(5, 0)).std() == pytest.approx(0.5 / 200 ** 0.5, rel=0.1)
    apart = np.random.default_rng(1).integers(2, size=(20, 200))    # seeds as unlike as samples
    assert drawn(apart).std() == pytest.approx(0.5 / 4000 ** 0.5 * 2 ** 0.5, rel=0.2)


def test_benchmarks_of_equal_size_are_drawn_apart():
    """The gains of one are the losses of the other. With the same draws for both they would cancel
    in every resample, and the mean would seem to be known exactly."""
    gain = np.array([[1, -1] * 50])
    low, high = report.mean_interval([gain, -gain])
    sd = 1 / 100 ** 0.5 / 2 ** 0.5                              # of the mean of two such means
    assert (low, high) == pytest.approx((-1.96 * sd, 1.96 * sd), rel=0.15)


# --- Runs that belong together --------------------------------------------------------------------

def test_seeds_are_one_group_and_its_figures_are_those_by_hand():
    other = [RECORDS[0], record("b", True, True, "certain"), *RECORDS[2:4],
             record("e", False, False)]
    row, = compare(grouped([run(RECORDS), run(other, seed=1, device="cuda", lesson="self")]))
    assert (row["run"], row["n"], row["seeds"], row["fixed"], row["harmed"]) == ("ttsi", 5, 2, 3, 1)
    assert row["before"] == 0.4 and row["its interval"] == report.wilson(2, 5)
    assert row["after"] == {"mean": 0.6, "sd": 0} and row["gain"]["mean"] == pytest.approx(0.2)
    # means over seeds: 1, -1/2, 0, 0, 1/2; of 8 sums of flips, 6 are as far from 0 as 1 is
    assert row["p"] == pytest.approx(6 / 8) and row["holm"] == row["p"]
    assert row["interval"][0] < 0.2 < row["interval"][1]
    assert (row["uncertain"], row["acted"], row["TPR"]) == (0.7, 0.7, 1)
    assert (row["paper"], row["paper's gain"]) == (72.43, 5.76)


@pytest.mark.parametrize("options, name", [
    ({"gate": "all", "uses_labels": True}, "ttsi gate all (uses labels)"),
    ({"lr": 1e-3}, "ttsi lr 0.001"), ({"data": "b.json"}, "ttsi data b.json")])
def test_other_settings_are_no_further_seeds_and_a_run_given_twice_is_one(options, name):
    one, two = run(RECORDS), run(RECORDS, **options)
    assert [group.name for group in grouped([one, two, one])] == ["ttsi", name]


def test_what_not_all_seeds_have_is_left_out_and_told():
    runs = [run(RECORDS[:1]), run(RECORDS), run(RECORDS[1:4], seed=1), run([], seed=2)]
    group, = grouped(runs)
    assert [r.id for r in group.seeds[0]] == ["b", "c", "d"] and len(group.seeds) == 2
    assert "2 samples that not all of its seeds have" in report.report(runs)


@pytest.mark.parametrize("config, shown", [
    ({"tau": 0.35}, 68.10), ({"gate": "all", "tau": 0.5}, 73.47),
    ({"gate": "all", "lesson": "gold"}, 78.89), ({"method": "base", "tau": 0.1}, 66.37),
    *((other, math.nan) for other in (
        {"tau": 0.5}, {"model": "Qwen/Qwen2.5-0.5B-Instruct"}, {"data": "bundled"}, {"rank": 64},
        {"limit": 50}, {"gate": "random"}, {"bench": "apibank"}))])
def test_the_papers_figures_stand_beside_runs_of_its_own_setting_alone(config, shown):
    row, = compare(grouped([run(RECORDS, **config)]))
    assert row["paper"] == pytest.approx(shown, nan_ok=True)


def test_several_benchmarks_are_corrected_for_and_have_a_mean():
    """6 of 6 mended, and 0 of 2; a run that differs in more than the benchmark is no such other."""
    six = run([record(f"x-{i}", False, True) for i in range(6)])
    two = run([record(f"x-{i}", False, False) for i in range(2)], bench="apibank", data="b.json")
    apart = replace(two, config={**two.config, "k": 2})
    first, _, other, both = compare(grouped([six, two, apart]))
    assert (first["p"], first["holm"]) == pytest.approx((2 / 2 ** 6, 4 / 2 ** 6))
    assert other["holm"] == 1 and other["run"] == "ttsi k 2"
    assert (both["bench"], both["n"], both["fixed"], both["before"]) == ("mean of 2", 8, 6, 0)
    assert (both["gain"]["mean"], both["p"], both["interval"]) == (0.5, first["p"], (0.5, 0.5))


# --- Tables ---------------------------------------------------------------------------------------

def sampled(*exact: bool) -> dict:
    """Right answers all say the same, wrong ones too."""
    return {"sampled": [asdict(verdict(e, "f(x=1)" if e else "g(x=1)")) for e in exact]}


def test_what_a_method_costs_by_hand():
    """A draw costs what one sampled answer does, 0.2 s; extra is what acting added."""
    drawn = record("a", False, True, extra=sampled(*[True] * 5), seconds={"H": 1.5, "sampled": 1.0},
                   tokens={"H": 10, "sampled": 50})
    learnt = record("a", False, True, seconds={"H": 1.5, "G": 2.0, "T": 1.6},
                    tokens={"H": 10, "T": 7})
    certain = record("b", True, True, "certain")
    groups = grouped([run([drawn], method="vote"), run([learnt, certain])])
    vote, ttsi = (costs([group], groups) for group in groups)
    assert (vote["extra seconds"], vote["draws"], vote["tokens"]) == (1.0, 5.0, 60)
    assert (ttsi["extra seconds"], ttsi["draws"]) == pytest.approx((3.6, 18))
    assert (ttsi["seconds"], ttsi["tokens"], ttsi["fixed name"]) == (pytest.approx(3.3), 13.5, 1)


def test_votes_and_pass_at_k_by_hand():
    """The vote is the majority's; of a benchmark whose samples have none there is no row."""
    rows = [replace(r, extra=sampled(*[j < i for j in range(5)])) for i, r in enumerate(RECORDS)]
    some = [replace(RECORDS[0], extra=sampled(True)), *RECORDS[1:]]
    row, = figures(grouped([run(rows, method="vote"), run(some, bench="apibank")]))["votes"]
    assert row["direct"]["mean"] == 0.4 and row["vote"]["mean"] == pytest.approx(2 / 5)
    assert row["pass@1"]["mean"] == pytest.approx((0 + 1 + 2 + 3 + 4) / 25)
    assert row["pass@5"]["mean"] == pytest.approx(4 / 5)


def test_the_pairs_by_hand():
    pair = {"request": "Is it cold in Oslo?", "read_back": True,
            "text": '{"name": "f", "arguments": {"in": [{"city": "Oslo"}, 5]}}'}
    gold = '{"name": "f", "arguments": {"city": "Oslo"}}'
    group, = grouped([run([
        replace(RECORDS[0], request="Is it warm in Rome? 5", norms=[2.0, 9.0], pairs=[pair],
                base=verdict(False, "g()"), gold=gold, extra={"kl": 0.5}),
        record("b", False, True, pairs=[pair | {"request": "In Oslo"}], request="In Oslo now?",
               gold=gold)])])
    row = pairs(group)
    assert (row["pairs"], row["valid"], row["unique"], row["repeats"]) == (2, 0.5, 1, 1)
    assert row["read back"] == 2
    assert row["ROUGE-L"] == pytest.approx((2 * 3 / 11 + 2 * 2 / 5) / 2)    # is it in: of 5 and 6
    assert (row["copied values"], row["tool as gold"], row["tool as direct"]) == (0.5, 1, 0.5)
    assert (row["leaks"], row["largest norm"], row["KL"]) == (1, 9.0, 0.5)  # the 2nd holds its own
    assert (row["first loss"], row["last loss"]) == (0.5, 0.25)


def test_the_report_in_every_form(tmp_path, capsys):
    folders = [str(tmp_path / f"s{seed}") for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        write_run(Path(folder), CONFIG | {"seed": seed}, RECORDS)
    assert report.main(folders) == 0
    text = capsys.readouterr().out
    assert "+20.0 ± 0.0" in text and "72.43" in text and "rejected: unknown argument 10." in text
    assert report.main([*folders, "--markdown"]) == 0
    assert "| sealtool | ttsi |" in capsys.readouterr().out
    assert report.main([*folders, "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["gains"][0]["gain"]["mean"] == pytest.approx(0.2)
    assert found["pairs"][0]["KL"] is None                          # not NaN
    assert report.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
