"""The pictures: which are drawn of which run, and that what they show is the run's."""
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest

from evaluate import Record, Run, Verdict, write_run
from research import pictures

ALL = {"reliability", "risk_coverage", "margin", "tau", "gain_budget", "seconds"}


def record(i: int, base: bool = False) -> Record:
    """Samples of rising margins; adapting fixes those below 0.5."""
    def verdict(exact): return Verdict("f()", exact, "", exact, True, "", exact, 1.0, 1.0)
    unsure = i < 5
    return Record(f"x-{i}", "What?", i / 10, unsure, "adapted" if unsure else "certain",
                  {"f": -0.5, "g": -1.5 - i}, verdict(base), verdict(base or unsure), [], [], [],
                  [], {"H": 1.0, "T": 2.0} if unsure else {"H": 1.0}, {},
                  '{"name": "f", "arguments": {}}', True, [-1.0], [0.5], [1], 9)


RUN = Run("run", {"bench": "sealtool", "model": "none/none", "tau": 0.5},
          [record(i, base=i % 2 > 0) for i in range(10)])


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_the_program_draws_six_pictures(tmp_path, capsys):
    write_run(tmp_path / "run", RUN.config, RUN.records)
    into = tmp_path / "plots"
    assert pictures.main([str(tmp_path / "run"), "--into", str(into)]) == 0
    assert {path.stem for path in into.iterdir()} == ALL
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in into.iterdir())
    assert pictures.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_picture_that_would_say_nothing_is_left_out():
    alone = [replace(r, candidates={"f": -1.0}, base=RUN.records[1].base) for r in RUN.records]
    assert set(pictures.drawable(RUN)) == ALL
    left = set(pictures.drawable(replace(RUN, records=alone)))
    assert left == ALL - {"reliability", "risk_coverage"}
    random = {**RUN.config, "gate": "random"}           # it did not adapt to all below tau
    assert "tau" not in pictures.drawable(replace(RUN, config=random))


def test_accuracy_over_tau_ends_where_the_run_did(axes):
    pictures.draw_tau(axes, RUN)
    accuracy, uncertain = (line.get_ydata() for line in axes.get_lines())
    assert (accuracy[0], uncertain[0]) == (0.5, 0)              # nobody is below 0
    assert (accuracy[-1], uncertain[-1]) == (pytest.approx(0.8), 0.5)


def test_the_ideal_gate_is_above_the_margin_and_both_end_alike(axes):
    pictures.draw_gain_budget(axes, RUN)
    margin, ideal, random = (line.get_ydata() for line in axes.get_lines())
    assert (ideal >= margin).all() and margin[1] == pytest.approx(10)    # the least sure is fixed
    assert margin[-1] == ideal[-1] == random[-1] == pytest.approx(30)
