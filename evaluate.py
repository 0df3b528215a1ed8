"""Scoring an answer against a sample's gold calls, and what runs come to.

    python evaluate.py runs/*                                            # tables of several runs: compared, with intervals
    python evaluate.py runs/* --markdown                                      # the same for a README (--json: for a machine)
    python evaluate.py runs/nexusraven-tiny-ttsi-s0 --sample nexusraven-7     # one sample's story
    python evaluate.py runs/nexusraven-tiny-ttsi-s0 --verify                  # is the run whole, and scored right?
    python evaluate.py runs/nexusraven-tiny-ttsi-s0 --uncertainty --plot plots     # which score knows what is wrong?
"""
import argparse
import hashlib
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median, stdev

warnings.filterwarnings("ignore", "Failed to initialize NumPy")      # torch's, on import where it is not installed: it is not needed

import torch

from augment import argument_values, distinct_2, rouge_l
from data import Sample, call_text, load
from data.calls import Call, call_key, parse_calls
from uncertainty import RANKING, SCORES, bootstrap, calibration, cross_fitted, cumulative, gain_budget, gate_rates, interval, ranking, \
    relative_softmax, reliability, risk_coverage, threshold_between


@dataclass(frozen=True)
class Verdict:
    """What an answer is worth. `exact` is the score; the rest says why, and how far off the answer is."""
    exact: bool             # the predicted multiset of calls equals the gold one, values read by the tool's schema
    reason: str             # "" if exact, else what is wrong first; the part before ":" is one of a few, to be counted
    strict: bool            # exact in the very JSON types of the gold calls, in the form asked for and nothing else
    parsed: bool            # at least one call could be read
    recovery: str           # what was forgiven to read it, as in `data.calls.Parsed`
    name_correct: bool      # the multisets of names are equal
    name_f1: float          # over names, one to one, in [0, 1]
    argument_f1: float      # over (name, argument, value), one to one, in [0, 1]


def f1(predicted: Iterable[Hashable], gold: Iterable[Hashable]) -> float:
    """F1 = 2 |P ∩ G| / (|P| + |G|) of two multisets, in [0, 1]; 1.0 if both are empty.

    One to one, so saying a right thing three times does not pay: `f1("aaa", "a") -> 0.5`.
    """
    predicted, gold = Counter(predicted), Counter(gold)
    total = predicted.total() + gold.total()
    return 2 * (predicted & gold).total() / total if total else 1.0


def _reason(predicted: list[tuple[str, frozenset]], gold: list[tuple[str, frozenset]]) -> str:
    """The first thing by which two answers, as call keys, differ; "" if they do not."""
    if not predicted and gold:
        return "unparsable"
    if len(predicted) != len(gold):
        return f"wrong number of calls: {len(predicted)} for {len(gold)}"
    names, gold_names = Counter(name for name, _ in predicted), Counter(name for name, _ in gold)
    if names != gold_names:
        return f"wrong name: {next(iter(names - gold_names)):.40} for {next(iter(gold_names - names))}"
    wrong, missed = Counter(predicted) - Counter(gold), Counter(gold) - Counter(predicted)
    if not missed:
        return ""
    name, wanted = next(iter(missed))
    given = max((pairs for n, pairs in wrong if n == name), key=lambda pairs: len(pairs & wanted))      # the nearest
    given_names, wanted_names = {argument for argument, _ in given}, {argument for argument, _ in wanted}
    if wanted_names - given_names:
        return f"missing argument: {min(wanted_names - given_names)}"
    if given_names - wanted_names:
        return f"extra argument: {min(given_names - wanted_names):.40}"
    return f"wrong value: {min(argument for argument, _ in wanted - given)}"


def _verbatim(call: Call) -> tuple[str, str]:
    """A call with the JSON types it was written in: 5, 5.0, "5" and true all differ."""
    return call.name, json.dumps(call.arguments, sort_keys=True)


def exact_match(text: str, sample: Sample) -> Verdict:
    """The verdict on a model's text: `exact_match("no idea", sample).reason -> "unparsable"`. It never raises."""
    parsed = parse_calls(text)
    predicted = [call_key(call, sample.tools) for call in parsed.calls]
    gold = [call_key(call, sample.tools) for call in sample.answers]
    reason = _reason(predicted, gold)
    names, gold_names = [name for name, _ in predicted], [name for name, _ in gold]
    return Verdict(
        exact=not reason, reason=reason, parsed=bool(parsed.calls), recovery=parsed.recovery,
        strict=(not reason and parsed.strict
                and Counter(map(_verbatim, parsed.calls)) == Counter(map(_verbatim, sample.answers))),
        name_correct=Counter(names) == Counter(gold_names), name_f1=f1(names, gold_names),
        argument_f1=f1(((name, *pair) for name, pairs in predicted for pair in pairs),
                       ((name, *pair) for name, pairs in gold for pair in pairs)))


def reachable(sample: Sample) -> bool:
    """Whether every gold call is of an offered tool: what is not offered, no method can be expected to call."""
    return {call.name for call in sample.answers} <= {tool["name"] for tool in sample.tools}


# ---------------------------------------------------------------------------------------------------- a run's numbers

# The paper's figures, in percent: Qwen2.5-1.5B-Instruct, the whole benchmark, means of 5 seeds.
PAPER_GAIN = {"toolalpaca": 5.84, "nexusraven": 6.05, "sealtool": 5.76, "apibank": 4.26}
PAPER_SEALTOOL = "66.37 -> 72.43"
PAPER = {       # (benchmark, method, gate, pairs, tau), or so much of it as matters: accuracy
    ("sealtool", "base"): 66.37, ("sealtool", "ttsi", "score", "self", 0.95): 72.43, ("sealtool", "ttsi", "all", "self"): 73.47,
    ("sealtool", "ttsi", "certain", "self", 0.95): 70.07, ("sealtool", "ttsi", "score", "self", 0.35): 68.10,
    ("sealtool", "sft"): 70.20, ("sealtool", "ttsi", "all", "gold"): 78.89}
PAPER_SETTING = {"limit": 0, "k": 1, "adapt": "full", "rank": 8, "alpha": 16.0, "epochs": 5, "lr": 1e-4, "reset": "sample", "filter": "schema",
                 "gate_score": "margin", "budget": 0.0, "train_limit": 0}
PAPER_MEANS = {"ttsi": "+5.48 / +3.85 / +3.46", "ttd": "+6.42 / +5.53 / +6.11"}     # gain in direct answers / vote / pass@5


