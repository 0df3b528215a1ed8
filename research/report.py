"""Is a gain real? Runs compared: intervals, tests, costs, votes, pairs, and the paper's figures.

    python -m research.report runs/*              # runs that differ only in their seed go together
    python -m research.report runs/* --markdown   # tables for RESULTS.md; --json: for a machine

It reads run folders and runs no model. The answer stands in research/RESULTS.md, "Is a gain real?".
"""
import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
from scipy.stats import binomtest, norm, permutation_test

from data.calls import Call, parse_calls
from evaluate import PAPER_GAIN, Record, Run, printable, read_runs
from research.scores import grid, interval, meaning

# The paper's figures, in percent: Qwen2.5-1.5B-Instruct, whole benchmarks, means of 5 seeds.
PAPER = {       # (benchmark, method, gate, lesson, tau), or so much of it as matters: accuracy
    ("sealtool", "ttsi", "margin", "self", 0.95): 72.43, ("sealtool", "base"): 66.37,
    ("sealtool", "ttsi", "certain", "self", 0.95): 70.07, ("sealtool", "sft"): 70.20,
    ("sealtool", "ttsi", "margin", "self", 0.35): 68.10,
    ("sealtool", "ttsi", "all", "self"): 73.47, ("sealtool", "ttsi", "all", "gold"): 78.89}
PAPER_SETTING = {"limit": 0, "k": 1, "adapt": "full", "rank": 8, "alpha": 16.0, "epochs": 5,
                 "lr": 1e-4, "reset": "sample", "filter": "schema"}
PAPER_VOTES = {"ttsi": "+5.48 / +3.85 / +3.46", "ttd": "+6.42 / +5.53 / +6.11"}
FREE = {"facts", "batch", "checkpointing", "out", "device", "pack", "offline", "fresh",
        "verbose"}                                  # options that change no result
USUAL = {"gate_score": "margin", "threshold": "otsu", "budget": 0.0, "lesson": "self",
         "filter": "schema", "reset": "sample", "draws": 5, "train_batch": 8}   # as if not there
OF_BENCH = ("bench", "data", "train_data")          # options that another benchmark brings with it
H_STEPS = {"H", "prefill", "score", "base"}         # what leads to the direct answer


# --- Statistics: a gain is (S seeds, n samples) of -1, 0 or 1 -------------------------------------

def mean(values: Iterable[float]) -> float:
    """The mean; NaN of nothing."""
    values = list(values)
    return fmean(values) if values else math.nan


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of the share right / n (Wilson 1927)."""
    found = binomtest(right, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def mcnemar(fixed: int, harmed: int) -> float:
    """The exact two-sided p of fixed against harmed, were both as likely (McNemar 1947)."""
    return float(binomtest(fixed, fixed + harmed).pvalue) if fixed + harmed else 1.0


def sign_flip(gain: np.ndarray) -> float:
    """The two-sided p of the sum of gains (n,), could each as well have had the other sign: exact
    for up to 13 that are not 0, else of 9,999 random flips."""
    changed = gain[gain != 0]                       # flipping a 0 changes nothing
    if len(changed) < 2:                            # one alone may as well have had the other sign
        return 1.0
    return float(permutation_test((changed,), np.sum, permutation_type="samples", vectorized=True,
                                  batch=1000, rng=0).pvalue)


def p_value(gains: Sequence[np.ndarray]) -> float:
    """The p of the gains of one or several benchmarks, their samples pooled: for one seed the exact
    McNemar test; for several, which share their samples, sign flips of each sample's mean."""
    pooled = np.concatenate([gain.mean(0) for gain in gains])
    if all(len(gain) == 1 for gain in gains):
        return mcnemar(int((pooled > 0).sum()), int((pooled < 0).sum()))
    return sign_flip(pooled)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979), in the same order."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def nested_bootstrap(gain: np.ndarray, rng: np.random.Generator, times: int = 2000) -> np.ndarray:
    """(times,) mean gains of resamples: n samples are drawn, and for each S of its seeds."""
    seeds, n = gain.shape
    samples = rng.integers(n, size=(times, 1, n))
    return gain[rng.integers(seeds, size=(times, seeds, n)), samples].mean((1, 2))


