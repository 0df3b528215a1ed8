"""What does a run look like? Six pictures: who is sure, who is right, what adapting gains.

    python -m research.pictures RUN... --into plots

It reads run folders and writes PNG files, of several runs into folders of their own. The pictures
that tell something stand in research/RESULTS.md, "Which uncertainty?".
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
matplotlib.use("Agg")                   # draw into files; no screen is needed
import matplotlib.pyplot as plt
import numpy as np

from evaluate import Run, printable, read_runs
from research.scores import (choices, cross_fitted, cumulative, gain_budget, ranking, reliability,
                             risk_coverage, scores_of, tokenizer_of, wrong_and_gain)

BLACK, GREY, LIGHT = "0.0", "0.45", "0.8"


def draw_reliability(axes, run: Run) -> None:
    """Mean p(1) and share right of each bin, with the bin's count."""
    first = choices(run.records)
    scaled = cross_fitted(first.scores, first.gold)
    bins = reliability(first.p, first.right)
    axes.plot([0, 1], [0, 1], color=LIGHT, label="calibrated")
    axes.plot([p for _, p, _ in bins], [right for *_, right in bins], "o-", color=BLACK,
              label="as it is")
    for count, p, right in bins:
        axes.annotate(str(count), (p, right), (4, -10), textcoords="offset points", fontsize=8)
    bins = reliability(scaled, first.right)
    axes.plot([p for _, p, _ in bins], [right for *_, right in bins], "s--", color=GREY,
              label="temperature, cross-fitted")


def draw_risk_coverage(axes, run: Run) -> None:
    """The share of errors among the surest, by the four best scores, the margin and chance."""
    error, _ = wrong_and_gain(run.records)
    scores = scores_of(run.records, tokenizer_of(run.config))
    coverage = np.arange(1, len(error) + 1) / len(error)
    best = sorted(scores, key=lambda name: ranking(scores[name], error)["AURC"])
    named = list(dict.fromkeys([*best[:4], "margin", "random"]))
    for name in best:
        curve, style = risk_coverage(cumulative(scores[name], error)), {"color": LIGHT, "zorder": 0}
        if name in named:
            i = named.index(name)
            style = {"color": str(0.12 * i), "linestyle": "- -- -. :".split()[i % 4],
                     "label": name}
        axes.plot(coverage, curve, **style)
    axes.plot(coverage, risk_coverage(cumulative(error, error)), color=BLACK, linewidth=0.7,
              label="ideal")


def draw_margin(axes, run: Run) -> None:
    """How many right and wrong direct answers there are at each margin."""
    margins = [[r.margin for r in run.records if r.base.exact == right] for right in (True, False)]
    axes.hist(margins, bins=20, range=(0, 1), stacked=True, color=[LIGHT, "0.2"], edgecolor=BLACK,
              label=["right", "wrong"])
    tau = run.config["tau"]
    axes.axvline(tau, color=BLACK, linestyle="--", label=f"tau = {tau:.3g}")


def draw_tau(axes, run: Run) -> None:
    """Accuracy and share uncertain for each tau up to the run's, above which nothing is known."""
    error, gain = wrong_and_gain(run.records)
    margins = np.array([r.margin for r in run.records])
    taus = np.linspace(0, run.config["tau"], 101)
    below = margins < taus[:, None]                                     # (101, n)
    axes.plot(taus, 1 - error.mean() + (below * gain).mean(1), "-", color=BLACK, label="accuracy")
    axes.plot(taus, below.mean(1), "--", color=GREY, label="uncertain")


def draw_gain_budget(axes, run: Run) -> None:
    """What adapting the least sure gains, by the margin, by an ideal gate and by a random one."""
    _, gain = wrong_and_gain(run.records)
    margins, percent = np.array([r.margin for r in run.records]), np.linspace(0, 100, len(gain) + 1)
    axes.plot(percent, 100 * gain_budget(-margins, gain), "-", color=BLACK, label="margin")
    axes.plot(percent, 100 * gain_budget(gain, gain), "--", color=GREY, label="ideal gate")
    axes.plot([0, 100], [0, 100 * gain.mean()], ":", color=GREY, label="random gate")


def draw_seconds(axes, run: Run) -> None:
    """The mean seconds of each step, over the samples that went through it."""
    steps = list(dict.fromkeys(step for r in run.records for step in r.seconds))[::-1]
    means = [np.mean([r.seconds[step] for r in run.records if step in r.seconds]) for step in steps]
    axes.barh(steps, means, color=LIGHT, edgecolor=BLACK)


PICTURES = {            # file name: who draws it, title, x, y
    "reliability": (draw_reliability, "Is p(1) the probability of being right?",
                    "mean p(1) of the bin", "share right"),
    "risk_coverage": (draw_risk_coverage, "Errors among the surest", "coverage",
                      "risk (share of wrong answers)"),
    "margin": (draw_margin, "The margin of right and wrong direct answers", "margin u", "samples"),
    "tau": (draw_tau, "Accuracy and share uncertain over tau", "tau", "share of the samples"),
    "gain_budget": (draw_gain_budget, "What adapting the least sure gains",
                    "share of the samples adapted, %", "gain in points"),
    "seconds": (draw_seconds, "Where the time goes", "seconds a sample", "")}


def drawable(run: Run) -> list[str]:
    """The pictures that a run has the samples for."""
    lacking = set() if choices(run.records) else {"reliability"}
    if len({r.base.exact for r in run.records}) == 1:       # nothing to rank
        lacking.add("risk_coverage")
    if run.config.get("gate", "all") != "all":              # not all below tau were adapted to
        lacking.add("tau")
    return [name for name in PICTURES if name not in lacking]


def draw(run: Run, into: Path) -> list[Path]:
    """Draw the pictures of a run as PNG files; ValueError if it has no samples."""
    if not run.records:
        raise ValueError(f"{run.folder}: no finished sample yet")
    into.mkdir(parents=True, exist_ok=True)
    paths = [into / f"{name}.png" for name in drawable(run)]
    for path in paths:
        draw_into, title, x, y = PICTURES[path.stem]
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        axes.set(title=f"{title}\n{run.folder.name}, n = {len(run.records)}", xlabel=x, ylabel=y)
        draw_into(axes, run)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        figure.savefig(path, dpi=120)
        plt.close(figure)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code: 0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="research.pictures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--into", type=Path, default=Path("plots"), help="the folder for the files")
    args = parser.parse_args(argv)
    try:
        for run in read_runs(args.runs):
            into = args.into if len(args.runs) == 1 else args.into / run.folder.name
            print(*draw(run, into), sep="\n")
    except (ValueError, OSError) as error:
        print(f"research.pictures: error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