def as_in_paper(config: dict) -> bool:
    """Whether a run is of the paper's model, benchmark and settings, so that its figures may stand beside the paper's. How pairs are
    written, which the paper leaves open, is no part of that."""
    source = config.get("data", "")
    return Path(config.get("model", "")).name == "Qwen2.5-1.5B-Instruct" and source != "bundled" and not Path(source).is_file() \
        and all(config.get(name, value) == value for name, value in PAPER_SETTING.items())


def read_json(path: Path, shape: dict | None = None) -> dict:
    """A JSON object of a run folder, with at least what `shape` has; FileNotFoundError or ValueError in one sentence otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist: is {path.parent} a run folder of train.py?") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not fits(value, shape or {}):
        raise ValueError(f"{path}: is not as train.py wrote it: restore it, or choose another folder")
    return value


CONFIG = {"bench": str, "data": str, "limit": int, "offline": bool}         # what is read of a run's files, whatever else they hold
FACTS = {name: str for name in ("config", "data", "weights", "code", "torch", "python")}
ANSWER = {"text": str, **{f.name: f.type for f in fields(Verdict)}}
RECORD = {"id": str, "request": str, "margin": float, "uncertain": bool, "gate": str, "tau": float, "scores": {...: float},
          "candidates": {...: float}, "outcome": str, "base": ANSWER, "answer": ANSWER,
          "pairs": [{"request": str, "calls": [dict], "votes": int}], "rejected": [{"text": str, "reason": str}], "losses": [float],
          "sampled": [ANSWER], "gold": str, "reachable": bool, "seconds": {...: float}}


def fits(value, shape) -> bool:
    """Whether a JSON value has the shape of an example made of types; {...: T} is any keys with values of T."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        wanted = dict.fromkeys(value, shape[...]) if ... in shape and isinstance(value, dict) else shape
        return isinstance(value, dict) and all(key in value and fits(value[key], part) for key, part in wanted.items())
    return isinstance(value, (int, float) if shape is float else shape)


def record_files(folder: Path) -> list[Path]:
    """The files with the records of a run: records.jsonl, and those of further ranks that are not merged into it yet."""
    return [path for path in (folder / "records.jsonl", *sorted(folder.glob("records-*.jsonl"))) if path.is_file()]


def read_records(folder: Path) -> list[dict]:
    """The records of a run, one for each sample id; a torn last line (a run that was killed) is left out."""
    paths, records = record_files(folder), {}
    if not paths:
        raise FileNotFoundError(f"{folder / 'records.jsonl'} does not exist: is {folder} a run folder of train.py?")
    for path in paths:
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not fits(record, RECORD):
                raise ValueError(f"{path}, line {number}: no record of a run; delete the line, and its sample is computed again")
            records.setdefault(record["id"], record)
    return list(records.values())


def samples_of(config: dict) -> list[Sample]:
    """All samples of the benchmark that a run's configuration names."""
    bundled = config["data"] == "bundled"
    return load(config["bench"], None if bundled else config["data"] or None, offline=config["offline"], bundled=bundled)


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of the samples with their gold calls: what a run was scored against."""
    return hashlib.sha256(json.dumps([asdict(sample) for sample in samples], sort_keys=True).encode()).hexdigest()


def digest_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parts(record: dict) -> list[tuple[str, dict]]:
    """The answers of a record that have a verdict, each with what it is."""
    voted = [("the vote", record["vote"])] if record.get("vote") else []
    return [("base", record["base"]), ("answer", record["answer"]), *voted, *(("a sampled answer", s) for s in record["sampled"])]


def verify(folder: Path) -> list[str]:
    """What is wrong with a run, in words; nothing if its records are whole, of this data, and scored as they would be now."""
    config, facts, wrong = read_json(folder / "config.json", CONFIG), read_json(folder / "facts.json", FACTS), []
    samples = samples_of(config)
    records, known = {record["id"]: record for record in read_records(folder)}, {sample.id: sample for sample in samples}
    if facts["config"] != digest_file(folder / "config.json"):
        wrong.append("config.json was changed after the run")
    if facts["data"] != digest(samples):
        wrong.append("the samples are others than those of the run")
    if facts.get("weights_after") != facts["weights"]:
        wrong.append("the base weights have changed" if "weights_after" in facts else "the run has not ended: nothing says that "
                     "its base weights are those it began with")
    if missing := [sample.id for sample in samples[:config["limit"] or None] if sample.id not in records]:
        wrong.append(f"{len(missing)} samples have no record, the first is {missing[0]}")
    if strange := sorted(records.keys() - known.keys()):
        wrong.append(f"{len(strange)} records are of no sample, the first is {strange[0]}")
    for id in sorted(records.keys() & known.keys()):
        record, sample = records[id], known[id]
        for when, part in parts(record):
            now = asdict(exact_match(part["text"], sample))
            if other := [name for name, value in now.items() if part.get(name) != value]:
                wrong.append(f"{id}: of {when}, {', '.join(other)} would be scored otherwise now")
        if (record["gold"], record["reachable"]) != (call_text(sample.answers), reachable(sample)):
            wrong.append(f"{id}: the gold calls are others")
        if record["gate"] == "margin" and record["uncertain"] != (record["margin"] < record["tau"]):
            wrong.append(f"{id}: uncertain is not what margin and tau say")
    return wrong


DROPPED = {     # outcomes of an adaptation that failed, after which the direct answer stands
    "non-finite": "were not finite and were dropped", "out of memory": "did not fit into the memory; the direct answers stand",
    "too long": "exceeded the model's context; the direct answers stand"}


def mean(values: Iterable[float]) -> float:
    """The mean; NaN of nothing."""
    values = list(values)
    return fmean(values) if values else math.nan


def summarise(records: Sequence[dict]) -> dict:
    """What a run comes to: counts, accuracies as shares in [0, 1], and the seconds of each stage, summed."""
    n = len(records)
    right, drawn = [(r["base"]["exact"], r["answer"]["exact"]) for r in records], [r["sampled"] for r in records if r["sampled"]]
    seconds = Counter()
    for record in records:
        seconds.update(record["seconds"])
    return {
        "n": n, "uncertain": sum(r["uncertain"] for r in records),
        **{outcome.replace(" ", "_").replace("-", "_"): sum(r["outcome"] == outcome for r in records)
           for outcome in ("adapted", "no pair", *DROPPED)},
        "base_accuracy": mean(b for b, _ in right), "accuracy": mean(a for _, a in right),
        "fixed": sum(a and not b for b, a in right), "harmed": sum(b and not a for b, a in right),
        **{f"{when}_{measure}": mean(float(r[when][measure]) for r in records)
           for when in ("base", "answer") for measure in ("strict", "parsed", "name_correct", "name_f1", "argument_f1")},
        "pass_at_k": mean(any(s["exact"] for s in sampled) for sampled in drawn),       # any of a sample's sampled answers right
        "k": max(map(len, drawn), default=0), "sampled": len(drawn),
        "reachable": mean(r["reachable"] for r in records),
        "reasons": dict(Counter(r["answer"]["reason"].partition(":")[0] for r in records if r["answer"]["reason"]).most_common()),
        "rejected": dict(Counter(j["reason"].partition(":")[0] for r in records for j in r["rejected"]).most_common()),
        "seconds": {stage: round(total, 3) for stage, total in seconds.items()},
    }


COLUMNS = (("run", None), ("n", "n"), ("uncertain", "uncertain"), ("adapted", "adapted"), ("no pair", "no_pair"),
           ("base", "base_accuracy"), ("after", "accuracy"), ("gain", "gain"), ("fixed", "fixed"), ("harmed", "harmed"),
           ("strict", "answer_strict"), ("names", "answer_name_correct"), ("arg F1", "answer_argument_f1"),
           ("parsed", "answer_parsed"), ("s/sample", "pace"))


Run = tuple[Path, dict, list[dict]]      # a run's folder, configuration and records


def read_runs(folders: Sequence[Path], rescored: bool = False) -> list[Run]:
    return [(folder, read_json(folder / "config.json"), rescore(folder) if rescored else read_records(folder)) for folder in folders]


def uses_labels(config: dict) -> bool:
    """Whether a run's answers owe something to the gold calls of the test samples."""
    method = config.get("method")
    return config.get("gate") == "oracle" and method not in ("base", "icl", "sft", "retry") or \
        config.get("pairs") == "gold" and method in ("ttsi", "tticl")