def mean_interval(gains: Sequence[np.ndarray]) -> tuple[float, float]:
    """The 95 % interval of the mean gain over benchmarks (or of one); NaN if nothing changed."""
    if not any(gain.any() for gain in gains):
        return math.nan, math.nan
    # one generator for all: if each had its own, benchmarks of equal size would draw the same rows
    rng = np.random.default_rng(0)
    return interval(np.mean([nested_bootstrap(gain, rng) for gain in gains], axis=0))


def detectable(n: int, discordant: float = 0.15) -> float:
    """The smallest gain, as a share, that one run of n samples finds with 80 % power at 5 %, where
    that share of the answers changes (or, for a larger gain, as many as it takes)."""
    z = norm.ppf(0.975) + norm.ppf(0.8)
    return float(max(z * math.sqrt(discordant / n), z * z / n))


def pass_at(k: int, drawn: int, right: int) -> float:
    """The unbiased estimate of P(one of k draws is right) (Chen et al. 2021)."""
    return 1 - math.comb(drawn - right, k) / math.comb(drawn, k)


# --- Runs that belong together --------------------------------------------------------------------

@dataclass(frozen=True)
class Group:
    """The runs of one configuration, over the n samples that all S seeds have, in one order."""
    bench: str
    name: str                           # the method, and the options that tell it from other groups
    config: dict
    seeds: list[list[Record]]           # S of n
    left_out: int                       # samples that not every seed has

    @property
    def records(self) -> list[Record]:
        return [record for seed in self.seeds for record in seed]

    @property
    def gain(self) -> np.ndarray:
        return np.array([[int(r.answer.exact) - int(r.base.exact) for r in seed]
                         for seed in self.seeds])

    @property
    def method(self) -> str:
        return self.config.get("method", "ttsi")


def settings(config: dict, *without: str) -> str:
    """What a run depends on, as text; an option that is off is as one that is not there."""
    return json.dumps({name: value for name, value in config.items()
                       if name not in FREE.union(without) and value is not False
                       and value != "" and value != USUAL.get(name)}, sort_keys=True)


