"""Is a gain real? Runs compared: intervals, tests, costs, votes and pairs.

    python -m research.report runs/*            # runs that differ only in their seed go together
    python -m research.report runs/* --draw lists       # not dialogues, but what shares its tools

It reads run folders, and the data files where they are at hand, and runs no model. README.md
defines the figures; the answer stands in research/RESULTS.md, "Is a gain real?".
"""
import argparse
import contextlib
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean, median

if not __package__:
    print("Call it in the project's folder as: python -m research.report", file=sys.stderr)
    sys.exit(2)

import numpy as np
from scipy.stats import binomtest, norm, permutation_test

import data
from data import Sample
from data.calls import Call, call_keys, items_of, parse_calls, type_of
from data.runs import Record, Run, Verdict, digest
from evaluate import printable
from research.benchmarks import unknown
from research.scores import dialogues, interval, meaning, scored_runs, show
from train import exit_codes

# --- Statistics: a gain is (S seeds, n samples) of -1, 0 or 1 -------------------------------------


def mean(values: Iterable[float]) -> float:
    """The mean; NaN of nothing."""
    values = list(values)
    return fmean(values) if values else math.nan


def p_value(gains: Sequence[np.ndarray], clusters: Sequence[np.ndarray] = ()) -> float:
    """The two-sided p of the gains of one or several benchmarks, their samples pooled, by flipping
    signs of what goes together: each sample's mean over seeds, or its cluster's sum of these (n,
    numbers of clusters for each benchmark). All flips up to 13 that are not 0, else 9,999 at
    random; of one seed, where no two samples of a cluster changed, McNemar's exact test. Means over
    seeds are counted in integers, as multiples of 1 / S, so that equal sums of flips are equal."""
    scale, sums = math.lcm(*map(len, gains)), []
    for gain, own in zip(gains, clusters or map(singly, gains)):
        units = gain.sum(0).astype(int) * (scale // len(gain))
        sums.append(np.bincount(own, units).astype(int))
    pooled = np.concatenate(sums)
    changed = pooled[pooled != 0]                   # flipping a 0 changes nothing
    if len(changed) < 2:                            # one alone may as well have had the other sign
        return 1.0
    if all(len(gain) == 1 for gain in gains) and abs(changed).max() == 1:
        return binomtest((changed > 0).sum(), len(changed)).pvalue
    return permutation_test((changed,), np.sum, permutation_type="samples", vectorized=True,
                            batch=1000, rng=0).pvalue


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979), in the same order."""
    order, adjusted = np.argsort(ps), np.empty(len(ps))
    scaled = np.array(ps)[order] * np.arange(len(ps), 0, -1)
    adjusted[order] = np.maximum.accumulate(scaled).clip(max=1)
    return adjusted.tolist()


def singly(gain: np.ndarray) -> np.ndarray:
    """Each of n samples is a cluster of its own."""
    return np.arange(gain.shape[1])


def mean_interval(gains: Sequence[np.ndarray], clusters: Sequence[np.ndarray] = (),
                  times: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean gain over benchmarks (or of one), by a nested bootstrap: as
    many clusters of samples are drawn as there are, and for each of their samples S of its seeds.
    clusters: as of `p_value`."""
    rng, means = np.random.default_rng(0), []       # one for all, lest they draw the same samples
    for gain, own in zip(gains, clusters or map(singly, gains)):
        members = [np.flatnonzero(own == cluster) for cluster in range(own.max() + 1)]
        means.append([])
        for drawn in rng.integers(len(members), size=(times, len(members))):
            samples = np.concatenate([members[cluster] for cluster in drawn])
            seeds = rng.integers(len(gain), size=(len(gain), len(samples)))
            means[-1].append(gain[seeds, samples].mean())
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


DRAWS = {"dialogues": "where one's request begins another's they are one dialogue's, and drawn "
                      "together", "lists": "those that share their tools are drawn together",
         "samples": "each sample is drawn on its own"}


def clusters_of(group: Group, draw: str) -> np.ndarray:
    """(n,) for each sample the number of what it is drawn with, as of DRAWS."""
    records = group.seeds[0]
    if draw == "dialogues":
        return dialogues(records)
    if draw == "lists":                             # whose H failed has none
        lists = [str(sorted(r.candidates) or r.id) for r in records]
        return np.unique(lists, return_inverse=True)[1]
    return np.arange(len(records))


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