def table(runs: Sequence[Run], markdown: bool = False) -> str:
    """One line a run, under it what may be compared with it; accuracies in percent, by the `exact` rule."""
    rows, notes = [[name for name, _ in COLUMNS]], {}      # notes: text -> the runs that it is about
    def note(text): notes.setdefault(text, []).append(printable(folder.name))
    for folder, config, records in runs:
        summary = summarise(records)
        if summary["n"] == 0:
            note("no finished sample yet")
            continue
        summary["gain"] = summary["accuracy"] - summary["base_accuracy"]
        summary["pace"] = f"{sum(summary['seconds'].values()) / summary['n']:.2f}"
        cells = [printable(folder.name)]
        for name, key in COLUMNS[1:]:
            value = summary[key]
            cells.append(f"{100 * value:{'+' if key == 'gain' else ''}.1f}" if isinstance(value, float) else str(value))
        rows.append(cells)
        if config.get("data") == "bundled":
            note("bundled samples, this project's own; not comparable with any benchmark's figures")
        elif config.get("bench") in PAPER_GAIN and not Path(config.get("data", "")).is_file():
            note(f"the paper, with Qwen2.5-1.5B-Instruct and 5 seeds: gain +{PAPER_GAIN[config['bench']]:.2f}"
                         + (f" ({PAPER_SEALTOOL})" if config["bench"] == "sealtool" else ""))
        if summary["k"]:
            voted = mean(r["vote"]["exact"] for r in records if r.get("vote"))
            note(f"of the {summary['sampled']} samples with sampled answers, pass@{summary['k']} {percent(summary['pass_at_k'])}, the majority "
                 f"{percent(voted)}")
        if config.get("tau") == "auto" or config.get("budget"):
            note(chosen_tau(records))
        for outcome, what in DROPPED.items():
            if count := sum(record["outcome"] == outcome for record in records):
                note(f"{count} adaptations {what}")
        if summary["reachable"] < 1:
            note(f"at most {summary['reachable']:.1%} can be reached: elsewhere a gold call's tool is not offered")
        if uses_labels(config):
            note("uses labels")
    return ("\n\n" if markdown else "\n").join([grid(rows, markdown), *(
        f"{', '.join(names) if len(names) < len(runs) or len(names) == 1 else 'all runs'}: {text}" for text, names in notes.items())])


# ------------------------------------------------------------------------------------------------ is a gain real?

