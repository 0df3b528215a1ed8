"""What does a run look like? Who is sure, who is right, what adapting gains, learns and costs.

    python -m research.pictures RUN... --into plots
    python tests/benchmark.py --growth --model DIR > growth.txt
    python -m research.pictures --growth growth.txt --into plots

It reads run folders and writes seven PNG files, of each run into a folder of its own; one sample at
a time is told by research/page.py. The eighth is of the benchmark's table of seconds by length. The
pictures that tell something stand in research/RESULTS.md.
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
from matplotlib.ticker import LogLocator
from scipy.special import softmax

from data.runs import Record, Run
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


def draw_margin_nll(axes, run: Run) -> None:
    """Each sample by its margin and by the direct answer's -log P, and what adapting did to it."""
    nll = scores_of_run(run)["answer_nll"]
    kinds = {"right": ("o", {"s": 14, "color": LIGHT}),
             "wrong": ("o", {"s": 14, "facecolors": "none", "edgecolors": GREY}),
             "fixed": ("^", {"s": 44, "color": BLACK}),
             "harmed": ("x", {"s": 44, "color": BLACK})}
    for name, (marker, style) in kinds.items():
        at = [i for i, r in enumerate(run.records) if name == became(r)]
        axes.scatter([run.records[i].margin for i in at], nll[at], marker=marker, **style,
                     label=f"{name}: {len(at)}")
    axes.axvline(run.config["tau"], color=GREY, linestyle="--", linewidth=0.8, label="tau")
    axes.set(xlabel="margin u", ylabel="answer_nll, nats")


def became(record: Record) -> str:
    """What came of a sample: fixed, harmed, or right or wrong as before."""
    before, after = record.base.exact, record.answer.exact
    if before == after:
        return "right" if after else "wrong"
    return "fixed" if after else "harmed"


def draw_seconds(axes, run: Run) -> None:
    """The seconds of each step of the method, a dot a sample, and their share of the whole run."""
    steps = list(dict.fromkeys([step for r in run.records for step in r.seconds]))
    total = sum([sum(r.seconds.values()) for r in run.records])
    for at, step in enumerate(steps):
        seconds = np.array([r.seconds[step] for r in run.records if step in r.seconds])
        spread = at + np.linspace(-0.3, 0.3, len(seconds))          # in the samples' order
        axes.plot(spread, seconds, "o", markersize=3, color=GREY, alpha=0.6)
        axes.hlines(np.median(seconds), at - 0.35, at + 0.35, color=BLACK,
                    label="median" if at == 0 else None)
    names = []
    for step in steps:
        own = [r.seconds[step] for r in run.records if step in r.seconds]
        names.append(f"{step}\nn = {len(own)}\n{sum(own) / max(total, 1e-9):.0%} of all seconds")
    axes.set_xticks(range(len(steps)), names)
    axes.set(ylabel="seconds of a sample", ylim=(0, None))


def draw_losses(axes, run: Run) -> None:
    """The losses of all adaptations, step by step, and their median where all have that step."""
    curves = [(r.losses, became(r)) for r in run.records if r.losses]
    styles = {"fixed": (BLACK, "-"), "harmed": (BLACK, ":")}
    seen = set()
    for losses, kind in sorted(curves, key=lambda curve: curve[1] in styles):
        color, line = styles.get(kind, (LIGHT, "-"))
        label = kind if kind in styles else "right or wrong as before"
        axes.plot(range(1, len(losses) + 1), losses, line, color=color, linewidth=0.9,
                  label=None if label in seen else label)
        seen.add(label)
    shortest = min([len(losses) for losses, _ in curves], default=0)
    if shortest:
        median = np.median([losses[:shortest] for losses, _ in curves], axis=0)
        axes.plot(range(1, shortest + 1), median, "--", color=GREY, linewidth=2.5,
                  label=f"median of {len(curves)}")
        axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="step", ylabel="loss on the pairs, nats a token")


def growth_in(text: str) -> list[dict[str, float]]:
    """The rows of the table that tests/benchmark.py --growth prints, by column; ValueError if there
    is none. Seconds that were not measured are NaN."""
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("tokens tools ")]
    if not heads:
        raise ValueError("no table by length; tests/benchmark.py --growth prints one")
    names, rows = lines[heads[-1]].split(), []
    for line in lines[heads[-1] + 1:]:
        if len(line.split()) == len(names):
            rows.append(dict(zip(names, map(float, line.split()))))
    return rows


COSTS = {"plain": ("plainly, the adapter on all tokens", GREY, ":"),        # column -> its line
         "an-uncertain-one,-full": ("uncertain, full", BLACK, "-"),
         "an-uncertain-one,-suffix": ("uncertain, suffix", BLACK, "--"),
         "an-uncertain-one,-answer": ("uncertain, answer", BLACK, "-."),
         "a-certain-sample": ("certain", GREY, "-")}


def draw_growth(axes, rows: Sequence[dict[str, float]]) -> None:
    """Seconds of a sample by the length of its prompt, where it has the fewest tools; and a mark
    where it has more."""
    fewest = min([row["tools"] for row in rows])
    few = [row for row in rows if row["tools"] == fewest]
    for column, (name, color, line) in COSTS.items():
        if np.isnan([row[column] for row in rows]).all():
            continue
        axes.plot([row["tokens"] for row in few], [row[column] for row in few], line, color=color,
                  marker="o", markersize=3, label=name)
        for row in rows:
            if row["tools"] > fewest and row[column] == row[column]:        # not NaN
                axes.annotate(f"{row['tools']:.0f}", (row["tokens"], row[column]), fontsize=7,
                              color=color, ha="center", va="center")
    axes.set(xlabel=f"tokens of the prompt ({fewest:.0f} tools; a number: so many)",
             ylabel="seconds of a sample", xscale="log", yscale="log")
    axes.set_xticks([row["tokens"] for row in few], [f"{row['tokens']:.0f}" for row in few])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")


def save(draw, data, title: str, file: Path) -> None:
    """Draw one picture of some data into a file, and print its path."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.set_title(title)
    draw(axes, data)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    print(file)


PICTURES = {"reliability": (draw_reliability, "Is p(1) the probability of being right?"),
            "risk_coverage": (draw_risk_coverage, "Errors among the surest"),
            "margin": (draw_margin, "The margin of right and wrong direct answers"),
            "gain_budget": (draw_gain_budget, "What adapting the least sure gains"),
            "margin_nll": (draw_margin_nll, "Two scores, and what adapting changed"),
            "seconds": (draw_seconds, "What each step costs"),
            "losses": (draw_losses, "What adapting learns")}


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--growth", type=Path, help="what tests/benchmark.py --growth printed")
    parser.add_argument("--into", type=Path, default=Path("plots"), help="the folder for the files")
    args = parser.parse_args(argv)
    if not args.runs and not args.growth:
        parser.error("give run folders, or --growth FILE")
    for run in assessed_runs(args.runs) if args.runs else []:
        for name, (draw, title) in PICTURES.items():
            title = f"{title}\n{run.folder.name}, n = {len(run.records)}"
            save(draw, run, title, args.into / run.folder.name / f"{name}.png")
    if args.growth:
        rows = growth_in(args.growth.read_text())
        save(draw_growth, rows, "How the cost of a sample grows", args.into / "growth.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