def told_apart(configs: Sequence[dict]) -> list[str]:
    """The options by which runs differ, and not just because a benchmark brings them with it."""
    def differs(name: str, bench: str) -> bool:
        own = [config for config in configs if name not in OF_BENCH or config["bench"] == bench]
        return len({settings({name: config.get(name, "")}) for config in own}) > 1
    names = dict.fromkeys(name for config in configs for name in config)
    return [name for name in names if name not in ("seed", "bench", "method", "uses_labels")
            and any(differs(name, config["bench"]) for config in configs)]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs with records, those together that differ in nothing but their seed."""
    runs = [run for run in runs if run.records]
    shown, groups, together = told_apart([run.config for run in runs]), [], {}
    for run in runs:
        config, seeds = together.setdefault(settings(run.config, "seed"), (run.config, {}))
        known = seeds.setdefault(run.config.get("seed"), {})
        for record in run.records:
            known.setdefault(record.id, record)             # the same seed twice is one run
    for config, seeds in together.values():
        first, *others = seeds.values()
        ids = [id for id in first if all(id in other for other in others)]
        name = [config.get("method", "ttsi")]
        name += [f"{option} {config[option]}" for option in shown
                 if settings({option: config.get(option, "")}) != "{}"]
        name += ["(uses labels)"] if config.get("uses_labels") else []
        bench = config["bench"] + (", bundled" if config.get("data") == "bundled" else "")
        left_out = len(set().union(*seeds.values())) - len(ids)
        if ids:
            groups.append(Group(bench, printable(" ".join(name)), config,
                                [[seed[id] for id in ids] for seed in seeds.values()], left_out))
    return groups


def families(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups that differ in their benchmark only."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(settings(group.config, "seed", *OF_BENCH), []).append(group)
    return list(found.values())


def rows_of(groups: Sequence[Group], row: Callable[[Sequence[Group]], dict]) -> list[dict]:
    """A row of each group, and of each family of several benchmarks, which weigh the same."""
    rows = [{"bench": group.bench, "run": group.name, **row([group])} for group in groups]
    for family in families(groups):
        if len({group.bench for group in family}) > 1:
            rows.append({"bench": f"mean of {len(family)}", "run": family[0].name, **row(family)})
    return rows


def share(groups: Sequence[Group], value: Callable[[Record], float], of=lambda r: True) -> float:
    """The mean over benchmarks of a mean over records, or over some of them."""
    return mean(mean(value(r) for r in group.records if of(r)) for group in groups)


def over_seeds(groups: Sequence[Group], value: Callable[[Record], float]) -> dict[str, float]:
    """Mean and SD over seeds of the mean over benchmarks; SD is NaN for one, or unlike, numbers of
    seeds."""
    means = [[mean(map(value, seed)) for seed in group.seeds] for group in groups]
    seeds = {len(own) for own in means}
    sd = stdev(map(mean, zip(*means))) if len(seeds) == 1 and seeds != {1} else math.nan
    return {"mean": mean(map(mean, means)), "sd": sd}


# --- Rows: of one group, or of a family as the mean over its benchmarks ---------------------------

def fixed(r: Record) -> bool:
    return r.answer.exact and not r.base.exact


def acted(r: Record) -> bool:
    """Whether the method did more for a sample than to answer it directly."""
    return r.outcome not in ("certain", "direct")


def gains(groups: Sequence[Group]) -> dict:
    """Accuracy before and after, the gain with its interval and p, and whom the method acted on."""
    gain, n = [group.gain for group in groups], sum(len(group.seeds[0]) for group in groups)
    right = sum(r.base.exact for r in groups[0].seeds[0])
    return {"n": n, "seeds": min(len(group.seeds) for group in groups),
            "uncertain": share(groups, lambda r: r.uncertain), "acted": share(groups, acted),
            "TPR": share(groups, acted, of=lambda r: not r.base.exact),
            "before": share(groups, lambda r: r.base.exact),
            "its interval": wilson(right, n) if len(groups) == 1 else (math.nan, math.nan),
            "after": over_seeds(groups, lambda r: r.answer.exact),
            "gain": over_seeds(groups, lambda r: r.answer.exact - r.base.exact),
            "interval": mean_interval(gain), "fixed": sum(int((g > 0).sum()) for g in gain),
            "harmed": sum(int((g < 0).sum()) for g in gain), "p": p_value(gain), "holm": math.nan,
            "detectable": detectable(n), **papers(groups)}


def compare(groups: Sequence[Group]) -> list[dict]:
    """The gains, with p adjusted for the several benchmarks of a configuration."""
    rows = rows_of(groups, gains)
    for family in families(groups):
        own = [rows[i] for i, group in enumerate(groups) if any(group is one for one in family)]
        for row, p in zip(own, holm([row["p"] for row in own])):
            row["holm"] = p
    return rows


def as_in_paper(config: dict) -> bool:
    """Whether a run has the paper's model, data and settings (how to write pairs is left open)."""
    source = config.get("data", "")
    return Path(config.get("model", "")).name == "Qwen2.5-1.5B-Instruct" \
        and source != "bundled" and not Path(source).is_file() \
        and all(config.get(name, value) == value for name, value in PAPER_SETTING.items())


def papers(groups: Sequence[Group]) -> dict[str, float]:
    """The paper's accuracy, in percent, and gain, in points, where it has that very setting."""
    config, accuracy, gain = groups[0].config, math.nan, math.nan
    if len(groups) == 1 and as_in_paper(config):
        key = (config["bench"], groups[0].method, config.get("gate", "margin"),
               config.get("lesson", "self"), config.get("tau"))
        accuracy = PAPER.get(key, PAPER.get(key[:4], PAPER.get(key[:2], math.nan)))
        if key[1:] == ("ttsi", "margin", "self", 0.95):
            gain = PAPER_GAIN.get(key[0], math.nan)
    return {"paper": accuracy, "paper's gain": gain}