def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share right / n (Wilson 1927), in [0, 1]."""
    p, d = right / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(fixed: int, harmed: int) -> float:
    """The exact two-sided p of fixed against harmed, were both as likely (McNemar 1947; binomial, not chi-squared)."""
    n = fixed + harmed
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(fixed, harmed) + 1)) / 2 ** n)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979), in the same order."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def nested_bootstrap(gain: torch.Tensor, times: int = 2000) -> torch.Tensor:
    """(times,) mean gains of resamples of a paired difference (S seeds, n samples): samples drawn, and for each S of its seeds."""
    (seeds, n), draw = gain.shape, torch.Generator().manual_seed(0)
    samples = torch.randint(n, (times, 1, n), generator=draw)
    return gain.double()[torch.randint(seeds, (times, seeds, n), generator=draw), samples].mean((1, 2))


def detectable(n: int, discordant: float = 0.15) -> float:
    """The smallest gain, as a share, that one run over n samples finds with 80 % power at 5 %, where that share of the answers changes
    (or, if the gain is larger, as many as it takes)."""
    z = 1.959964 + 0.841621
    return max(z * math.sqrt(discordant / n), z * z / n)


def pass_at(k: int, drawn: int, right: int) -> float:
    """The unbiased estimate of P(any of k draws is right) from `drawn` draws of which `right` are (Chen et al. 2021)."""
    return 1 - math.comb(drawn - right, k) / math.comb(drawn, k)


# ------------------------------------------------------------------------------------------------- runs compared

FREE = ("limit", "batch", "checkpointing", "pack", "out", "device", "offline", "verbose", "overwrite")     # options that change no result


OF_BENCH = ("bench", "data", "train_data")          # options that another benchmark brings with it


def grouped(runs: Sequence[Run]) -> list[dict]:
    """The runs that differ in nothing but their seed, together: benchmark, name (the options that differ among the runs at hand),
    configuration, `same` (equal for what differs in nothing but the benchmark), the runs' records, which are about the same samples,
    and how many samples are left out for that."""
    # an option that is off, and one that this run's version did not have, are alike
    runs = [({name: value for name, value in config.items() if value != "" and value is not False}, records) for _, config, records in runs if records]
    tasks = {json.dumps([config.get("bench"), config.get("model")]) for config, _ in runs}
    def differ(name):           # within a benchmark and a model, or among them; the learning rate has another default for each model
        values = {task: {json.dumps(c.get(name)) for c, _ in runs if json.dumps([c.get("bench"), c.get("model")]) == task} for task in tasks}
        return max(map(len, values.values())) > 1 or name not in ("lr", *OF_BENCH) and len(set().union(*values.values())) > 1
    def short(name, value):     # a path by its last part, if that is enough to tell it from others
        others = {str(config[name]) for config, _ in runs if name in config}
        return Path(str(value)).name if len({Path(other).name for other in others}) == len(others) else str(value)
    varied = [name for name in dict.fromkeys(name for config, _ in runs for name in config)
              if name not in (*FREE, "seed", "bench", "method") and differ(name)]
    groups: dict[str, dict] = {}
    for config, records in runs:
        said = [str(config.get("method", "run")), *(f"{name} {short(name, config[name])}" for name in varied if name in config)]
        said += ["(uses labels)"] * uses_labels(config)
        fixed = {name: value for name, value in config.items() if name not in (*FREE, "seed")}
        key, same = (json.dumps({name: value for name, value in fixed.items() if name not in but}, sort_keys=True) for but in ((), OF_BENCH))
        bench = config.get("bench", "") + (", bundled" if config.get("data") == "bundled" else "")
        group = groups.setdefault(key, {"bench": bench, "name": " ".join(said), "config": config, "same": same, "runs": {}})
        of_seed = group["runs"].setdefault(config.get("seed"), {})
        of_seed |= {record["id"]: record for record in records if record["id"] not in of_seed}          # the same seed twice is one
    for group in groups.values():                       # a run that was stopped lacks samples: compare those that all have
        runs = list(group["runs"].values())
        group["runs"] = [[run[id] for id in runs[0] if all(id in other for other in runs)] for run in runs]
        group["left out"] = len(set().union(*runs)) - len(group["runs"][0])
    return [group for group in groups.values() if group["runs"][0]]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else math.nan}


def compare(groups: Sequence[dict]) -> list[dict]:
    """For each group: accuracy before and after, the gain with its interval and tests, what was fixed, and what it cost. Where a
    configuration was run on several benchmarks, also their mean."""
    rows = [gains(group, seconds_a_draw(group, groups)) for group in groups]
    for family in families(rows):
        for row, p in zip(family, holm([row["p"] for row in family])):
            row["holm"] = p
        if len({row["bench"] for row in family}) > 1:
            rows.append(mean_of(family))
    return [{key: value for key, value in row.items() if key not in ("same", "drawn", "by seed")} for row in rows]


def families(rows: Sequence[dict]) -> list[list[dict]]:
    """The rows of each configuration, which differ in their benchmark."""
    return [[row for row in rows if row["same"] == same] for same in dict.fromkeys(row["same"] for row in rows)]


def seconds_a_draw(group: dict, groups: Sequence[dict]) -> float:
    """What one sampled answer costs, in seconds: the mean over all runs of the group's benchmark and model; without any, of the
    greedy answers."""
    def task(other): return other["config"].get("bench"), other["config"].get("model")
    records = [r for other in groups if task(other) == task(group) for run in other["runs"] for r in run]
    return mean(r["seconds"]["sampled"] / len(r["sampled"]) for r in records if r["sampled"] and "sampled" in r["seconds"]) \
        if any(r["sampled"] for r in records) else mean(r["seconds"].get("base", 0.0) for r in records)


def gains(group: dict, draw: float) -> dict:
    """The row of one group. draw: the seconds of a sampled answer. "drawn": the bootstrap's gains; "by seed": what was fixed and harmed."""
    runs, config = group["runs"], group["config"]
    method, gate, pairs, tau = (config.get(key) for key in ("method", "gate", "pairs", "tau"))
    everything, n = [r for run in runs for r in run], len(runs[0])
    gain = torch.tensor([[r["answer"]["exact"] - r["base"]["exact"] for r in run] for run in runs])
    by_seed = [((g > 0).sum().item(), (g < 0).sum().item()) for g in gain]
    fixed, harmed = map(sum, zip(*by_seed))
    kinds = Counter(kind_of(r["base"]["reason"]) for r in everything if r["answer"]["exact"] and not r["base"]["exact"])
    drawn = nested_bootstrap(gain)
    keys = [(config.get("bench"), method, *rest) for rest in ((gate, pairs, tau), (gate, pairs), ())] if as_in_paper(config) else []
    def acts(r): return method != "base" and r.get("acted", r["uncertain"])
    stages = ("pairs", "train", "answer", *(["sampled"] if method in ("vote", "retry") else []))
    extra = mean(sum(r["seconds"].get(stage, 0.0) for stage in stages) for r in everything if acts(r))
    return {
        "bench": group["bench"], "name": group["name"], "same": group["same"], "n": n, "seeds": len(runs), "left out": group["left out"],
        "base": mean(r["base"]["exact"] for r in everything), "base interval": wilson(sum(r["base"]["exact"] for r in runs[0]), n),
        "after": spread([mean(r["answer"]["exact"] for r in run) for run in runs]), "gain": spread(gain.double().mean(1).tolist()),
        "drawn": drawn, "interval": interval(drawn) if gain.any() else (math.nan, math.nan), "by seed": by_seed,
        "fixed": fixed, "harmed": harmed, "net": fixed - harmed, "p": median(mcnemar(*each) for each in by_seed), "detectable": detectable(n),
        "uncertain": mean(r["uncertain"] for r in everything), "acted": mean(acts(r) for r in everything),
        "TPR": mean(acts(r) for r in everything if not r["base"]["exact"]),
        **{f"fixed {kind}": kinds[kind] for kind in ("format", "name", "argument")}, "seconds": mean(sum(r["seconds"].values()) for r in everything),
        "tokens": mean(sum(r.get("tokens", {}).values()) for r in everything), "extra seconds": extra, "draws": extra / draw if draw else math.nan,
        "paper": next((PAPER[key] for key in keys if key in PAPER), math.nan)}


def mean_of(rows: Sequence[dict]) -> dict:
    """The mean of a configuration's rows over its benchmarks, each weighing the same; p is of all their samples pooled."""
    row = {key: mean(r[key] for r in rows) for key, value in rows[0].items() if isinstance(value, float)}
    row |= {key: sum(r[key] for r in rows) for key, value in rows[0].items() if isinstance(value, int)}
    seeds = list(zip(*(r["by seed"] for r in rows)))                      # of each seed: what each benchmark fixed and harmed
    drawn = torch.stack([r["drawn"] for r in rows]).mean(0)               # benchmarks are drawn apart, so in any order
    def over(key): return {"mean": mean(r[key]["mean"] for r in rows), "sd": math.nan}
    return row | {"bench": f"mean of {len(rows)}", "name": rows[0]["name"], "seeds": len(seeds), "base interval": (math.nan, math.nan), "after": over("after"),
                  "gain": over("gain"), "drawn": drawn, "interval": interval(drawn) if drawn.any() else (math.nan, math.nan), "by seed": seeds,
                  "p": median(mcnemar(*map(sum, zip(*each))) for each in seeds), "holm": math.nan, "detectable": detectable(row["n"]), "paper": math.nan}


