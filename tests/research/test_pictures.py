"""The pictures: that they are drawn, and that what they show is the run's."""
import runpy
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from hand_made import failed, record

from data.runs import Run, write_run
from research import pictures

RUN = Run(Path("run"), {"model": "none/none", "method": "ttsi", "tau": 0.6},     # fixed below 0.5
          [record(i, i % 2 > 0, i % 2 > 0 or i < 5, margin=i / 10) for i in range(10)])


def test_the_program_draws_its_pictures_without_those_whose_h_failed(tmp_path, capsys):
    records = [*RUN.records, failed("x")]
    write_run(replace(RUN, folder=tmp_path / "run", records=records), {})
    assert pictures.main([str(tmp_path / "run"), "--into", str(tmp_path / "plots")]) == 0
    found = {path.stem: path.read_bytes()[:4] for path in (tmp_path / "plots" / "run").iterdir()}
    assert found == dict.fromkeys(pictures.PICTURES, b"\x89PNG")
    assert "H failed for 1 of 11 samples" in capsys.readouterr().out


def test_the_ideal_gate_is_above_the_margin_and_both_end_alike():
    axes = plt.figure().add_subplot()
    pictures.draw_gain_budget(axes, RUN)
    margin, ideal, random = (line.get_ydata() for line in axes.get_lines())
    assert (ideal >= margin).all() and margin[1] == pytest.approx(10)    # the least sure is fixed
    assert margin[-1] == ideal[-1] == random[-1] == pytest.approx(30)


def test_what_adapting_changed_is_marked_among_margins_and_answers():
    axes = plt.figure().add_subplot()
    records = [*RUN.records, record("h", True, False, margin=0.3)]
    pictures.draw_margin_nll(axes, replace(RUN, records=records))
    found = {group.get_label(): group.get_offsets().tolist() for group in axes.collections}
    assert [label for label in found] == ["right: 5", "wrong: 2", "fixed: 3", "harmed: 1"]
    assert [margin for margin, _ in found["fixed: 3"]] == [0, 0.2, 0.4]
    assert found["harmed: 1"] == [[pytest.approx(0.3), 1.0]]            # -log P of its two tokens


def test_the_seconds_of_each_step_and_their_share_are_those_of_the_run():
    axes = plt.figure().add_subplot()
    records = [replace(RUN.records[0], seconds={"H": 1.0, "T": 2.0}),
               replace(RUN.records[1], seconds={"H": 5.0})]
    pictures.draw_seconds(axes, replace(RUN, records=records))
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "H\nn = 2\n75% of all seconds", "T\nn = 1\n25% of all seconds"]
    assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[1, 5], [2]]


def test_the_losses_of_all_adaptations_are_drawn_with_their_median():
    axes = plt.figure().add_subplot()
    losses = [[3.0, 1.0], [2.0, 0.5, 0.25], [1.0, 0.25]]
    records = [replace(r, losses=own) for r, own in zip(RUN.records, losses)]
    pictures.draw_losses(axes, replace(RUN, records=records))
    drawn = [line.get_ydata().tolist() for line in axes.get_lines()]
    assert sorted(drawn) == sorted([*losses, [2.0, 0.5]]) and drawn[-1] == [2.0, 0.5]
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["right or wrong as before", "fixed", "median of 3"]
    pictures.draw_losses(plt.figure().add_subplot(), replace(RUN, records=[]))     # none: no curve


GROWTH = """some sentence before
tokens tools a-certain-sample an-uncertain-one,-answer an-uncertain-one,-suffix \
an-uncertain-one,-full plain
250 2 1.00 2.00 3.00 4.00 8.00
4000 2 10.00 20.00 30.00 nan nan
1000 8 3.00 5.00 7.00 9.00 40.00
"""


def test_the_growth_of_costs_is_drawn_from_the_benchmarks_table(tmp_path, capsys):
    """A line for each cost over the rows with the fewest tools; the others are numbers beside."""
    (tmp_path / "growth.txt").write_text(GROWTH)
    args = ["--growth", str(tmp_path / "growth.txt"), "--into", str(tmp_path)]
    assert pictures.main(args) == 0
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"
    axes = plt.figure().add_subplot()
    pictures.draw_growth(axes, pictures.growth_in(GROWTH))
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["uncertain, answer"] == [[250, 2], [4000, 20]]
    assert [text.get_text() for text in axes.texts] == ["8"] * 5
    (tmp_path / "growth.txt").write_text("nothing\n")
    assert pictures.main(args) == 2
    assert "no table by length" in capsys.readouterr().err


def test_the_benchmark_prints_the_columns_that_are_drawn():
    told = runpy.run_path(str(Path(pictures.__file__).parent.parent / "tests" / "benchmark.py"))
    printed = [name.replace(" ", "-") for name in told["ROWS"]]
    assert set(pictures.COSTS) - {"plain"} <= set(printed)