def costs(groups: Sequence[Group], everybody: Sequence[Group]) -> dict:
    """What was fixed, by what the direct answer lacked, and what a sample costs."""
    kinds = Counter(kind_of(r.base.reason) for group in groups for r in group.records if fixed(r))
    extra = [share([group], extra_seconds, of=acted) for group in groups]
    draws = [seconds / draw_seconds(group, everybody) for seconds, group in zip(extra, groups)]
    return {**{f"fixed {kind}": kinds[kind] for kind in ("format", "name", "argument")},
            "seconds": share(groups, lambda r: sum(r.seconds.values())),
            "tokens": share(groups, lambda r: sum(r.tokens.values())),
            "extra seconds": mean(extra), "draws": mean(draws)}


def kind_of(reason: str) -> str:
    """What a wrong answer lacked: its format, the tool's name, or an argument."""
    kind = reason.partition(":")[0]
    if kind in ("unparsable", "wrong number of calls"):
        return "format"
    return "name" if kind == "wrong name" else "argument"


def extra_seconds(r: Record) -> float:
    """What was spent on a sample beyond its direct answer."""
    return sum(seconds for step, seconds in r.seconds.items() if step not in H_STEPS)


def draw_seconds(group: Group, everybody: Sequence[Group]) -> float:
    """The mean cost of a sampled answer in all runs of a benchmark and model; without any, of the
    direct answer, which is more; NaN where neither is known."""
    def task(g): return g.bench, g.config.get("model")
    records = [r for other in everybody if task(other) == task(group) for r in other.records]
    sampled = [r.seconds["sampled"] / len(r.extra["sampled"]) for r in records
               if r.extra.get("sampled") and "sampled" in r.seconds]
    direct = [sum(r.seconds.values()) - extra_seconds(r) for r in records]
    return mean(sampled or direct) or math.nan


def voted(sampled: Sequence[dict]) -> bool:
    """Whether the majority is right: the first answer that means what most of them mean."""
    meanings = [meaning(verdict["text"]) for verdict in sampled]
    return sampled[meanings.index(Counter(meanings).most_common(1)[0][0])]["exact"]


def votes(groups: Sequence[Group]) -> dict:
    """The paper's Table 1, of groups whose every sample has sampled answers."""
    counts = [len(r.extra["sampled"]) for group in groups for r in group.records]
    direct = "base" if groups[0].method == "vote" else "answer"
    known = all(as_in_paper(group.config) for group in groups)
    row = {"n": sum(len(group.seeds[0]) for group in groups),
           "seeds": min(len(group.seeds) for group in groups),
           "paper": PAPER_VOTES.get(groups[0].method, "-") if known else "-",
           "direct": over_seeds(groups, lambda r: getattr(r, direct).exact),
           "vote": over_seeds(groups, lambda r: voted(r.extra["sampled"]))}
    for k in sorted({1, min(5, *counts), min(counts)}):
        row[f"pass@{k}"] = over_seeds(groups, lambda r: pass_at(
            k, len(r.extra["sampled"]), sum(verdict["exact"] for verdict in r.extra["sampled"])))
    return row


def latency(group: Group) -> dict:
    """Median seconds of each step, over the samples that went through it."""
    steps = dict.fromkeys(step for r in group.records for step in r.seconds)
    return {"bench": group.bench, "run": group.name, **{
        step: median(r.seconds[step] for r in group.records if step in r.seconds)
        for step in steps}}


# --- What was written and learnt ------------------------------------------------------------------