def gains(groups: Sequence[Group], family: Sequence[Group], draw: str = "dialogues") -> dict:
    """Accuracy before and after, the gain with its interval and p, and whom the method acted on."""
    gain, n = [group.of(gained) for group in groups], sum(len(g.seeds[0]) for g in groups)
    own = [clusters_of(group, draw) for group in groups]
    fixed, harmed = sum((g > 0).sum() for g in gain), sum((g < 0).sum() for g in gain)
    row = {"n": n, "seeds": min(len(group.seeds) for group in groups),
           "uncertain": 100 * share(groups, lambda r: r.uncertain),
           "acted": 100 * share(groups, acted),
           "TPR": 100 * share(groups, acted, of=lambda r: not r.base.exact),
           "changed": 100 * share(groups, lambda r: r.answer.text != r.base.text),
           "before": 100 * share(groups, lambda r: r.base.exact),
           "after": over_seeds(groups, lambda r: r.answer.exact),
           "gain": over_seeds(groups, gained, "+"),
           "interval": between(*mean_interval(gain, own), "+") if fixed + harmed else "-",
           "fixed": fixed, "harmed": harmed, "p": f"{p_value(gain, own):.4f}",
           "drawn": f"{sum(c.max() + 1 for c in own)} {draw}",
           "detectable": 100 * detectable(n)}
    if len(groups) == 1:
        right = sum(r.base.exact for r in groups[0].seeds[0])
        ps = [p_value([g.of(gained)], [clusters_of(g, draw)]) for g in family]
        adjusted = holm(ps)[family.index(groups[0])]
        row |= {"holm": f"{adjusted:.4f}",
                "Wilson's, before": between(*binomtest(right, n).proportion_ci(method="wilson"))}
    return row


@cache
def at_hand(bench: str, source: str, limit: int, known_as: str) -> tuple[Sample, ...]:
    """A run's samples, in the order of their file, if that can be read and they are the same."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            samples = data.load(bench, source, offline=True)[:limit or None]
    except (ValueError, OSError):
        return ()
    return tuple(samples) if digest(samples) == known_as else ()


def lenient(verdict: Verdict, x: Sample) -> bool:
    """Whether an answer is exact where under a declared string neither case nor a full stop at its
    end counts."""
    parameters, both = {tool["name"]: tool["parameters"] for tool in x.tools}, []
    for calls in (parse_calls(verdict.text).calls, x.answers):
        forgiven = []
        for call in calls:
            schemas, values = parameters.get(call.name, {}), {}
            for name, value in call.arguments.items():
                kind, schema, _ = type_of(schemas.get(name, {}))
                if kind == "array" and type_of(items_of(schema))[0] == "string":
                    value = [plain(each) for each in value] if isinstance(value, list) else value
                values[name] = plain(value) if kind == "string" else value
            forgiven.append(Call(call.name, values))
        both.append(call_keys(forgiven, x.tools))
    return verdict.exact or bool(both[0]) and both[0] == both[1]


def plain(value: object) -> object:
    return value.strip().removesuffix(".").casefold() if isinstance(value, str) else value


def readings(group: Group, draw: str) -> list[dict]:
    """A group's gain as `exact` has it, over the samples that can be known, and forgiving; nothing
    where its samples are not at hand."""
    config = group.config
    samples = at_hand(config["bench"], config["data"], config.get("limit", 0),
                      config.get("facts", {}).get("samples", ""))
    if not samples:
        return []
    by_id, never = {x.id: x for x in samples}, unknown(samples)[0]

    def loose(r: Record) -> Record:
        both = {when: replace(own, exact=lenient(own, by_id[r.id]))
                for when, own in (("base", r.base), ("answer", r.answer))}
        return replace(r, **both)
    read = {"exact": group.seeds,
            "known": [[r for r in seed if r.id not in never] for seed in group.seeds],
            "lenient": [[loose(r) for r in seed] for seed in group.seeds]}
    rows = []
    for name, seeds in read.items():
        if seeds[0]:
            own = replace(group, seeds=seeds)
            row = gains([own], [own], draw)
            columns = ("n", "before", "after", "gain", "interval", "fixed", "harmed", "p", "drawn")
            rows.append({"bench": group.bench, "run": group.name, "reading": name,
                         **{column: row[column] for column in columns}})
    return rows


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

def tables(groups: Sequence[Group], draw: str = "dialogues") -> dict[str, list[dict]]:
    """The rows of each table; research/README.md says how each figure is defined."""
    sampled = [g for g in groups if all(r.extra.get("sampled") for r in g.records)]
    drawn = f" (intervals and p: {DRAWS[draw]})"
    return {"Gains, in points of accuracy" + drawn: rows_of(groups, partial(gains, draw=draw)),
            "Readings beside exact, where the samples are at hand" + drawn:
                [row for group in groups for row in readings(group, draw)],
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
    parser.add_argument("--draw", default="dialogues", choices=[*DRAWS],
                        help="what bootstrap and sign flips draw (default: dialogues)")
    args = parser.parse_args(argv)
    show(tables(grouped(scored_runs(args.runs)), args.draw))
    return 0


if __name__ == "__main__":
    sys.exit(main())
