"""Runs compared: the statistics against brute force, the tables by hand."""
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hand_made import ONE, OTHER, failed, record, verdict

from data import Sample, load
from data.calls import Call, call_text
from data.runs import Run, digest, write_run
from evaluate import exact_match
from research import report
from research.report import grouped, tables

CONFIG = {"bench": "sealtool", "data": "", "model": "tiny", "method": "ttsi", "seed": 0,
          "samples": 5, "facts": {"samples": "ab", "weights": "cd", "torch": "2"},
          "code": {"H": "ef"}}
RECORDS = [record("a", False, True), record("b", True, False), record("c", True, True, 0.9),
           record("d", False, False), record("e", False, True)]


def run(records, **config) -> Run:
    return Run(Path("sealtool-run"), CONFIG | config, records)


def gains_of(runs, draw="dialogues") -> list[dict]:
    return next(iter(tables(grouped(runs), draw).values()))


SEVEN_TO_TWO = np.array([[1] * 7 + [-1] * 2 + [0] * 20])
NOUGHT = np.array([[1, 1, 1, 0], [-1, 0, -1, -1], [1, 1, -1, -1]])      # 1/3 + 2/3 - 1/3 - 2/3
SAME_FIVE = np.array([[1] * 4 + [0] * 6] * 5)       # p of four samples, and not of twenty