def rouge_l(text: str, other: str) -> float:
    """ROUGE-L, in [0, 1]: F1 of the longest common subsequence of words (Lin 2004)."""
    a, b = text.casefold().split(), other.casefold().split()
    row = [0] * (len(b) + 1)            # row[j]: the longest of what was read of a, and b[:j]
    for word in a:
        before, row = row, [0]
        for j, against in enumerate(b):
            row.append(before[j] + 1 if word == against else max(before[j + 1], row[j]))
    return 2 * row[-1] / (len(a) + len(b)) if a or b else 1.0


def distinct_2(texts: Iterable[str]) -> float:
    """The share of word pairs, over all texts, that differ (Li et al. 2016); NaN without any."""
    words = [text.casefold().split() for text in texts]
    pairs = [pair for own in words for pair in zip(own, own[1:])]
    return len(set(pairs)) / len(pairs) if pairs else math.nan


def argument_values(calls: Iterable[Call]) -> list[str]:
    """The scalar values of calls' arguments as text, those in lists and objects too."""
    def scalars(value) -> list[str]:
        if not isinstance(value, (dict, list)):
            return [str(value)]
        inside = value.values() if isinstance(value, dict) else value
        return [text for item in inside for text in scalars(item)]
    return [text for call in calls for text in scalars(call.arguments)]


def within(text: str, other: str) -> bool:
    return text.casefold() in other.casefold()


def same_tools(calls: Sequence[Call], text: str) -> bool:
    """Whether calls are of the tools that a text calls, one to one."""
    return Counter(c.name for c in calls) == Counter(c.name for c in parse_calls(text).calls)


def leaks(r: Record, request: str, calls: Sequence[Call]) -> int:
    """How many gold values of 3 characters or more a pair holds, but not the sample's request."""
    said = " ".join([request, *argument_values(calls)])
    return sum(len(value) > 2 and within(value, said) and not within(value, r.request)
               for value in argument_values(parse_calls(r.gold).calls))


def pairs(group: Group) -> dict:
    """The pairs' validity, novelty and agreement with the sample, and how learning them went."""
    records = group.records
    found = [(r, p["request"], parse_calls(p["text"]).calls) for r in records for p in r.pairs]
    rejected = Counter(j["reason"].partition(":")[0] for r in records for j in r.rejected)
    requests, losses = [request for _, request, _ in found], [r.losses for r in records if r.losses]
    return {
        "bench": group.bench, "run": group.name, "pairs": len(found),
        "valid": len(found) / (len(found) + rejected.total()),
        "unique": len(set(requests)) / len(requests), "distinct-2": distinct_2(requests),
        "ROUGE-L": mean(rouge_l(request, r.request) for r, request, _ in found),
        "copied values": mean(within(value, r.request) for r, _, calls in found
                              for value in argument_values(calls)),
        "tool as direct": mean(same_tools(calls, r.base.text) for r, _, calls in found),
        "tool as gold": mean(same_tools(calls, r.gold) for r, _, calls in found),
        "read back": sum(p["read_back"] for r in records for p in r.pairs),
        "repeats": sum(within(request, r.request) for r, request, _ in found),
        "leaks": sum(leaks(r, request, calls) for r, request, calls in found),
        "first loss": mean(own[0] for own in losses), "last loss": mean(own[-1] for own in losses),
        "largest norm": max((norm for r in records for norm in r.norms), default=math.nan),
        "non-finite": sum(r.outcome == "non-finite" for r in records),
        "KL": mean(r.extra["kl"] for r in records if r.extra.get("kl") is not None),
        "rejected": dict(rejected.most_common())}


# --- The program ----------------------------------------------------------------------------------

TITLES = {"gains": "Gains, in points of accuracy",
          "costs": "What was fixed, and what a sample cost",
          "votes": "Direct answers, majority vote, pass@k (the paper's Table 1)",
          "pairs": "The pairs, and learning them",
          "seconds": "Median seconds of each step, where a sample went through it"}