def kind_of(reason: str) -> str:
    """What a wrong answer lacked: its form, the tool's name, or an argument."""
    kind = reason.partition(":")[0]
    return "format" if kind in ("unparsable", "wrong number of calls") else "name" if kind == "wrong name" else "argument"


def votes(groups: Sequence[dict]) -> list[dict]:
    """The paper's Table 1 for runs with sampled answers of every sample: direct, majority vote, and pass@k for k = 1, 5 and all."""
    rows = []
    for group in groups:
        runs, config = [run for run in group["runs"] if all(r.get("vote") for r in run)], group["config"]
        if runs:
            most = min(len(r["sampled"]) for run in runs for r in run)
            direct = "base" if config.get("method") == "vote" else "answer"
            def over(value): return spread([mean(value(r) for r in run) for run in runs])
            rows.append({"bench": group["bench"], "name": group["name"], "same": group["same"], "n": len(runs[0]), "seeds": len(runs),
                         "direct": over(lambda r: r[direct]["exact"]), "vote": over(lambda r: r["vote"]["exact"]),
                         **{f"pass@{k}": over(lambda r: pass_at(k, len(r["sampled"]), sum(s["exact"] for s in r["sampled"])))
                            for k in sorted({1, min(5, most), most})},
                         "paper": PAPER_MEANS.get(config.get("method"), "") if as_in_paper(config) else ""})
    for family in families(rows):
        if len({row["bench"] for row in family}) > 1:
            shared = {key: value for key, value in family[0].items() if all(key in row for row in family)}
            means = {key: {"mean": mean(row[key]["mean"] for row in family), "sd": math.nan} for key, value in shared.items() if isinstance(value, dict)}
            rows.append(shared | means | {"bench": f"mean of {len(family)}", "n": sum(row["n"] for row in family), "seeds": min(row["seeds"] for row in family)})
    return [{key: value for key, value in row.items() if key != "same"} for row in rows]


def describe_pairs(groups: Sequence[dict]) -> list[dict]:
    """What was written and learnt: validity, novelty and agreement of the pairs, the training, and what could leak."""
    rows = []
    for group in groups:
        records = [r for run in group["runs"] for r in run if r["pairs"] or r["rejected"]]
        pairs = [(r, pair) for r in records for pair in r["pairs"]]
        if not pairs:
            continue
        requests = [pair["request"] for _, pair in pairs]
        values = [(value.casefold() in r["request"].casefold()) for r, pair in pairs for value in argument_values(pair["calls"])]
        def names(calls): return Counter(call["name"] for call in calls)
        def gold_calls(record): return [asdict(call) for call in parse_calls(record["gold"]).calls]
        losses = [r["losses"] for r in records if r["losses"]]
        leaks = [value for r, pair in pairs for value in argument_values(gold_calls(r))
                 if len(value) > 2 and value.casefold() in json.dumps([pair["request"], pair["calls"]], ensure_ascii=False).casefold()
                 and value.casefold() not in r["request"].casefold()]
        rows.append({
            "bench": group["bench"], "name": group["name"], "pairs": len(pairs), "valid": sum(pair.get("fits", True) for _, pair in pairs) / (len(pairs) + sum(len(r["rejected"]) for r in records)),
            "unique": len(set(requests)) / len(requests), "distinct-2": distinct_2(requests),
            "ROUGE-L": mean(rouge_l(pair["request"], r["request"]) for r, pair in pairs), "copied values": mean(values),
            "tool as direct": mean(names(pair["calls"]) == names([asdict(c) for c in parse_calls(r["base"]["text"]).calls]) for r, pair in pairs),
            "tool as gold": mean(names(pair["calls"]) == names(gold_calls(r)) for r, pair in pairs),
            "repeats": sum(pair["request"].casefold() in r["request"].casefold() for r, pair in pairs), "leaks": len(leaks),
            "rejected": dict(Counter(j["reason"].partition(":")[0] for r in records for j in r["rejected"]).most_common()),
            "first loss": mean(own[0] for own in losses), "last loss": mean(own[-1] for own in losses if math.isfinite(own[-1])),
            "largest norm": max((norm for r in records for norm in r.get("norms", [])), default=math.nan),
            "non-finite": sum(r["outcome"] == "non-finite" for r in records),
            "KL": mean(r["kl"] for r in records if r.get("kl") is not None)})
    return rows


def latency(groups: Sequence[dict]) -> list[dict]:
    """Median seconds of each stage, over the samples that went through it."""
    return [{"bench": group["bench"], "name": group["name"], **{
        stage: median(r["seconds"][stage] for run in group["runs"] for r in run if stage in r["seconds"])
        for stage in dict.fromkeys(stage for run in group["runs"] for r in run for stage in r["seconds"])}} for group in groups]


def without_nan(value):
    """For JSON, which has no NaN and no infinity: None in their place."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(value: float, sign: str = "") -> str:
    """A share in percent, "-" for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:{sign}.1f}"


def plus_minus(value: dict[str, float], sign: str = "") -> str:
    """Mean ± SD in percent; one run has no SD."""
    return percent(value["mean"], sign) + ("" if math.isnan(value["sd"]) else f" ± {100 * value['sd']:.1f}")


def plain(value) -> str:
    return "-" if isinstance(value, float) and math.isnan(value) else f"{value:.2f}" if isinstance(value, float) else str(value)


def between(pair: tuple[float, float], sign: str = "") -> str:
    """An interval of shares in percent, "-" for NaN."""
    return "-" if math.isnan(pair[0]) else f"[{percent(pair[0], sign)}, {percent(pair[1], sign)}]"


