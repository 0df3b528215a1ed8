"""What does a run look like? Four pictures: who is sure, who is right, what adapting gains.

    python -m research.pictures RUN... --into plots

It reads run folders and writes PNG files, of each run into a folder of its own. The pictures that
tell something stand in research/RESULTS.md, "Which uncertainty?".
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    print("Call it in the project's folder as: python -m research.pictures", file=sys.stderr)
    sys.exit(2)

import matplotlib
matplotlib.use("Agg")                   # draw into files; no screen is needed
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import softmax

from data.runs import Run
from research.scores import (areas, assessed_runs, choices, cross_fitted, cumulative, reliability,
                             risk_coverage, scores_of_run, wrong_and_gain)
from train import exit_codes

BLACK, GREY, LIGHT = "0.0", "0.45", "0.8"


def draw_reliability(axes, run: Run) -> None:
    """Mean p(1) and share right of each bin, with the bin's count."""
    scores, gold = choices(run.records)
    axes.plot([0, 1], [0, 1], color=LIGHT, label="calibrated")
    for p, style, color, name in (
            (softmax(scores, axis=1).max(1), "o-", BLACK, "as it is"),
            (cross_fitted(scores, gold), "s--", GREY, "temperature, cross-fitted")):
        bins = reliability(p, scores.argmax(1) == gold)
        axes.plot([at for _, at, _ in bins], [right for *_, right in bins], style, color=color,
                  label=name)
        for count, at, right in bins:
            axes.annotate(str(count), (at, right), (4, -10), textcoords="offset points", fontsize=8)
    axes.set(xlabel="mean p(1) of the bin", ylabel="share right")


def draw_risk_coverage(axes, run: Run) -> None:
    """The share of errors among the surest, by the four best scores, the margin and chance."""
    error, _ = wrong_and_gain(run.records)
    scores, coverage = scores_of_run(run), np.arange(1, len(error) + 1) / len(error)
    best = sorted(scores, key=lambda name: areas(scores[name], error)["AURC"])
    named = list(dict.fromkeys([*best[:4], "margin", "random"]))
    for name in best:
        style = {"color": LIGHT, "zorder": 0}
        if name in named:
            i = named.index(name)
            style = {"color": str(0.12 * i), "linestyle": "- -- -. :".split()[i % 4], "label": name}
        axes.plot(coverage, risk_coverage(cumulative(scores[name], error)), **style)
    axes.plot(coverage, risk_coverage(cumulative(error, error)), color=BLACK, linewidth=0.7,
              label="ideal")
    axes.set(xlabel="coverage", ylabel="risk (share of wrong answers)")


def draw_margin(axes, run: Run) -> None:
    """How many right and wrong direct answers there are at each margin."""
    margins = [[r.margin for r in run.records if r.base.exact == right] for right in (True, False)]
    axes.hist(margins, bins=20, range=(0, 1), stacked=True, color=[LIGHT, "0.2"], edgecolor=BLACK,
              label=["right", "wrong"])
    axes.axvline(run.config["tau"], color=BLACK, linestyle="--", label="tau")
    axes.set(xlabel="margin u", ylabel="samples")


def draw_gain_budget(axes, run: Run) -> None:
    """What adapting the least sure gains, by the margin, by an ideal gate and by a random one."""
    _, gain = wrong_and_gain(run.records)
    n, margins = len(gain), np.array([r.margin for r in run.records])
    for name, score, style in (("margin", -margins, "-"), ("ideal gate", gain, "--")):
        axes.plot(np.linspace(0, 100, n + 1), 100 * cumulative(score, gain) / n, style, color=BLACK,
                  label=name)
    axes.plot([0, 100], [0, 100 * gain.mean()], ":", color=GREY, label="random gate")
    axes.set(xlabel="share of the samples adapted, %", ylabel="gain in points")


PICTURES = {"reliability": (draw_reliability, "Is p(1) the probability of being right?"),
            "risk_coverage": (draw_risk_coverage, "Errors among the surest"),
            "margin": (draw_margin, "The margin of right and wrong direct answers"),
            "gain_budget": (draw_gain_budget, "What adapting the least sure gains")}


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--into", type=Path, default=Path("plots"), help="the folder for the files")
    args = parser.parse_args(argv)
    for run in assessed_runs(args.runs):
        into = args.into / run.folder.name
        into.mkdir(parents=True, exist_ok=True)
        for name, (draw, title) in PICTURES.items():
            figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
            axes.set_title(f"{title}\n{run.folder.name}, n = {len(run.records)}")
            draw(axes, run)
            axes.legend(fontsize=8)
            figure.savefig(into / f"{name}.png", dpi=120)
            plt.close(figure)
            print(into / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
