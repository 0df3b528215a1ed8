"""Does the softmax difference know which direct answers are wrong, and does any rival know better?

    python -m research.scores runs/*

It reads run folders and runs no model. It ranks each score by how well it finds the wrong direct
answers; then it asks whether p(1) is a probability, and what the run's gate is worth. README.md
defines the measures; the answer stands in research/RESULTS.md, "Which uncertainty?".
"""
import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:
    print("Call it in the project's folder as: python -m research.scores", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import entr, log_softmax, softmax
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_curve

from augment import stands_in
from data.calls import call_keys, parse_calls
from data.chat import Tokenizer
from data.runs import Record, Run, read_runs
from evaluate import printable
from model import find_checkpoint, seeded
from train import TINY, exit_codes
from uncertainty import softmax_difference

# --- The scores of a sample: higher means less sure -----------------------------------------------

TOKEN_SCORES = ("nll", "perplexity", "mean_entropy", "max_entropy")
# those that H's lines give
SCORES = ("margin", "log_odds", "least_confidence", "entropy", "normalised_entropy", "mean_margin",
          *(f"{part}_{name}" for part in ("answer", "name", "values") for name in TOKEN_SCORES),
          "unsaid", "random", "candidates", "answer_tokens", "prompt_tokens")
NAME = re.compile(r'"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"arguments"')
VALUE = re.compile(r'"(?:[^"\\]|\\.)*"\s*:\s*("(?:[^"\\]|\\.)*"|[^\s,{}\[\]"]+)')


def answer_parts(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[str, list[int]]:
    """Which tokens of an answer hold tools' names, and which the scalar values of arguments."""
    text = tokenizer.decode(ids)
    ends = [len(tokenizer.decode(ids[:i + 1])) for i in range(len(ids))]
    names = [found.span(1) for found in NAME.finditer(text)]
    quoted = [start - 1 for start, _ in names]
    values = [found.span(1) for found in VALUE.finditer(text) if found.start(1) not in quoted]

    def tokens(spans: list[tuple[int, int]]) -> list[int]:
        return [i for i, (start, end) in enumerate(zip([0, *ends], ends))
                if any(start < last and end > first for first, last in spans)]
    return {"name": tokens(names), "values": tokens(values)}


def meaning(text: str) -> Hashable:
    """What an answer says, for votes. A record holds no tools, so an argument left out and one with
    its default's value differ here."""
    return frozenset(call_keys(parse_calls(text).calls, ()).items())


def of_candidates(l: np.ndarray) -> dict[str, float]:
    """The scores that look at nothing but l_n of the candidates, (N,) nats."""
    p, (first, second) = softmax(l), sorted([*l, -np.inf], reverse=True)[:2]
    return {"margin": 1 - softmax_difference(torch.tensor(l)),  # 1 - u, the paper's (Scheffer 2001)
            "log_odds": second - first,                         # does not saturate; -inf: no rival
            "least_confidence": 1 - p.max(),
            "entropy": entr(p).sum(),
            "normalised_entropy": entr(p).sum() / np.log(max(len(l), 2))}   # since N differs


def of_answer(log_p: np.ndarray, entropy: np.ndarray) -> dict[str, float]:
    """The scores of an answer's tokens, or of a part of it (Fomicheva et al. 2020). Where there is
    no such token, nothing is less sure."""
    if len(log_p) == 0:
        return dict.fromkeys(TOKEN_SCORES, np.inf)
    return {"nll": -log_p.sum(), "perplexity": np.exp(-log_p.mean()),
            "mean_entropy": entropy.mean(), "max_entropy": entropy.max()}


def scores_of_line(line, tokenizer: Tokenizer | None = None) -> dict[str, float]:
    """Each score whose data a line of H (train.Assessed) or of a run (data.runs.Record) holds. A
    new score is a line here."""
    l, log_p = np.array(list(line.candidates.values()), float), np.array(line.log_p)
    entropy, extra, parts = np.array(line.entropy), getattr(line, "extra", {}), {}
    scores = of_candidates(l)
    if tokenizer:
        lengths = np.array([len(tokenizer.encode(name)) + 1 for name in line.candidates])
        scores["mean_margin"] = of_candidates(l / lengths)["margin"]    # means a token, not sums
        parts = answer_parts(tokenizer, line.ids)
    if extra.get("orders"):
        p = softmax(np.array(extra["orders"], float), axis=1)           # (M, N), M orders of tools
        # H(mean_m p^m) - mean_m H(p^m), nats (BALD: Houlsby et al. 2011)
        scores["mutual_information"] = entr(p.mean(0)).sum() - entr(p).sum(1).mean()
    if extra.get("sampled") and not line.losses:        # else an adapted model gave these answers
        counts = np.array([*Counter(meaning(v["text"]) for v in extra["sampled"]).values()])
        scores["vote_share"] = 1 - counts.max() / counts.sum()          # of what most of them mean
        scores["semantic_entropy"] = entr(counts / counts.sum()).sum()  # Kuhn et al. 2023
    for part, tokens in {"answer": slice(None), **parts}.items():
        for name, value in of_answer(log_p[tokens], entropy[tokens]).items():
            scores[f"{part}_{name}"] = value
    direct = line.base.text if isinstance(line, Record) else line.text
    said = [stands_in(value, line.request) for call in parse_calls(direct).calls
            for value in call.arguments.values()]
    scores["unsaid"] = said.count(False)                # values that the request does not spell
    # What knows nothing of the answer: any score must beat these four.
    draw = torch.rand((), generator=seeded("random score", line.id)).item()
    return {**scores, "random": draw, "candidates": len(l), "answer_tokens": len(log_p),
            "prompt_tokens": line.prompt_tokens}


def scores_of(lines: Sequence, tokenizer: Tokenizer | None = None) -> dict[str, np.ndarray]:
    """Each score of n lines, (n,) float64, for those scores whose data every line has."""
    rows = [scores_of_line(line, tokenizer) for line in lines]
    return {name: np.array([row[name] for row in rows], float) for name in rows[0]
            if all(name in row for row in rows)}


def scores_of_run(run: Run) -> dict[str, np.ndarray]:
    """The same of a run's records; without its model's tokenizer some scores are lacking."""
    name, tokenizer = run.config["model"], None
    try:
        tokenizer = Tokenizer(TINY if name == "tiny" else find_checkpoint(name, offline=True))
    except FileNotFoundError:
        print(f"The tokenizer of {name} is not here: no mean_margin, name_* and values_*.")
    return scores_of(run.records, tokenizer)


def threshold_between(values: Sequence[float], count: int) -> float:
    """What the `count` largest values exceed, or fewer of them if the next is as large."""
    ordered = np.sort(values)[::-1]
    return float(ordered[count]) if count < len(ordered) else -np.inf


def otsu(values: Sequence[float]) -> float:
    """The threshold that parts the finite values into two groups with the largest variance between
    them (Otsu 1979); 0 if there are fewer than two."""
    ordered = np.sort([value for value in values if np.isfinite(value)])[::-1]
    n = len(ordered)

    def between(count: int) -> float:
        return count * (n - count) * (ordered[:count].mean() - ordered[count:].mean()) ** 2
    return threshold_between(ordered, max(range(1, n), key=between)) if n > 1 else 0.0


# --- Does a score rank the errors? Columns of n samples -------------------------------------------

def cumulative(score: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(n + 1,) the sum of `value` over the i least sure; of equal scores each has their mean."""
    _, group, size = np.unique(-1.0 * score, return_inverse=True, return_counts=True)
    means = np.bincount(group, value) / size
    return np.append(0, means.repeat(size).cumsum())


def risk_coverage(flagged: np.ndarray) -> np.ndarray:
    """(n,) the share of errors among the i surest, for i = 1..n (coverage i / n). flagged: the
    `cumulative` errors."""
    return (flagged[-1] - flagged[:-1])[::-1] / np.arange(1, len(flagged))


def areas(score: np.ndarray, error: np.ndarray) -> dict[str, float]:
    """How well a score puts the errors before the right answers (E-AURC: Geifman and El-Yaniv 2019;
    PRR: Malinin 2020). All are NaN if all are right or all wrong."""
    n, wrong = len(error), int(error.sum())
    if wrong in (0, n):
        return dict.fromkeys(("AUROC", "AURC", "E-AURC", "PRR"), np.nan)
    flagged = cumulative(score, error)
    pairs = np.trapezoid(flagged) - wrong ** 2 / 2      # of an error and a sample that is surer
    aurc = risk_coverage(flagged).mean()
    ideal = risk_coverage(np.minimum(np.arange(n + 1), wrong)).mean()   # all errors first
    return {"AUROC": pairs / (wrong * (n - wrong)), "AURC": aurc, "E-AURC": aurc - ideal,
            "PRR": (wrong / n - aurc) / (wrong / n - ideal)}


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrapped values; draws that are NaN are left out."""
    values = values[~np.isnan(values)]
    low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (np.nan, np.nan)
    return float(low), float(high)


def gate_rates(flagged: np.ndarray, error: np.ndarray) -> dict[str, float]:
    """TPR, FPR and precision of a gate, (n,) bool, against what called for it, (n,) bool."""
    def share(part, whole):
        return part.sum() / whole.sum() if whole.any() else np.nan
    return {"TPR": share(flagged & error, error), "FPR": share(flagged & ~error, ~error),
            "precision": share(flagged & error, flagged)}


def qini(score: np.ndarray, gain: np.ndarray) -> dict[str, float]:
    """The mean, over budgets, of the points gained by adapting the least sure, less the straight
    line of a random gate (Radcliffe 2007). gain: -1, 0 or 1 a sample."""
    curve = 100 * cumulative(score, gain) / len(gain)
    return {"Qini": (curve - np.linspace(0, curve[-1], len(curve))).mean()}


# --- What is drawn together ----------------------------------------------------------------------

def numbered(parts: Sequence[Sequence[str]]) -> list[int]:
    """For each sequence a number; it is the same where one begins the other."""
    order, found, last = sorted(range(len(parts)), key=lambda i: list(parts[i])), {}, None
    for i in order:
        begins = last is not None and list(parts[i][:len(parts[last])]) == list(parts[last])
        found[i] = found[last] if begins else len(set(found.values()))
        last = last if begins else i
    return [found[i] for i in range(len(parts))]


def dialogues(records: Sequence[Record]) -> np.ndarray:
    """(n,) for each record the number of its dialogue: of two whose requests begin one another it
    is the same."""
    return np.array(numbered([r.request.split() for r in records]), int)


# --- Is p(1) a probability? -----------------------------------------------------------------------

def has_choice(r: Record) -> bool:
    """Whether a record has a rival and a gold call."""
    return len(r.candidates) > 1 and bool(parse_calls(r.gold).calls)


def choices(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Of the m records that have a rival and a gold call: (m, N) l_n, nats, -inf beyond a sample's
    candidates; and (m,) which candidate is the first gold call's, -1 where none is."""
    kept = [(r.candidates, parse_calls(r.gold).calls[0].name) for r in records if has_choice(r)]
    scores = np.full((len(kept), max((len(l) for l, _ in kept), default=1)), -np.inf)
    for row, (candidates, _) in zip(scores, kept):
        row[:len(candidates)] = list(candidates.values())
    gold = [list(candidates).index(name) if name in candidates else -1 for candidates, name in kept]
    return scores, np.array(gold, int)


def reliability(p: np.ndarray, right: np.ndarray, mass: bool = False) -> list[tuple]:
    """(count, mean p, share right) of 10 bins of equal width or equal mass, but for empty ones."""
    if mass:
        parts = np.array_split(p.argsort(kind="stable"), 10)
    else:
        where = np.digitize(p, np.linspace(0, 1, 11)[1:-1], right=True)
        parts = [np.flatnonzero(where == b) for b in range(10)]
    return [(len(i), float(p[i].mean()), float(right[i].mean())) for i in parts if len(i)]


def calibration(p: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Is p the probability of being right (Guo et al. 2017)?"""
    def ece(mass: bool) -> float:
        return sum(count * abs(at - share) for count, at, share in reliability(p, right, mass))
    return {"ECE": ece(False) / len(p), "ECE (equal mass)": ece(True) / len(p),
            "MCE": max(abs(at - share) for _, at, share in reliability(p, right)),
            "Brier": np.square(p - right).mean(),
            "NLL": -np.log(np.maximum(np.where(right, p, 1 - p), 1e-12)).mean()}


def cross_fitted(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """(m,) p_(1) of softmax(l / T), each sample's T fitted, by the NLL of the gold candidates, on
    the other four of five folds."""
    fold, p = np.arange(len(gold)) % 5, np.empty(len(gold))
    for i in range(5):
        rest = (fold != i) & (gold >= 0)
        l, right = scores[rest], (range(rest.sum()), gold[rest])

        def nll(log_t: float) -> float:
            return -log_softmax(l / np.exp(log_t), axis=1)[right].sum()
        found = minimize_scalar(nll, bounds=(-3, 5), method="bounded").x if len(l) else 0.0
        p[fold == i] = softmax(scores[fold == i] / np.exp(found), axis=1).max(1)
    return p


def wrong_and_gain(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Of n records: is the direct answer wrong (bool), and what the method gained (-1, 0 or 1)."""
    return (np.array([not r.base.exact for r in records]),
            np.array([r.answer.exact - r.base.exact for r in records]))


# --- The program ----------------------------------------------------------------------------------

def with_intervals(measure: Callable[..., dict[str, float]], clusters: np.ndarray,
                   *columns: np.ndarray, digits: int = 2) -> dict[str, str]:
    """Each measure of the columns (n,) as "0.71 [0.58, 0.83]", by 1,000 resamples (Efron 1979) of
    the clusters (n,), which are the same for all columns."""
    members = [np.flatnonzero(clusters == each) for each in np.unique(clusters)]
    rows, texts = [], {}
    for drawn in np.random.default_rng(0).integers(len(members), size=(1000, len(members))):
        draw = np.concatenate([members[each] for each in drawn])
        rows.append(measure(*[column[draw] for column in columns]))
    for name, value in measure(*columns).items():
        low, high = interval(np.array([row[name] for row in rows]))
        texts[name] = f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return texts


def show(tables: dict[str, list[dict]]) -> None:
    """Print each table that has a row in Markdown; "-" for NaN, and where a row lacks a column."""
    def text(cell) -> str:
        cell = f"{cell:.2f}" if isinstance(cell, float) else str(cell)
        return "-" if cell == "nan" else cell
    for title, rows in tables.items():
        if rows:
            columns = list(dict.fromkeys(name for row in rows for name in row))
            texts = [columns, *([text(row.get(name, "-")) for name in columns] for row in rows)]
            widths = [max(map(len, column)) for column in zip(*texts)]
            texts.insert(1, ["-" * width for width in widths])
            lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in texts]
            print("\n".join([title, "", *lines, ""]))


def rank_scores(scores: dict[str, np.ndarray], error: np.ndarray,
                clusters: np.ndarray) -> list[dict]:
    """Which score ranks the errors first? The best score first, and by how much it leads."""
    if error.all() or not error.any():
        return [{"score": f"all {len(error)} direct answers are alike: nothing can be ranked"}]
    order = sorted(scores, key=lambda name: -areas(scores[name], error)["AUROC"])

    def beside_the_best(score, error, best) -> dict[str, float]:
        found = areas(score, error)
        return {**found, "the best's lead": areas(best, error)["AUROC"] - found["AUROC"]}
    rows = []
    for name in order:
        found, rank = scores[name], rankdata(scores[name])
        fpr, tpr, _ = roc_curve(error, rank, drop_intermediate=False)
        rows.append({
            "score": name,
            **with_intervals(beside_the_best, clusters, found, error, scores[order[0]]),
            "AUPR": average_precision_score(error, rank), "FPR@95": fpr[tpr >= 0.95 - 1e-12][0]})
    return rows


def judge_calibration(records: Sequence[Record]) -> list[dict]:
    """Is p(1) the probability that the first candidate is the gold's, before and after scaling?"""
    records = [r for r in records if has_choice(r)]
    scores, gold = choices(records)
    if len(gold) == 0:
        return [{"p(1)": "no sample has more than one candidate"}]
    own = dialogues(records)
    right, rows = scores.argmax(1) == gold, []
    for name, p in (("as it is", softmax(scores, axis=1).max(1)),
                    ("temperature, cross-fitted", cross_fitted(scores, gold))):
        rows.append({"p(1)": name, "n": len(p), "right": right.mean(),
                     **with_intervals(calibration, own, p, right, digits=3)})
    return rows


def judge_gate(run: Run, score: np.ndarray, clusters: np.ndarray) -> list[dict]:
    """What a run's gate is worth, as it is and at matched budgets of a score: against wrong direct
    answers, against "adapting fixes it", and in points gained, of which a sample that was not
    adapted to has none."""
    flagged = np.array([r.uncertain for r in run.records])
    error, gain = wrong_and_gain(run.records)
    gates, rows = {f"this gate: {flagged.mean():.0%}": flagged}, []
    for percent in range(10, 101, 10):
        threshold = threshold_between(score, round(percent / 100 * len(score)))
        gates[f"budget {percent} %"] = score > threshold
    best, ideal = cumulative(score, gain).max() / len(gain), (gain > 0).mean()
    for label, on in gates.items():
        now, fixes = gain[on].sum() / len(gain), gate_rates(on, gain > 0)
        rows.append({"adapted": label, **with_intervals(gate_rates, clusters, on, error),
                     **{f"{name} (fixes)": rate for name, rate in fixes.items()},
                     "fixed": (gain[on] > 0).sum(), "harmed": (gain[on] < 0).sum(),
                     "gain": 100 * now, "regret to best tau": 100 * (best - now),
                     "to ideal gate": 100 * (ideal - now)})
    return rows


def tables(run: Run) -> dict[str, list[dict]]:
    """All that is asked of one run."""
    scores, gate = scores_of_run(run), run.config.get("gate_score")
    gate = gate if gate in scores else "margin"
    error, gain = wrong_and_gain(run.records)
    own = dialogues(run.records)
    area = with_intervals(qini, own, scores[gate], gain)["Qini"]
    return {
        f"{printable(run.folder.name)}: {len(error)} samples of {own.max() + 1} dialogues, "
        f"{error.sum()} direct answers wrong. "
        "Does a score rank those first?": rank_scores(scores, error, own),
        "Is p(1) the probability that the first candidate is the gold's tool?":
            judge_calibration(run.records),
        f"Is the gate ({gate}) useful, against wrong direct answers and what adapting fixes? Its "
        f"Qini is {area}, in points over a random gate": judge_gate(run, scores[gate], own)}


def scored_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs, without the samples that have no gold answer; it says how many they are. A run of
    nothing else, as of a request of one's own, is left out."""
    found = []
    for run in read_runs(folders):
        there = [record for record in run.records if record.answer.exact is not None]
        if len(there) < len(run.records):
            print(f"{printable(run.folder.name)}: {len(run.records) - len(there)} of "
                  f"{len(run.records)} samples have no gold answer; they are left out.\n")
        if there or not run.records:
            found.append(replace(run, records=there))
    return found


def assessed_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs with records, without those whose H failed: these have no margin. It says how many
    they are."""
    found = []
    for run in scored_runs(folders):
        there = [record for record in run.records if record.margin is not None]
        if len(there) < len(run.records):
            print(f"{printable(run.folder.name)}: H failed for {len(run.records) - len(there)} of "
                  f"{len(run.records)} samples; they are left out.\n")
        if there:
            found.append(replace(run, records=there))
    return found


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    for run in assessed_runs(parser.parse_args(argv).runs):
        show(tables(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