def report(runs: Sequence[Run], markdown: bool = False, brief: bool = False) -> str:
    """The runs one by one and, unless it is to be brief, compared: gains, their cost, votes, pairs, seconds."""
    text, groups = [table(runs, markdown)], [] if brief else grouped(runs)
    which = [("bench", str), ("name", str)]
    def add(title, rows, columns, *notes):
        if rows:
            shown = [[name if name != "name" else "run" for name, _ in columns], *([form(row.get(key, math.nan)) for key, form in columns] for row in rows)]
            text.append(("\n\n" if markdown else "\n").join([title, grid(shown, markdown), *notes]))
    rows = compare(groups)
    left_out = [f"{row['bench']} {row['name']}: {row['left out']} samples that not all of its seeds have are left out." for row in rows if row["left out"]]
    add("Gains, in points of accuracy", rows, [*which, ("n", str), ("seeds", str), ("uncertain", percent), ("acted", percent), ("TPR", percent), ("base", percent),
        ("after", plus_minus), ("gain", lambda g: plus_minus(g, "+")), ("interval", lambda i: between(i, "+")), ("fixed", str), ("harmed", str), ("p", plain),
        ("holm", plain), ("paper", plain)],
        "interval: 95 %, paired bootstrap over samples, seeds nested. p: exact McNemar, the median of the seeds (of a mean: its samples pooled); holm: over the benchmarks.",
        "One run finds, with 80 % power, if 15 % of the answers change: "
        + ", ".join(f"{100 * gain:.1f} points with n = {n}" for n, gain in dict.fromkeys((row["n"], row["detectable"]) for row in rows)) + ".", *left_out)
    add("What was fixed, and what it cost, a sample", rows, [*which, ("base interval", between), *((f"fixed {kind}", str) for kind in ("format", "name", "argument")),
        ("net", str), ("seconds", plain), ("tokens", lambda t: f"{t:.0f}"), ("extra seconds", plain), ("draws", plain)],
        "base interval: Wilson, 95 %. fixed format, name, argument: by what was wrong before. extra seconds: of a sample that the method acts on, beyond its "
        "direct answer; draws: how many sampled answers cost as many.")
    rows = votes(groups)
    add("Direct answers, majority vote, pass@k (the paper's Table 1; its means of four benchmarks are gains over the base in each)", rows,
        [*which, ("n", str), ("seeds", str), ("direct", plus_minus), ("vote", plus_minus), *((name, lambda v: plus_minus(v) if isinstance(v, dict) else "-")
         for name in dict.fromkeys(key for row in rows for key in row if key.startswith("pass@"))), ("paper", str)])
    rows = describe_pairs(groups)
    add("The pairs, and learning them", rows, [*which, ("pairs", str), *((name, percent) for name in (
            "valid", "unique", "distinct-2", "ROUGE-L", "copied values", "tool as direct", "tool as gold")), ("repeats", str), ("leaks", str),
            *((name, plain) for name in ("first loss", "last loss", "largest norm", "non-finite", "KL"))],
        "Shares in percent; valid: of all tries. ROUGE-L: to the sample's request. repeats: the request again. leaks: gold values in a pair that the request "
        "does not hold.", *(f"{row['bench']} {row['name']}, rejected: " + ", ".join(f"{reason} {count}" for reason, count in row["rejected"].items()) + "."
                            for row in rows if row["rejected"]))
    rows = latency(groups)
    add("Median seconds of each stage, where a sample went through it", rows,
        [*which, *((stage, plain) for stage in dict.fromkeys(name for row in rows for name in row if name not in ("bench", "name")))])
    return "\n\n".join(text)


def rescore(folder: Path) -> list[dict]:
    """The records of a run with the verdicts that its stored texts would be given now; the files stay as they are."""
    config, records = read_json(folder / "config.json", CONFIG), read_records(folder)
    samples = {sample.id: sample for sample in samples_of({**config, "offline": True})}
    for record in records:
        if record["id"] not in samples:
            raise ValueError(f"{folder}: {record['id']} is no sample of {config['data'] or config['bench']}: is that the data of the run?")
        for _, part in parts(record):
            part.update(asdict(exact_match(part["text"], samples[record["id"]])))
    return records


# ------------------------------------------------------------------------------------------- which uncertainty, and plots

