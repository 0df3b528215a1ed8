"""Does the softmax difference know which direct answers are wrong, and does any rival know better?

    python -m research.scores RUN...            # --times 200: quicker, with rougher intervals

It reads run folders and runs no model. It ranks each score by how well it finds the wrong direct
answers; then it asks whether p(1) is a probability, and what the run's gate is worth. The answer
stands in research/RESULTS.md, "Which uncertainty?".
"""
import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import entr, log_softmax, softmax
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_curve

from data.calls import calls_key, parse_calls
from evaluate import Record, Run, printable, read_runs
from model import Tokenizer, find_checkpoint, seeded
from uncertainty import softmax_difference

# --- The scores: higher means less sure -----------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """All that a score may look at of one sample. N candidates, T tokens of the direct answer."""
    id: str
    candidates: np.ndarray              # (N,) l_n, nats
    log_p: np.ndarray                   # (T,) of each token, the end token included, nats
    entropy: np.ndarray                 # (T,) of the distribution that each was chosen from, nats
    prompt_tokens: int
    parts: dict[str, list[int]] | None = None       # "name", "values" -> which of the T tokens
    lengths: np.ndarray | None = None               # (N,) of how many tokens l_n is the sum
    orders: np.ndarray | None = None                # (M, N) l_n under M orders of the tools
    meanings: list[Hashable] | None = None          # of k sampled answers


@dataclass(frozen=True)
class Score:
    """A measure of uncertainty; `needs` is a field of Evidence that is not always there, or ""."""
    value: Callable[[Evidence], float]
    needs: str = ""


SCORES: dict[str, Score] = {}           # a new score is one decorated function


def score(needs: str = "", name: str = ""):
    """Enter the function into SCORES, under its own name or another."""
    def enter(function):
        SCORES[name or function.__name__] = Score(function, needs)
        return function
    return enter


@score()
def margin(e: Evidence) -> float:
    """1 - u, the paper's (margin sampling: Scheffer et al. 2001)."""
    return 1 - softmax_difference(torch.tensor(e.candidates))


@score("lengths")
def mean_margin(e: Evidence) -> float:
    """1 - u of the mean log-likelihoods a token instead of their sums."""
    return 1 - softmax_difference(torch.tensor(e.candidates / e.lengths))


@score()
def log_odds(e: Evidence) -> float:
    """l_(2) - l_(1), nats: the margin without its saturation; -inf without a rival."""
    first, second = sorted([*e.candidates, -np.inf], reverse=True)[:2]
    return second - first


@score()
def least_confidence(e: Evidence) -> float:
    """1 - p_(1)."""
    return 1 - softmax(e.candidates).max()


@score()
def entropy(e: Evidence) -> float:
    """H(p) of the candidates, nats."""
    return entr(softmax(e.candidates)).sum()


@score()
def normalised_entropy(e: Evidence) -> float:
    """H(p) / log N in [0, 1], since N differs from sample to sample; 0 for one candidate."""
    return entropy(e) / np.log(len(e.candidates)) if len(e.candidates) > 1 else 0.0


@score("orders")
def mutual_information(e: Evidence) -> float:
    """H(mean_m p^m) - mean_m H(p^m), nats, of M orders of the tools (BALD: Houlsby et al. 2011)."""
    p = softmax(e.orders, axis=1)
    return entr(p.mean(0)).sum() - entr(p).sum(1).mean()


@score("meanings")
def vote_share(e: Evidence) -> float:
    """1 - the share of the sampled answers that mean what most of them mean."""
    return 1 - max(Counter(e.meanings).values()) / len(e.meanings)


@score("meanings")
def semantic_entropy(e: Evidence) -> float:
    """Entropy of the meanings of the sampled answers, nats, by counts (Kuhn et al. 2023)."""
    return entr(np.array(list(Counter(e.meanings).values())) / len(e.meanings)).sum()