@pytest.mark.parametrize("statistic, arguments, value", [
    (report.p_value, ([SEVEN_TO_TWO],), 2 * (1 + 9 + 36) / 2 ** 9),             # McNemar
    (report.p_value, ([SEVEN_TO_TWO.repeat(2, 0)],), 2 * (1 + 9 + 36) / 2 ** 9),
    (report.p_value, ([SAME_FIVE],), 2 / 2 ** 4), (report.p_value, ([0 * SAME_FIVE],), 1),
    (report.p_value, ([NOUGHT],), 1),                   # and not less, as of rounded means
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


def test_benchmarks_with_unequally_many_seeds_weigh_as_their_means_do():
    means = [1, 1, 1, 1, 1 / 3, 2 / 3, -1 / 3, -2 / 3]
    sums = np.array([np.dot(means, signs) for signs in itertools.product((-1, 1), repeat=8)])
    expected = np.mean(np.abs(sums) > 4 - 1e-9)
    assert report.p_value([SAME_FIVE[:2], NOUGHT]) == pytest.approx(expected)


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


def test_what_goes_together_is_drawn_together_and_its_signs_flip_together():
    """Four dialogues of four samples that change alike count as four, not as sixteen."""
    alike, together = np.array([[1] * 8 + [-1] * 4 + [0] * 4]), np.repeat(range(4), 4)
    assert report.p_value([alike]) < 0.5 < report.p_value([alike], [together]) == 1
    assert report.p_value([SEVEN_TO_TWO], [np.arange(29)]) == report.p_value([SEVEN_TO_TWO])
    low, high = report.mean_interval([alike], [together])
    assert (low, high) == pytest.approx(report.mean_interval([alike[:, ::4]]))
    single_low, single_high = report.mean_interval([alike])
    assert high - low > 1.5 * (single_high - single_low)
    one = np.array([[1, 1, 0, 0, 0, 0]])            # of one dialogue, or of two
    assert report.p_value([one], [np.array([0, 0, 1, 2, 3, 4])]) == 1
    assert report.p_value([one], [np.array([0, 1, 2, 2, 2, 2])]) == 0.5     # McNemar, 2 of 2


def test_each_table_says_what_it_draws():
    asked = ["Book it.", "Book it. For two.", "Book a car.", "Book", "It."]
    records = [replace(record(i, False, i < 3), request=request, candidates=own)
               for i, (request, own) in enumerate(zip(asked, [{"a": 0.0, "b": -1.0}] * 4 + [{}]))]
    records[3] = replace(records[3], request="Bookings", candidates={"b": 0.0, "a": -2.0})
    for draw, said in (("dialogues", "4 dialogues"), ("lists", "2 lists"),
                       ("samples", "5 samples")):
        row, = gains_of([run(records)], draw)
        assert row["drawn"] == said
        for title in [title for title in tables(grouped([run(records)]), draw) if "p:" in title]:
            assert report.DRAWS[draw] in title


@pytest.fixture
def hotel(tmp_path) -> Run:
    """Three samples: the third has a key that stands nowhere, and the second's answer is Paris,
    with another case and a full stop."""
    tool = {"name": "f", "parameters": {"x": {"type": "string"}, "n": {"type": "integer"}}}
    items = [{"query": f"{i}: in Paris", "tools": [tool],
              "answers": [{"name": "f", "arguments": {"x": x, "n": 2}}]}
             for i, x in enumerate(("Paris", "Paris", "K7-q"))]
    items[0]["query"] += " for 2"
    items[1]["query"] += " for two"
    (tmp_path / "hotel.json").write_text(json.dumps(items))
    samples = load("hotel", str(tmp_path / "hotel.json"))
    said = ['{"name": "f", "arguments": {"x": "%s", "n": %s}}' % own
            for own in (("Paris", 2), ("paris.", "2"), ("K8", 2))]
    right = exact_match(said[0], samples[0])
    records = [replace(record(x.id, False, False), request=x.messages[0]["content"],
                       base=exact_match("no", x), answer=exact_match(text, x))
               for x, text in zip(samples, said, strict=True)]
    assert [r.answer.exact for r in records] == [right.exact, False, False] == [True, False, False]
    facts = {**CONFIG["facts"], "samples": digest(samples)}
    return run(records, bench="hotel", data=str(tmp_path / "hotel.json"), samples=3, facts=facts)


def test_two_readings_stand_beside_exact_where_the_samples_are_at_hand(hotel):
    title = next(title for title in tables([]) if title.startswith("Readings"))
    rows = {row["reading"]: row for row in tables(grouped([hotel]))[title]}
    assert {name: (row["n"], row["before"], row["after"]) for name, row in rows.items()} == {
        "exact": (3, 0, "33.3"), "known": (2, 0, "50.0"), "lenient": (3, 0, "66.7")}
    elsewhere = replace(hotel, config={**hotel.config, "facts": {"samples": "others"}})
    gone = replace(hotel, config={**hotel.config, "data": "gone.json"})
    assert tables(grouped([elsewhere]))[title] == tables(grouped([gone]))[title] == []


@pytest.mark.parametrize("given, gold, schema, is_equal", [
    ("paris", "Paris", "string", True), ("Go on.", "go on", "string", True),
    ("Go on", "Go on..", "string", False), ("a.b", "ab", "string", False),
    (["A.", "b"], ["a", "B."], "array of string", True), (["A"], ["b"], "array of string", False),
    ("A", "a", "", False), ("true", "True", "boolean", True)])
def test_lenient_forgives_case_and_a_full_stop_under_a_declared_string(
        given, gold, schema, is_equal):
    schema = {"type": schema} if " " not in schema else \
        {"type": "array", "items": {"type": "string"}}
    tools = ({"name": "f", "description": "", "parameters": {"x": schema}},)
    x = Sample("a", (), tools, (Call("f", {"x": gold}),))
    answer = exact_match(call_text([Call("f", {"x": given})]), x)
    assert report.lenient(answer, x) == is_equal and not report.lenient(exact_match("no", x), x)


def test_seeds_are_one_group_and_its_figures_are_those_by_hand():
    other = [RECORDS[0], record("b", True, True, 0.9), *RECORDS[2:4], record("e", False, False)]
    facts = {**CONFIG["facts"], "torch": "3"}
    runs = [run(RECORDS), run(other, seed=1, device="cuda", facts=facts)]
    row, = gains_of(runs)
    assert (row["run"], row["n"], row["seeds"], row["fixed"], row["harmed"]) == ("run", 5, 2, 3, 1)
    assert (row["before"], row["after"], row["gain"]) == (40, "60.0 ± 0.0", "+20.0 ± 0.0")
    assert row["Wilson's, before"] == "[11.8, 76.9]"
    # means over seeds: 1, -1/2, 0, 0, 1/2; of 8 sums of flips, 6 are as far from 0 as 1 is
    assert row["p"] == row["holm"] == "0.7500"
    assert (row["uncertain"], row["acted"], row["TPR"]) == pytest.approx((70, 70, 100))


def test_an_answer_of_another_text_has_changed_though_its_verdict_has_not():
    other = replace(RECORDS[3], answer=replace(RECORDS[3].answer, text="something else"))
    row, = gains_of([run([*RECORDS[:3], other])])
    assert row["changed"] == 25


@pytest.mark.parametrize("other", [
    {"lr": 1e-3}, {"facts": {**CONFIG["facts"], "samples": "other"}},
    {"facts": {**CONFIG["facts"], "weights": "other"}}, {"code": {"H": "other"}}],
    ids=["option", "samples", "weights", "code"])
def test_what_differs_in_more_than_its_seed_is_no_further_seed(other):
    groups = grouped([run(RECORDS), run(RECORDS, seed=1, **other)])
    assert [len(group.seeds) for group in groups] == [1, 1]


def test_what_uses_labels_says_so():
    first, second = grouped([run(RECORDS), run(RECORDS, uses_labels=True)])
    assert "uses labels" in second.name and "uses labels" not in first.name


def test_two_runs_of_one_seed_are_refused_and_both_named():
    first, second = [replace(run(RECORDS), folder=Path(name)) for name in ("here", "there")]
    with pytest.raises(ValueError, match="here and there"):
        grouped([first, run(RECORDS, seed=1), second])
    assert grouped([first, replace(second, records=[])])        # what is empty is no such run


def test_a_run_that_is_not_whole_says_so():
    some, = grouped([run(RECORDS[:3], samples=50)])
    assert some.name == "run (3 of 50 samples)"
    assert grouped([run(RECORDS)])[0].name == "run"


def test_a_sample_whose_h_failed_counts_as_wrong_and_was_not_acted_on():
    row, = gains_of([run([*RECORDS[:4], failed("e")])])
    found = row["n"], row["before"], row["acted"], row["TPR"]
    assert found == pytest.approx((5, 40, 60, 100 * 2 / 3))


def test_what_not_all_seeds_have_is_left_out_and_told():
    group, = grouped([run(RECORDS), run(RECORDS[1:4], seed=1), run([], seed=2)])
    assert [[r.id for r in seed] for seed in group.seeds] == [["b", "c", "d"]] * 2
    assert "3 of 5 samples" in group.name and "2 samples, which not all seeds have" in group.name


def test_several_benchmarks_are_corrected_for_and_have_a_mean():
    """6 of 6 mended, and 0 of 2; a run that differs in more than the benchmark is no such other."""
    six = run([record(i, False, True) for i in range(6)], samples=6)
    facts = {**CONFIG["facts"], "samples": "others"}
    two = run([record(i, False, False) for i in range(2)], bench="apibank", data="b.json",
              samples=2, facts=facts)
    apart = replace(two, config={**two.config, "k": 2})
    first, other, both, alone = gains_of([six, two, apart])
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


@pytest.mark.parametrize("reason, lacked", [
    ("unparsable", "format"), ("wrong number of calls: 2 for 1", "format"),
    ("wrong name: f for g", "name"), ("wrong value: x", "argument"),
    ("cut at 8 tokens: unparsable", "format"), ("cut at 8 tokens: extra argument: x", "argument")])
def test_what_a_fixed_answer_lacked(reason, lacked):
    base = replace(verdict(False), reason=reason)
    group, = grouped([run([replace(RECORDS[0], base=base)])])
    row = report.costs([group], [group])
    assert [kind for kind in ("format", "name", "argument") if row[f"fixed {kind}"]] == [lacked]


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
    for name in ("run", "copy"):
        write_run(Run(tmp_path / name, CONFIG, RECORDS), {})
    assert report.main([str(tmp_path / "run")]) == 0
    assert "| sealtool | run |" in capsys.readouterr().out
    assert report.main([str(tmp_path / "none")]) == 2
    assert report.main([str(tmp_path / "run"), str(tmp_path / "copy")]) == 2
    assert f"{tmp_path / 'run'} and {tmp_path / 'copy'}" in capsys.readouterr().err