def columns(records: Sequence[dict]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Of a run: each score (n,), whether the direct answer is wrong (n,), and what adapting gained, -1, 0 or 1 (n,)."""
    names = [name for name in SCORES if all(name in record["scores"] for record in records)]
    def column(values): return torch.tensor(list(values), dtype=torch.float64)
    return ({name: column(r["scores"][name] for r in records) for name in names},
            column(not r["base"]["exact"] for r in records),
            column(r["answer"]["exact"] - r["base"]["exact"] for r in records))


def first_choice(records: Sequence[dict]) -> tuple[list[torch.Tensor], list[int | None], torch.Tensor, torch.Tensor]:
    """Of samples with a rival to choose from: the l_n, which candidate is the gold's (None: not offered), p_(1), and whether
    the first candidate is the gold's."""
    l, gold = [], []
    for record in records:
        calls = parse_calls(record["gold"]).calls
        if len(record["candidates"]) > 1 and calls:
            l.append(torch.tensor(list(record["candidates"].values()), dtype=torch.float64))
            gold.append(next((i for i, name in enumerate(record["candidates"]) if name == calls[0].name), None))
    right = torch.tensor([float(row.argmax() == g) for row, g in zip(l, gold)])
    return l, gold, torch.stack([row.softmax(-1).max() for row in l]) if l else torch.zeros(0), right


def chosen_tau(records: Sequence[dict]) -> str:
    """The tau that was chosen without labels, and what it loses to the best of those that adapt no more than it does."""
    scores, _, gain = columns(records)
    best, now = gain_budget(scores[records[0]["gate"]], gain)["curve"].max().item(), gain.mean().item()
    return f"tau = {records[0]['tau']:.3g}, chosen without labels; regret to the best tau in hindsight: {100 * (best - now):.1f} points"


def grid(rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Rows as aligned columns, the first to the left, under a ruled head."""
    if markdown:
        return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def with_intervals(found: dict[str, float], drawn: dict[str, torch.Tensor], digits: int = 2) -> list[str]:
    """Measures as "0.71 [0.58, 0.83]"."""
    return ["{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(value, *interval(drawn[name]), d=digits) for name, value in found.items()]


def compare_scores(scores: dict[str, torch.Tensor], error: torch.Tensor) -> tuple[str, dict[str, str]]:
    """Which score ranks the errors first: a table, best first, and the AUROC of each."""
    if error.sum() in (0, len(error)):
        return f"Nothing can be ranked: all {len(error)} direct answers are {'wrong' if error.any() else 'right'}.", {}
    found = {name: ranking(score, error) for name, score in scores.items()}
    drawn = {name: bootstrap(ranking, score, error) for name, score in scores.items()}
    order = sorted(found, key=lambda name: -found[name]["AUROC"])
    rows, areas = [["score", *RANKING, "beside the best"]], {}
    for name in order:
        low, high = interval(drawn[order[0]]["AUROC"] - drawn[name]["AUROC"])
        cells = with_intervals(found[name], drawn[name])
        rows.append([name, *cells, "the best" if name == order[0] else "within noise" if low <= 0 <= high else "worse"])
        areas[name] = cells[0]
    return grid(rows) + ("\nWithin noise: the 95 % interval of the difference in AUROC to the best, over the same resamples, "
                         "holds 0."), areas


def judge_calibration(records: Sequence[dict]) -> str:
    """Whether p(1) is the probability that the first candidate is the gold's, as it is and after temperature scaling."""
    l, gold, p, right = first_choice(records)
    if not l:
        return "p(1): no sample has more than one candidate."
    rows = [["p(1)", "right", *calibration(p, right)]]
    for name, q in (("as it is", p), ("temperature, cross-fitted", cross_fitted(l, gold))):
        rows.append([name, f"{right.mean():.2f}", *with_intervals(calibration(q, right), bootstrap(calibration, q, right, times=200), 3)])
    return f"Is p(1) the probability that the first candidate is the gold's tool ({len(l)} samples with more than one)?\n" + grid(rows)


def judge_gate(records: Sequence[dict], score: torch.Tensor, error: torch.Tensor, gain: torch.Tensor, acted: str) -> str:
    """What the gate is worth, at its tau and at matched budgets: against wrong answers, and where it adapted, in gain.
    acted: the run's --gate."""
    n, gate, flagged = len(records), records[0]["gate"], torch.tensor([r["uncertain"] for r in records])
    adapted = acted != "certain" and any(r["outcome"] not in ("certain", "direct") for r in records)
    gated = {f"at tau {records[0]['tau']:.3g}: {flagged.double().mean():.0%}": flagged} | {
        f"budget {share} %": ~(score <= threshold_between(score.tolist(), round(share / 100 * n))) for share in range(10, 101, 10)}
    rows = [["adapted", "TPR", "FPR", "precision", *(["fixed", "harmed", "gain"] if adapted else [])]]
    for label, on in gated.items():
        gains = [int((gain[on] > 0).sum()), int((gain[on] < 0).sum()), f"{100 * gain[on].sum() / n:+.1f}"]
        rows.append([label, *with_intervals(gate_rates(on, error), bootstrap(gate_rates, on, error, times=300)),
                     *(map(str, gains) if adapted else [])])
    text = [f"Is the gate ({gate}) useful? Adapted against: the direct answer is wrong", grid(rows)]
    if "nan" in text[-1]:
        text.append("nan: there is no wrong (TPR), no right (FPR) or no adapted (precision) sample to take the share of.")
    if adapted:
        worth, fixes = gain_budget(score, gain), gate_rates(flagged, gain > 0)
        low, high = interval(bootstrap(lambda s, g: {"Qini": gain_budget(s, g)["Qini"]}, score, gain)["Qini"])
        best, ideal, now = 100 * worth["curve"].max().item(), 100 * worth["ideal"], 100 * gain[flagged].sum().item() / n
        text += [f"Against \"adapting fixes it\": TPR {fixes['TPR']:.2f}, FPR {fixes['FPR']:.2f}, precision {fixes['precision']:.2f}. "
                 f"Qini {100 * worth['Qini']:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}] over a random gate.",
                 f"The ideal gate gains {ideal:.1f} points, the best tau {best:.1f}, this one {now:.1f}: regret {best - now:.1f} to the best "
                 f"tau, {ideal - now:.1f} to the ideal gate. What was not adapted counts as a gain of 0."]
    return "\n".join(text)


def uncertainty_report(folder: Path) -> tuple[str, dict[str, str]]:
    """All scores of a run compared, the calibration of p(1), and what the gate is worth, with 95 % bootstrap intervals.
    Also the AUROC of each score, for a table of several runs."""
    records = read_records(folder)
    if not records:
        raise ValueError(f"{folder}: no finished sample yet")
    scores, error, gain = columns(records)
    table, areas = compare_scores(scores, error)
    title = f"{printable(folder.name)}: {len(records)} samples, {int(error.sum())} direct answers wrong. Does a score rank those first?"
    gate = judge_gate(records, scores[records[0]["gate"]], error, gain, read_json(folder / "config.json").get("gate", "score"))
    return "\n".join([title, table, "", judge_calibration(records), "", gate]), areas


def draw_reliability(axes, records: Sequence[dict]) -> None:
    l, gold, p, right = first_choice(records)
    axes.plot([0, 1], [0, 1], color="0.7", label="calibrated")
    for mark, label, q in (("o-", "as it is", p), ("s--", "temperature, cross-fitted", cross_fitted(l, gold))):
        bins = reliability(q.double(), right)
        axes.plot([b[1] for b in bins], [b[2] for b in bins], mark, color="0.0" if mark == "o-" else "0.45", label=label)
        for count, middle, share in bins if mark == "o-" else []:
            axes.annotate(str(count), (middle, share), textcoords="offset points", xytext=(4, -10), fontsize=8)


def draw_risk_coverage(axes, records: Sequence[dict]) -> None:
    scores, error, _ = columns(records)
    coverage, best = torch.arange(1, len(error) + 1) / len(error), sorted(scores, key=lambda name: ranking(scores[name], error)["AURC"])
    shown = [name for name in dict.fromkeys([*best[:4], records[0]["gate"], "margin", "random"]) if name in scores]
    for name in best:
        axes.plot(coverage, risk_coverage(scores[name], error), color="0.85", zorder=0)
    for i, name in enumerate(shown):
        axes.plot(coverage, risk_coverage(scores[name], error), ("-", "--", "-.", ":")[i % 4], color=str(0.15 * i), label=name)
    axes.plot(coverage, risk_coverage(error, error), color="0.0", linewidth=0.7, label="ideal")


def draw_margin(axes, records: Sequence[dict]) -> None:
    margins = [[r["margin"] for r in records if r["base"]["exact"] == right] for right in (True, False)]
    axes.hist(margins, bins=20, range=(0, 1), stacked=True, color=["0.8", "0.2"], edgecolor="0.0", label=["right", "wrong"])
    if records[0]["gate"] == "margin":
        axes.axvline(records[0]["tau"], color="0.0", linestyle="--", label=f"tau = {records[0]['tau']:.3g}")


def draw_tau(axes, records: Sequence[dict]) -> None:
    _, error, gain = columns(records)
    margins = torch.tensor([r["margin"] for r in records], dtype=torch.float64)
    taus = torch.linspace(0, records[0]["tau"] if records[0]["gate"] == "margin" else 1, 101)
    axes.plot(taus, [(gain[margins < t].sum() / len(gain) + 1 - error.mean()).item() for t in taus], "-", color="0.0", label="accuracy")
    axes.plot(taus, [(margins < t).double().mean().item() for t in taus], "--", color="0.4", label="uncertain")


def draw_gain_budget(axes, records: Sequence[dict]) -> None:
    scores, _, gain = columns(records)
    share, gate = torch.linspace(0, 100, len(gain) + 1), records[0]["gate"]
    axes.plot(share, 100 * gain_budget(scores[gate], gain)["curve"], "-", color="0.0", label=gate)
    axes.plot(share, 100 * gain_budget(gain, gain)["curve"], "--", color="0.4", label="ideal gate")
    axes.plot([0, 100], [0, 100 * gain.mean().item()], ":", color="0.4", label="random gate")


def draw_seconds(axes, records: Sequence[dict]) -> None:
    stages = list(dict.fromkeys(stage for r in records for stage in r["seconds"]))
    axes.barh(stages[::-1], [mean(r["seconds"][stage] for r in records if stage in r["seconds"]) for stage in stages[::-1]], color="0.6", edgecolor="0.0")


PICTURES = {    # name: who draws it, title, x, y
    "reliability": (draw_reliability, "Is p(1) the probability of being right?", "mean p(1) of the bin", "share right"),
    "risk_coverage": (draw_risk_coverage, "Errors among the surest", "coverage", "risk (share of wrong answers)"),
    "margin": (draw_margin, "The margin of right and wrong direct answers", "margin u", "samples"),
    "tau": (draw_tau, "Accuracy and share adapted over tau", "tau", "share of the samples"),
    "gain_budget": (draw_gain_budget, "What adapting the least sure gains", "share of the samples adapted, %", "gain in points"),
    "seconds": (draw_seconds, "Where the time goes", "seconds a sample, mean over those that have the stage", "")}


def plot(folder: Path, into: Path) -> list[Path]:
    """Pictures of a run as PNG files, those that it has the samples for; ValueError without matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    records = read_records(folder)
    if not records:
        raise ValueError(f"{folder}: no finished sample yet")
    wrong = sum(not r["base"]["exact"] for r in records)
    lacks = {"reliability": not first_choice(records)[0], "risk_coverage": wrong in (0, len(records))}
    into.mkdir(parents=True, exist_ok=True)
    made = [into / f"{name}.png" for name in PICTURES if not lacks.get(name)]
    for path in made:
        draw, title, x, y = PICTURES[path.stem]
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        axes.set(title=f"{title}\n{folder.name}, n = {len(records)}", xlabel=x, ylabel=y)
        draw(axes, records)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        figure.savefig(path, dpi=120)
        plt.close(figure)
    return made


# ---------------------------------------------------------------------------------------------- one sample's story

def printable(text: str) -> str:
    """Text that is safe to print: control characters, which could steer the terminal, are shown as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def story(record: dict) -> str:
    """What happened to one sample, for the terminal: candidates, margin, pairs, losses, the answer before and after."""
    p = relative_softmax(torch.tensor(list(record["candidates"].values()), dtype=torch.float64)).tolist()
    chances = sorted(zip(p, record["candidates"]), reverse=True)
    def verdict(part): return ("right  " if part["exact"] else "wrong  ") + f"{part['text']}" + \
        (f"   ({part['reason']})" if part["reason"] else "")
    gate, tau = record["gate"], record["tau"]
    decided = f"{record['margin']:.3f}" + (f", {'below' if record['uncertain'] else 'not below'} tau = {tau:.3g}" if gate == "margin" else
                                           f"; {gate} {record['scores'].get(gate, math.nan):.3f}, "
                                           f"{'above' if record['uncertain'] else 'not above'} tau = {tau:.3g}")
    rows = [("sample", f"{record['id']}: {record['outcome']}"), ("request", record["request"]),
            *(("" if i else "candidates", f"{p:6.1%} {'#' * round(30 * p):30} {name}") for i, (p, name) in enumerate(chances)),
            ("margin", decided),
            *(("pair", f"{pair['request']}\n{calls_line(pair['calls'])}   ({pair['votes']} votes)") for pair in record["pairs"]),
            *(("rejected", f"{reject['reason']}: {reject['text']}") for reject in record["rejected"])]
    if record["losses"]:
        rows.append(("loss", " ".join(f"{loss:.3f}" for loss in record["losses"])))
    rows += [("before", verdict(record["base"])), ("after", verdict(record["answer"])), ("gold", record["gold"])]
    return "\n".join(f"{label:>10}  " + printable(text).replace("\n", "\n" + " " * 12) for label, text in rows)


def calls_line(calls: Sequence[dict]) -> str:
    return "; ".join(json.dumps(call, ensure_ascii=False) for call in calls)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code: 0, 1 if --verify found a fault, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of train.py")
    parser.add_argument("--sample", metavar="ID", help="tell the story of one sample of the run")
    parser.add_argument("--uncertainty", action="store_true", help="compare the uncertainty scores of each run: which ranks the wrong "
                        "answers first, is p(1) calibrated, what is the gate worth")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write pictures of the run to this folder (of several runs: to folders "
                        "in it); needs matplotlib")
    parser.add_argument("--markdown", action="store_true", help="tables for a README")
    parser.add_argument("--json", action="store_true", help="all figures, for a machine: shares in [0, 1]")
    parser.add_argument("--rescore", action="store_true", help="score the stored texts again, offline, and show what comes out; nothing is written")
    parser.add_argument("--verify", action="store_true", help="check the runs: a record for every sample, configuration and data "
                        "unchanged, every verdict as it would be given now, base weights the same before and after")
    args = parser.parse_args(argv)
    try:
        if args.verify:
            faults = {folder: verify(folder) for folder in args.runs}
            for folder, wrong in faults.items():
                print("\n".join(printable(f"{folder}: {fault}") for fault in wrong or ["sound"]))
            return int(any(faults.values()))
        if args.uncertainty:
            texts, areas = zip(*map(uncertainty_report, args.runs))
            print("\n\n".join(texts))
            if len(areas) > 1:
                print("\nAUROC in each run\n" + grid([["score", *(printable(folder.name) for folder in args.runs)], *(
                    [name, *(area.get(name, "-") for area in areas)] for name in SCORES if any(name in area for area in areas))]))
        if args.plot:
            for folder in args.runs:
                print(*plot(folder, args.plot if len(args.runs) == 1 else args.plot / folder.name), sep="\n")
        if args.uncertainty or args.plot:
            return 0
        if args.json:
            runs = read_runs(args.runs, args.rescore)
            groups = grouped(runs)
            print(json.dumps(without_nan({"runs": {str(folder): summarise(records) for folder, _, records in runs}, "gains": compare(groups), "votes": votes(groups), "pairs": describe_pairs(groups),
                                          "seconds": latency(groups)}), indent=1))
            return 0
        if args.sample is None:
            print(report(read_runs(args.runs, args.rescore), args.markdown))
            return 0
        for folder in args.runs:
            records = {record["id"]: record for record in read_records(folder)}
            if args.sample not in records:
                raise ValueError(f"{folder} has no sample {args.sample!r}; it has {', '.join(list(records)[:3]) or 'none'}, ...")
            print(story(records[args.sample]))
        return 0
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {printable(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