def over(part: str, values: str, reduce: Callable[[np.ndarray], float]):
    """A score that reduces the values of one part of the direct answer; NaN if it has no token."""
    def value(e: Evidence) -> float:
        tokens = getattr(e, values)
        tokens = tokens if part == "answer" else tokens[e.parts[part]]
        return reduce(tokens) if len(tokens) else np.nan
    return value


for part in ("answer", "name", "values"):           # Fomicheva et al. 2020
    needs = "" if part == "answer" else "parts"
    score(needs, f"{part}_nll")(over(part, "log_p", lambda log_p: -log_p.sum()))        # nats
    score(needs, f"{part}_perplexity")(over(part, "log_p", lambda log_p: np.exp(-log_p.mean())))
    score(needs, f"{part}_mean_entropy")(over(part, "entropy", np.mean))
    score(needs, f"{part}_max_entropy")(over(part, "entropy", np.max))

# What knows nothing of the answer: any score must beat these four.
score(name="random")(lambda e: torch.rand((), generator=seeded("random score", e.id)).item())
score(name="candidates")(lambda e: len(e.candidates))
score(name="answer_tokens")(lambda e: len(e.log_p))
score(name="prompt_tokens")(lambda e: e.prompt_tokens)


# --- From a line of H to its scores ---------------------------------------------------------------

TINY = Path(__file__).parent.parent / "data" / "tiny"
NAME = re.compile(r'"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"arguments"')
VALUE = re.compile(r'"(?:[^"\\]|\\.)*"\s*:\s*("(?:[^"\\]|\\.)*"|[^\s,{}\[\]"]+)')


