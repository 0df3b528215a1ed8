"""The pictures: that they are drawn, and that what they show is the run's."""
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from hand_made import failed, record

from data.runs import Run, write_run
from research import pictures

RUN = Run(Path("run"), {"model": "none/none", "method": "ttsi", "tau": 0.6},     # fixed below 0.5
          [record(i, i % 2 > 0, i % 2 > 0 or i < 5, margin=i / 10) for i in range(10)])


def test_the_program_draws_four_pictures_without_those_whose_h_failed(tmp_path, capsys):
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