NOTES = {
    "gains": "its interval: Wilson's. interval: of the gain, by a paired bootstrap over samples, "
    "seeds nested; both 95 %. p: exact McNemar; of several seeds, sign flips of each sample's mean "
    "gain; of a mean over benchmarks, all samples pooled. holm: p, over the benchmarks.",
    "costs": "fixed: by what was wrong before. extra seconds: of a sample that the method acts on, "
    "beyond its direct answer. draws: how many sampled answers cost as many.",
    "votes": "paper: means of four benchmarks, as gains over the base of direct / vote / pass@5.",
    "pairs": "Shares in percent. valid: of all tries. ROUGE-L: to the sample's request. repeats: "
    "the request again. leaks: gold values in a pair that the sample's request does not hold."}
SHARES = {"uncertain", "acted", "TPR", "before", "valid", "unique", "distinct-2", "ROUGE-L",
          "copied values", "tool as direct", "tool as gold"}
HIDDEN = {"detectable", "rejected"}                 # said in a note


def figures(groups: Sequence[Group]) -> dict[str, list[dict]]:
    """All figures of the report, by table; shares in [0, 1]."""
    sampled = [g for g in groups if all(r.extra.get("sampled") for r in g.records)]
    return {"gains": compare(groups), "costs": rows_of(groups, lambda own: costs(own, groups)),
            "votes": rows_of(sampled, votes), "seconds": [latency(group) for group in groups],
            "pairs": [pairs(group) for group in groups if any(r.pairs for r in group.records)]}


def cell(name: str, value) -> str:
    """A figure as text: a share in percent, mean ± SD, or an interval; "-" for NaN."""
    sign = "+" if name in ("gain", "interval") else ""
    if isinstance(value, dict):
        deviation = "" if math.isnan(value["sd"]) else f" ± {100 * value['sd']:.1f}"
        return f"{100 * value['mean']:{sign}.1f}{deviation}"
    if isinstance(value, tuple):
        low, high = (f"{100 * end:{sign}.1f}" for end in value)
        return "-" if math.isnan(value[0]) else f"[{low}, {high}]"
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{100 * value:.1f}" if name in SHARES else f"{value:.2f}"


def notes(name: str, rows: Sequence[dict], groups: Sequence[Group]) -> list[str]:
    """What stands under a table."""
    said = [NOTES[name]] if name in NOTES else []
    if name == "gains":
        found = dict.fromkeys(f"{100 * row['detectable']:.1f} points with n = {row['n']}"
                              for row in rows)
        said.append("One run finds, with 80 % power, if 15 % of the answers change: "
                    + ", ".join(found) + ".")
        said += [f"{group.bench} {group.name}: {group.left_out} samples that not all of its seeds "
                 "have are left out." for group in groups if group.left_out]
    for row in rows if name == "pairs" else []:
        why = ", ".join(f"{reason} {count}" for reason, count in row["rejected"].items())
        said += [printable(f"{row['bench']} {row['run']}, rejected: {why}.")] if why else []
    return said


def report(runs: Sequence[Run], markdown: bool = False) -> str:
    """The tables of some runs; ValueError if none has a record."""
    groups, tables = grouped(runs), []
    if not groups:
        raise ValueError("no finished sample yet")
    for name, rows in figures(groups).items():
        if rows:
            columns = dict.fromkeys(key for row in rows for key in row if key not in HIDDEN)
            cells = [[cell(key, row.get(key, math.nan)) for key in columns] for row in rows]
            parts = [TITLES[name], grid([list(columns), *cells], markdown)]
            parts += notes(name, rows, groups)
            tables.append(("\n\n" if markdown else "\n").join(parts))
    return "\n\n".join(tables)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code: 0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="research.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--markdown", action="store_true", help="tables for RESULTS.md")
    parser.add_argument("--json", action="store_true", help="all figures; shares in [0, 1]")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.runs)
        if args.json:               # JSON has no NaN: null in its place
            found = json.dumps(figures(grouped(runs)))
            print(json.dumps(json.loads(found, parse_constant=lambda _: None), indent=1))
        else:
            print(report(runs, args.markdown))
    except (ValueError, OSError) as error:
        print(f"research.report: error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