def answer_parts(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[str, list[int]]:
    """Which tokens of an answer hold tools' names, and which the scalar values of arguments."""
    text = tokenizer.decode(ids)
    ends = [len(tokenizer.decode(ids[:i + 1])) for i in range(len(ids))]
    names = [found.span(1) for found in NAME.finditer(text)]
    quoted = [start - 1 for start, _ in names]
    values = [found.span(1) for found in VALUE.finditer(text) if found.start(1) not in quoted]
    parts = {}
    for part, spans in (("name", names), ("values", values)):
        parts[part] = [i for i, (start, end) in enumerate(zip([0, *ends], ends))
                       if any(start < last and end > first for first, last in spans)]
    return parts


def meaning(text: str) -> Hashable:
    """What an answer says, for votes: equal for the same calls.

    A record holds no tools, so an argument left out and one with its default's value differ here.
    """
    return calls_key(parse_calls(text).calls, ())


def evidence(line, tokenizer: Tokenizer | None = None) -> Evidence:
    """The Evidence of a line of H (train.Assessed) or of a run (evaluate.Record)."""
    extra, more = getattr(line, "extra", {}), {}
    if tokenizer:
        more["parts"] = answer_parts(tokenizer, line.ids)
        more["lengths"] = np.array([len(tokenizer.encode(name)) + 1 for name in line.candidates])
    if extra.get("orders"):
        more["orders"] = np.array(extra["orders"], float)
    if extra.get("sampled"):
        more["meanings"] = [meaning(verdict["text"]) for verdict in extra["sampled"]]
    return Evidence(line.id, np.array(list(line.candidates.values()), float), np.array(line.log_p),
                    np.array(line.entropy), line.prompt_tokens, **more)


def scores_of(lines: Sequence, tokenizer: Tokenizer | None = None) -> dict[str, np.ndarray]:
    """Each score of n lines, (n,) float64, for those scores whose data every line has."""
    seen = [evidence(line, tokenizer) for line in lines]
    return {name: np.array([entry.value(e) for e in seen], float) for name, entry in SCORES.items()
            if not entry.needs or all(getattr(e, entry.needs) is not None for e in seen)}


def tokenizer_of(config: dict) -> Tokenizer | None:
    """The tokenizer of a run's model; None where it is not on this machine."""
    name = str(config.get("model"))
    try:
        return Tokenizer(TINY if name == "tiny" else find_checkpoint(name, offline=True))
    except FileNotFoundError:
        return None


# --- A threshold without labels -------------------------------------------------------------------

def threshold_between(values: Sequence[float], count: int) -> float:
    """A threshold that the `count` largest values exceed, or fewer if the next is tied with them.

    NaN is the largest of all: a score that is not defined is sure of nothing.
    """
    ordered = np.sort(np.where(np.isnan(values), np.inf, values))[::-1]
    while 0 < count < len(ordered) and ordered[count - 1] == ordered[count]:
        count -= 1
    if count == 0:
        return float(ordered[0])
    if count == len(ordered):
        return -np.inf
    between = (ordered[count - 1] + ordered[count]) / 2
    return float(between if np.isfinite(between) else ordered[count])


def otsu(values: Sequence[float]) -> float:
    """The threshold that parts the finite values into two groups with the largest variance between
    them (Otsu 1979); 0 if there are fewer than two."""
    ordered = np.sort([value for value in values if np.isfinite(value)])[::-1]
    n = len(ordered)
    if n < 2:
        return 0.0

    def between(count: int) -> float:
        return count * (n - count) * (ordered[:count].mean() - ordered[count:].mean()) ** 2
    return threshold_between(ordered, max(range(1, n), key=between))


# --- Does a score rank the errors? Columns of n samples -------------------------------------------

RANKING = ("AUROC", "AUPR", "FPR@95", "AURC", "E-AURC", "PRR")


def cumulative(score: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(n + 1,) the sum of `value` over the i least sure; of equal scores each has their mean. A
    score that is NaN is the least sure of all."""
    least_sure_first = -np.where(np.isnan(score), np.inf, score)
    _, group, size = np.unique(least_sure_first, return_inverse=True, return_counts=True)
    means = np.bincount(group, value) / size
    return np.append(0, means.repeat(size).cumsum())


def risk_coverage(flagged: np.ndarray) -> np.ndarray:
    """(n,) the share of errors among the i surest, for i = 1..n (coverage i / n). flagged: the
    `cumulative` errors."""
    return (flagged[-1] - flagged[:-1])[::-1] / np.arange(1, len(flagged))


def areas(score: np.ndarray, error: np.ndarray) -> dict[str, float]:
    """Those measures of `ranking` that are quick enough for a bootstrap."""
    n, wrong = len(error), int(error.sum())
    if wrong in (0, n):
        return dict.fromkeys(("AUROC", "AURC", "E-AURC", "PRR"), np.nan)
    flagged = cumulative(score, error)
    # the area under the cumulated errors counts the pairs of an error and a sample that is surer
    pairs = np.trapezoid(flagged) - wrong ** 2 / 2
    aurc = risk_coverage(flagged).mean()
    ideal = risk_coverage(np.minimum(np.arange(n + 1), wrong)).mean()       # all errors first
    return {"AUROC": pairs / (wrong * (n - wrong)), "AURC": aurc, "E-AURC": aurc - ideal,
            "PRR": (wrong / n - aurc) / (wrong / n - ideal)}


def ranking(score: np.ndarray, error: np.ndarray) -> dict[str, float]:
    """How well a score puts the errors (1 = the direct answer is wrong) before the right answers.

    AUROC: the chance that an error is less sure than a right answer; ties count half. AUPR: average
    precision. FPR@95: the fewest right answers flagged where 95 % of the errors are. AURC: the mean
    risk over coverage; E-AURC: less that of the ideal order (Geifman and El-Yaniv 2019). PRR: the
    share of the way from random to ideal (Malinin 2020). All are NaN if all are right or all wrong.
    """
    found, rank = areas(score, error), rankdata(np.where(np.isnan(score), np.inf, score))
    if np.isnan(found["AUROC"]):
        return dict.fromkeys(RANKING, np.nan)
    fpr, tpr, _ = roc_curve(error, rank, drop_intermediate=False)
    found["FPR@95"] = fpr[tpr >= 0.95 - 1e-12][0]
    found["AUPR"] = average_precision_score(error, rank)
    return {name: float(found[name]) for name in RANKING}


def bootstrap(measure: Callable[..., dict[str, float]], times: int,
              *columns: np.ndarray) -> dict[str, np.ndarray]:
    """(times,) of each measure over resampled samples (Efron 1979).

    The same resamples serve every score of equal n, so two scores can be compared draw by draw.
    """
    n = len(columns[0])
    draws = np.random.default_rng(0).integers(n, size=(times, n))
    rows = [measure(*(column[draw] for column in columns)) for draw in draws]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrapped values; draws that are NaN are left out."""
    values = values[~np.isnan(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
    return float(low), float(high)


# --- Is the gate useful? --------------------------------------------------------------------------

def gate_rates(flagged: np.ndarray, error: np.ndarray) -> dict[str, float]:
    """TPR, FPR and precision of a gate, (n,) bool, against what called for it, (n,) bool."""
    def share(part, whole):
        return float(part.sum() / whole.sum()) if whole.any() else np.nan
    return {"TPR": share(flagged & error, error), "FPR": share(flagged & ~error, ~error),
            "precision": share(flagged & error, flagged)}


def gain_budget(score: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """(n + 1,) the accuracy gained by adapting the i least sure; gain is -1, 0 or 1 a sample."""
    return cumulative(score, gain) / len(gain)


def qini(score: np.ndarray, gain: np.ndarray) -> float:
    """The mean of `gain_budget` less the straight line of a random gate (Radcliffe 2007)."""
    curve = gain_budget(score, gain)
    return float((curve - np.linspace(0, curve[-1], len(curve))).mean())


# --- Is p(1) a probability? -----------------------------------------------------------------------

@dataclass(frozen=True)
class Choices:
    """The first choice among the candidates, of m samples that have more than one, at most N."""
    scores: np.ndarray                  # (m, N) l_n, nats; -inf beyond a sample's candidates
    gold: np.ndarray                    # (m,) which candidate is the first gold call's; -1: none is
    p: np.ndarray                       # (m,) p_(1)
    right: np.ndarray                   # (m,) bool, whether the first candidate is the gold's


def choices(records: Sequence[Record]) -> Choices | None:
    """The Choices of a run's records that have a rival and a gold call; None if there are none."""
    calls = [parse_calls(record.gold).calls for record in records]
    kept = [(record.candidates, called[0].name) for record, called in zip(records, calls)
            if called and len(record.candidates) > 1]
    if not kept:
        return None
    scores = np.full((len(kept), max(len(candidates) for candidates, _ in kept)), -np.inf)
    gold = np.full(len(kept), -1)
    for i, (candidates, name) in enumerate(kept):
        scores[i, :len(candidates)] = list(candidates.values())
        gold[i] = list(candidates).index(name) if name in candidates else -1
    return Choices(scores, gold, softmax(scores, axis=1).max(1), scores.argmax(1) == gold)


def reliability(p: np.ndarray, right: np.ndarray, bins: int = 10,
                mass: bool = False) -> list[tuple[int, float, float]]:
    """(count, mean p, share right) of each bin that is not empty, of equal width or equal mass."""
    if mass:
        parts = np.array_split(p.argsort(kind="stable"), bins)
    else:
        where = np.digitize(p, np.linspace(0, 1, bins + 1)[1:-1], right=True)
        parts = [np.flatnonzero(where == b) for b in range(bins)]
    return [(len(i), float(p[i].mean()), float(right[i].mean())) for i in parts if len(i)]


def calibration(p: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Is p the probability of being right? ECE, the mean gap over 10 bins of equal width or mass
    (Guo et al. 2017); MCE, the largest gap; Brier score; NLL, nats."""
    def gaps(mass: bool):
        return [(count / len(p), abs(at - share))
                for count, at, share in reliability(p, right, mass=mass)]
    return {"ECE": sum(weight * gap for weight, gap in gaps(False)),
            "ECE (equal mass)": sum(weight * gap for weight, gap in gaps(True)),
            "MCE": max(gap for _, gap in gaps(False)),
            "Brier": np.square(p - right).mean(),
            "NLL": -np.log(np.maximum(np.where(right, p, 1 - p), 1e-12)).mean()}


def temperature(scores: np.ndarray, gold: np.ndarray) -> float:
    """The T in [e^-3, e^5] that gives the gold candidates of softmax(l / T) the least NLL."""
    def nll(log_t: float) -> float:
        return -log_softmax(scores / np.exp(log_t), axis=1)[range(len(gold)), gold].sum()
    return float(np.exp(minimize_scalar(nll, bounds=(-3, 5), method="bounded").x))


def cross_fitted(scores: np.ndarray, gold: np.ndarray, folds: int = 5) -> np.ndarray:
    """(m,) p_(1) after temperature scaling, each sample's T fitted on the other folds."""
    fold, p = np.arange(len(gold)) % folds, np.empty(len(gold))
    for i in range(folds):
        rest = (fold != i) & (gold >= 0)
        t = temperature(scores[rest], gold[rest]) if rest.any() else 1.0
        p[fold == i] = softmax(scores[fold == i] / t, axis=1).max(1)
    return p


# --- The program ----------------------------------------------------------------------------------

def grid(rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Rows of text as a table under the first of them, the first column to the left."""
    if markdown:
        rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def wrong_and_gain(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Of n records: is the direct answer wrong (bool), and what the method gained (-1, 0 or 1)."""
    return (np.array([not r.base.exact for r in records]),
            np.array([int(r.answer.exact) - int(r.base.exact) for r in records]))


def with_interval(value: float, drawn: np.ndarray | None, digits: int = 2) -> str:
    """A measure as "0.71 [0.58, 0.83]", or without the interval where nothing was drawn."""
    low, high = (np.nan, np.nan) if drawn is None else interval(drawn)
    shown = f"{value:.{digits}f}"
    return shown if drawn is None else f"{shown} [{low:.{digits}f}, {high:.{digits}f}]"


def rank_scores(scores: dict[str, np.ndarray], error: np.ndarray,
                times: int) -> tuple[str, dict[str, str]]:
    """Which score ranks the errors first: a table, best first, and the AUROC of each as text."""
    if error.sum() in (0, len(error)):
        kind = "wrong" if error.any() else "right"
        return f"Nothing can be ranked: all {len(error)} direct answers are {kind}.", {}
    found = {name: ranking(values, error) for name, values in scores.items()}
    drawn = {name: bootstrap(areas, times, values, error) for name, values in scores.items()}
    best, *others = sorted(found, key=lambda name: -found[name]["AUROC"])
    rows, aurocs = [["score", *RANKING, "beside the best"]], {}
    for name in (best, *others):
        low, high = interval(drawn[best]["AUROC"] - drawn[name]["AUROC"])
        cells = [with_interval(found[name][key], drawn[name].get(key)) for key in RANKING]
        rows.append([name, *cells, "within noise" if low <= 0 <= high else "worse"])
        aurocs[name] = cells[0]
    rows[1][-1] = "the best"
    return (grid(rows) + "\nWithin noise: the 95 % interval of the difference in AUROC to the "
            "best, over the same resamples, holds 0."), aurocs


def judge_calibration(records: Sequence[Record], times: int) -> str:
    """Is p(1) the probability that the first candidate is the gold's, before and after scaling?"""
    first = choices(records)
    if first is None:
        return "p(1): no sample has more than one candidate."
    rows = []
    scaled = cross_fitted(first.scores, first.gold)
    for name, p in (("as it is", first.p), ("temperature, cross-fitted", scaled)):
        found = calibration(p, first.right)
        drawn = bootstrap(calibration, times, p, first.right)
        rows.append([name, f"{first.right.mean():.2f}",
                     *(with_interval(found[key], drawn[key], 3) for key in found)])
    return (f"Is p(1) the probability that the first candidate is the gold's tool ({len(first.p)} "
            "samples with more than one)?\n" + grid([["p(1)", "right", *found], *rows]))


def judge_gate(run: Run, name: str, score: np.ndarray, times: int) -> str:
    """What the run's gate is worth, as it is and at matched budgets of a score: against wrong
    direct answers and, where the method acted, in gain."""
    error, gain = wrong_and_gain(run.records)
    flagged = np.array([r.uncertain for r in run.records])
    acted = any(r.outcome not in ("certain", "direct") for r in run.records)
    gates = {f"this gate: {flagged.mean():.0%}": flagged}
    for share in range(10, 101, 10):
        tau = threshold_between(score, round(share / 100 * len(score)))
        gates[f"budget {share} %"] = ~(score <= tau)
    rows = [["adapted", "TPR", "FPR", "precision", *(["fixed", "harmed", "gain"] if acted else [])]]
    for label, on in gates.items():
        rates, drawn = gate_rates(on, error), bootstrap(gate_rates, times, on, error)
        gains = [f"{(gain[on] > 0).sum()}", f"{(gain[on] < 0).sum()}",
                 f"{100 * gain[on].sum() / len(gain):+.1f}"]
        rows.append([label, *(with_interval(rates[key], drawn[key]) for key in rates),
                     *(gains if acted else [])])
    text = f"Is the gate ({name}) useful? Adapted against: the direct answer is wrong\n"
    return text + grid(rows) + ("\n" + judge_gain(score, flagged, gain, times) if acted else "")


def judge_gain(score: np.ndarray, flagged: np.ndarray, gain: np.ndarray, times: int) -> str:
    """The gate against "adapting fixes it", a random gate, the best tau and the ideal gate."""
    fixes = gate_rates(flagged, gain > 0)
    area = bootstrap(lambda s, g: {"Qini": 100 * qini(s, g)}, times, score, gain)["Qini"]
    best, ideal = 100 * gain_budget(score, gain).max(), 100 * (gain > 0).mean()
    now = 100 * gain[flagged].sum() / len(gain)
    return (f"Against \"adapting fixes it\": TPR {fixes['TPR']:.2f}, FPR {fixes['FPR']:.2f}, "
            f"precision {fixes['precision']:.2f}. Qini, in points over a random gate: "
            f"{with_interval(100 * qini(score, gain), area)}.\n"
            f"The ideal gate gains {ideal:.1f} points, the best tau {best:.1f}, this one "
            f"{now:.1f}; regret: {best - now:.1f} to the best tau, {ideal - now:.1f} to the ideal "
            "gate. A sample that was not adapted counts as no gain.")


def report(run: Run, times: int = 1000) -> tuple[str, dict[str, str]]:
    """All that is asked of one run, as text, and the AUROC of each score for a table of runs."""
    if not run.records:
        raise ValueError(f"{run.folder}: no finished sample yet")
    tokenizer, (error, _) = tokenizer_of(run.config), wrong_and_gain(run.records)
    scores = scores_of(run.records, tokenizer)
    if run.config.get("then_vote") and run.config.get("method") != "base":
        for name in ("vote_share", "semantic_entropy"):     # adapted models gave these answers
            scores.pop(name, None)
    ranked, aurocs = rank_scores(scores, error, times)
    gate = run.config.get("gate_score", "margin")
    lines = [f"{printable(run.folder.name)}: {len(error)} samples, {error.sum()} direct answers "
             "wrong. Does a score rank those first?", ranked]
    if tokenizer is None:
        lines.append("Without the model's tokenizer there is no mean_margin, name_* and values_*.")
    lines += ["", judge_calibration(run.records, times), ""]
    lines.append(judge_gate(run, gate, scores[gate], times) if gate in scores else
                 f"The gate's score, {gate}, cannot be computed here.")
    return "\n".join(lines), aurocs


def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code: 0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="research.scores", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--times", type=int, default=1000, help="resamples for the intervals")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.runs)
        reports = [report(run, args.times) for run in runs]
    except (ValueError, OSError) as error:
        print(f"research.scores: error: {printable(str(error))}", file=sys.stderr)
        return 2
    print("\n\n".join(text for text, _ in reports))
    if len(reports) > 1:
        rows = [["score", *(printable(run.folder.name) for run in runs)]]
        for name in SCORES:
            cells = [aurocs.get(name, "-") for _, aurocs in reports]
            rows += [[name, *cells]] if set(cells) != {"-"} else []
        print("\nAUROC in each run\n" + grid(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
