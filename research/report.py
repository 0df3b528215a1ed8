"""Is a gain real? Runs compared: intervals, tests, costs, votes and pairs.

    python -m research.report runs/*            # runs that differ only in their seed go together

It reads run folders and runs no model. README.md defines the figures; the answer stands in
research/RESULTS.md, "Is a gain real?".
"""
import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

if not __package__:
    print("Call it in the project's folder as: python -m research.report", file=sys.stderr)
    sys.exit(2)

import numpy as np
from scipy.stats import binomtest, norm, permutation_test

from data.calls import Call, parse_calls
from data.runs import Record, Run
from evaluate import printable
from research.scores import interval, meaning, scored_runs, show
from train import exit_codes

# --- Statistics: a gain is (S seeds, n samples) of -1, 0 or 1 -------------------------------------


def mean(values: Iterable[float]) -> float:
    """The mean; NaN of nothing."""
    values = list(values)
    return fmean(values) if values else math.nan


def p_value(gains: Sequence[np.ndarray]) -> float:
    """The two-sided p of the gains of one or several benchmarks, their samples pooled: of one seed
    by McNemar's exact test; of several, which share their samples, by flipping the signs of each
    sample's mean (all flips up to 13 that are not 0, else 9,999 at random). Means over S seeds are
    counted in integers, as multiples of 1 / S, so that equal sums of flips are equal."""
    scale = math.lcm(*map(len, gains))
    pooled = np.concatenate([gain.sum(0).astype(int) * (scale // len(gain)) for gain in gains])
    changed = pooled[pooled != 0]                   # flipping a 0 changes nothing
    if len(changed) < 2:                            # one alone may as well have had the other sign
        return 1.0
    if all(len(gain) == 1 for gain in gains):
        return binomtest((changed > 0).sum(), len(changed)).pvalue
    return permutation_test((changed,), np.sum, permutation_type="samples", vectorized=True,
                            batch=1000, rng=0).pvalue


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979), in the same order."""
    order, adjusted = np.argsort(ps), np.empty(len(ps))
    scaled = np.array(ps)[order] * np.arange(len(ps), 0, -1)
    adjusted[order] = np.maximum.accumulate(scaled).clip(max=1)
    return adjusted.tolist()


def mean_interval(gains: Sequence[np.ndarray], times: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean gain over benchmarks (or of one), by a nested bootstrap: n
    samples are drawn, and for each S of its seeds."""
    rng, means = np.random.default_rng(0), []       # one for all, lest they draw the same samples
    for gain in gains:
        seeds, n = gain.shape
        samples = rng.integers(n, size=(times, 1, n))
        means.append(gain[rng.integers(seeds, size=(times, seeds, n)), samples].mean((1, 2)))
    return interval(np.mean(means, axis=0))


def detectable(n: int, discordant: float = 0.15) -> float:
    """The smallest gain, as a share, that one run of n samples finds with 80 % power at 5 %, where
    that share of the answers changes (or, for a larger gain, as many as it takes)."""
    z = norm.ppf(0.975) + norm.ppf(0.8)
    return float(max(z * math.sqrt(discordant / n), z * z / n))


def pass_at(k: int, drawn: int, right: int) -> float:
    """The unbiased estimate of P(one of k draws is right) (Chen et al. 2021)."""
    return 1 - math.comb(drawn - right, k) / math.comb(drawn, k)


# --- Runs that belong together --------------------------------------------------------------------

SEED = {"seed", "facts", "batch", "checkpointing", "out", "device", "pack", "offline", "fresh"}
BENCH = {"bench", "data", "train_data", "samples"}  # in these, runs of one configuration may differ


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one configuration, over the n samples that all S seeds have, in one order."""
    bench: str
    name: str
    config: dict
    seeds: list[list[Record]]           # S of n

    @property
    def records(self) -> list[Record]:
        return [record for seed in self.seeds for record in seed]

    def of(self, value: Callable[[Record], float]) -> np.ndarray:
        """(S, n) what a function gives of each record."""
        return np.array([[float(value(record)) for record in seed] for seed in self.seeds])


def gained(r: Record) -> int:
    return r.answer.exact - r.base.exact


def settings(config: dict, without: set[str]) -> str:
    """What a run depends on, as text: its options, its code, and which samples and weights."""
    facts = config.get("facts", {})
    known = config | {"samples": facts.get("samples"), "weights": facts.get("weights")}
    return json.dumps({key: known[key] for key in known.keys() - without}, sort_keys=True)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs with records, those together that differ in nothing but their seed. ValueError if
    two of them have the same seed."""
    together: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run.records:
            own, seed = together.setdefault(settings(run.config, SEED), {}), run.config["seed"]
            if seed in own:
                raise ValueError(f"{own[seed].folder} and {run.folder} are runs of one "
                                 f"configuration with the same seed, {seed}: leave one out")
            own[seed] = run
    groups = []
    for own in together.values():
        run = next(iter(own.values()))
        seeds = [{record.id: record for record in run.records} for run in own.values()]
        ids = [id for id in seeds[0] if all(id in seed for seed in seeds)]
        left_out, of = len(set().union(*seeds)) - len(ids), run.config.get("samples", len(ids))
        bench, name = run.config["bench"], run.folder.name
        name = name.removeprefix(f"{bench}-").removesuffix(f"-s{run.config['seed']}")
        name += " (uses labels)" if run.config.get("uses_labels") else ""
        name += f" ({len(ids)} of {of} samples)" if len(ids) < of else ""
        name += f" ({left_out} samples, which not all seeds have, left out)" if left_out else ""
        bench += ", bundled" if run.config["data"] == "bundled" else ""
        groups.append(Group(bench, printable(name), run.config,
                            [[seed[id] for id in ids] for seed in seeds]))
    return [group for group in groups if group.records]


def rows_of(groups: Sequence[Group], row: Callable) -> list[dict]:
    """row(groups, family) of each group, and of each family: the groups that differ in their
    benchmark only, which weigh the same."""
    families: dict[str, list[Group]] = {}
    for group in groups:
        families.setdefault(settings(group.config, SEED | BENCH), []).append(group)
    rows = []
    for family in families.values():
        rows += [{"bench": group.bench, "run": group.name, **row([group], family)}
                 for group in family]
        if len(family) > 1:
            rows.append({"bench": f"mean of {len(family)}", "run": family[0].name,
                         **row(family, family)})
    return rows


def share(groups: Sequence[Group], value: Callable[[Record], float], of=lambda r: True) -> float:
    """The mean over benchmarks of a mean over records, or over some of them."""
    return mean(mean(value(r) for r in group.records if of(r)) for group in groups)


def over_seeds(groups: Sequence[Group], value: Callable[[Record], float], sign: str = "") -> str:
    """The mean over benchmarks, in percent, ± SD over seeds, if these are several and equally many
    in each."""
    means = [100 * group.of(value).mean(1) for group in groups]         # (S,) of each
    text, seeds = f"{mean(own.mean() for own in means):{sign}.1f}", {len(own) for own in means}
    if len(seeds) == 1 and seeds != {1}:
        text += f" ± {np.mean(means, axis=0).std(ddof=1):.1f}"
    return text


def between(low: float, high: float, sign: str = "") -> str:
    return f"[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


# --- Rows: of one group, or of a family as the mean over its benchmarks ---------------------------

KINDS = {"unparsable": "format", "wrong number of calls": "format", "wrong name": "name"}


def lacking(reason: str) -> str:
    """What a wrong answer lacks; its reason may say first that it was cut."""
    parts = reason.split(": ")
    return next((KINDS[part] for part in parts if part in KINDS), "argument")


def acted(r: Record) -> bool:
    """Whether the method did more for a sample than to answer it directly, or to fail in H."""
    return r.margin is not None and r.outcome not in ("certain", "direct")


def gains(groups: Sequence[Group], family: Sequence[Group]) -> dict:
    """Accuracy before and after, the gain with its interval and p, and whom the method acted on."""
    gain, n = [group.of(gained) for group in groups], sum(len(g.seeds[0]) for g in groups)
    fixed, harmed = sum((g > 0).sum() for g in gain), sum((g < 0).sum() for g in gain)
    row = {"n": n, "seeds": min(len(group.seeds) for group in groups),
           "uncertain": 100 * share(groups, lambda r: r.uncertain),
           "acted": 100 * share(groups, acted),
           "TPR": 100 * share(groups, acted, of=lambda r: not r.base.exact),
           "before": 100 * share(groups, lambda r: r.base.exact),
           "after": over_seeds(groups, lambda r: r.answer.exact),
           "gain": over_seeds(groups, gained, "+"),
           "interval": between(*mean_interval(gain), "+") if fixed + harmed else "-",
           "fixed": fixed, "harmed": harmed, "p": f"{p_value(gain):.4f}",
           "detectable": 100 * detectable(n)}
    if len(groups) == 1:
        right = sum(r.base.exact for r in groups[0].seeds[0])
        adjusted = holm([p_value([g.of(gained)]) for g in family])[family.index(groups[0])]
        row |= {"holm": f"{adjusted:.4f}",
                "Wilson's, before": between(*binomtest(right, n).proportion_ci(method="wilson"))}
    return row


def draw_seconds(group: Group, everybody: Sequence[Group]) -> float:
    """The mean cost of a sampled answer in all runs of a benchmark and model; without any, of the
    direct answer, which is more."""
    records = [r for other in everybody for r in other.records
               if (other.bench, other.config["model"]) == (group.bench, group.config["model"])]
    sampled = [r.seconds["sampled"] / len(r.extra["sampled"]) for r in records
               if r.extra.get("sampled")]
    return mean(sampled or [r.seconds["H"] for r in records])


def costs(groups: Sequence[Group], everybody: Sequence[Group]) -> dict:
    """What was fixed, by what the direct answer lacked, and what a sample costs."""
    records = [r for group in groups for r in group.records]
    kinds = Counter(lacking(r.base.reason) for r in records if gained(r) > 0)
    extra = [share([group], lambda r: sum(r.seconds.values()) - r.seconds["H"], of=acted)
             for group in groups]
    draws = [seconds / draw_seconds(group, everybody) for seconds, group in zip(extra, groups)]
    row = {f"fixed {kind}": kinds[kind] for kind in ("format", "name", "argument")}
    row |= {"seconds": share(groups, lambda r: sum(r.seconds.values())),
            "extra seconds": mean(extra), "draws": mean(draws)}
    for step in dict.fromkeys(step for r in records for step in r.seconds):
        row[f"median {step}"] = median(r.seconds[step] for r in records if step in r.seconds)
    return row


def voted(sampled: Sequence[dict]) -> bool:
    """Whether the majority is right: the first answer that means what most of them mean."""
    meanings = [meaning(verdict["text"]) for verdict in sampled]
    return sampled[meanings.index(Counter(meanings).most_common(1)[0][0])]["exact"]


def votes(groups: Sequence[Group]) -> dict:
    """The paper's Table 1, of groups whose every sample has sampled answers."""
    counts = [len(r.extra["sampled"]) for group in groups for r in group.records]
    direct = "base" if groups[0].config["method"] == "vote" else "answer"
    row = {"direct": over_seeds(groups, lambda r: getattr(r, direct).exact),
           "vote": over_seeds(groups, lambda r: voted(r.extra["sampled"]))}
    for k in sorted({1, min(5, *counts), min(counts)}):
        row[f"pass@{k}"] = over_seeds(groups, lambda r: pass_at(
            k, len(r.extra["sampled"]), sum(verdict["exact"] for verdict in r.extra["sampled"])))
    return row


def rouge_l(text: str, other: str) -> float:
    """ROUGE-L, in [0, 1]: F1 of the longest common subsequence of words (Lin 2004)."""
    a, b = text.casefold().split(), other.casefold().split()
    row = [0] * (len(b) + 1)            # row[j]: the longest of what was read of a, and b[:j]
    for word in a:
        before, row = row, [0]
        for j, against in enumerate(b):
            row.append(before[j] + 1 if word == against else max(before[j + 1], row[j]))
    return 2 * row[-1] / (len(a) + len(b)) if a or b else 1.0


def argument_values(calls: Iterable[Call]) -> list[str]:
    """The scalar values of calls' arguments as text, those in lists and objects too."""
    found, inside = [], [call.arguments for call in calls]
    while inside:
        value = inside.pop()
        if isinstance(value, (dict, list)):
            inside += value.values() if isinstance(value, dict) else value
        else:
            found.append(str(value))
    return found


def within(text: str, other: str) -> bool:
    return text.casefold() in other.casefold()


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
    words = [request.casefold().split() for request in requests]
    twos = [two for own in words for two in zip(own, own[1:])]
    copied = [within(value, r.request) for r, _, calls in found for value in argument_values(calls)]
    same = [sorted(c.name for c in calls) == sorted(c.name for c in parse_calls(r.gold).calls)
            for r, _, calls in found]
    return {"bench": group.bench, "run": group.name, "pairs": len(found),
            "valid": len(found) / (len(found) + rejected.total()),
            "unique": len(set(requests)) / len(requests),
            "distinct-2": len(set(twos)) / max(len(twos), 1),
            "ROUGE-L": mean(rouge_l(request, r.request) for r, request, _ in found),
            "copied values": mean(copied), "gold's tool": mean(same),
            "read back": sum(p["read_back"] for r in records for p in r.pairs),
            "leaks": sum(leaks(r, request, calls) for r, request, calls in found),
            "first loss": mean(own[0] for own in losses),
            "last loss": mean(own[-1] for own in losses),
            "largest norm": max((n for r in records for n in r.norms), default=math.nan),
            "non-finite": sum(r.outcome == "non-finite" for r in records),
            "KL": mean(r.extra["kl"] for r in records if "kl" in r.extra),
            "rejected": printable(", ".join(f"{why} {n}" for why, n in rejected.most_common()))}


# --- The program ----------------------------------------------------------------------------------

def tables(groups: Sequence[Group]) -> dict[str, list[dict]]:
    """The rows of each table; research/README.md says how each figure is defined."""
    sampled = [g for g in groups if all(r.extra.get("sampled") for r in g.records)]
    return {"Gains, in points of accuracy": rows_of(groups, gains),
            "What was fixed, and what a sample cost":
                rows_of(groups, lambda own, family: costs(own, groups)),
            "Direct answers, majority vote, pass@k (the paper's Table 1)":
                rows_of(sampled, lambda own, family: votes(own)),
            "The pairs, and learning them":
                [pairs(group) for group in groups if any(r.pairs for r in group.records)]}


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    show(tables(grouped(scored_runs(parser.parse_args(argv).runs))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
