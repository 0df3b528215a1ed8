"""When is an answer right? Scoring, a run's records, the table of runs, one sample's story.

    python evaluate.py runs/*                           # the table (--markdown, --json)
    python evaluate.py runs/NAME --sample sealtool-7    # what happened to one sample
"""
import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data import Sample
from data.calls import call_key, parse_calls


# --- Scoring: (text, gold calls) -> verdict -------------------------------------------------------
@dataclass(frozen=True)
class Verdict:
    """What an answer is worth. `exact` is the score; the rest says why, and how far off it is."""
    text: str               # the answer
    exact: bool             # its calls are the gold calls, one to one, values read by the schema
    reason: str             # "" if exact, else what is wrong first; its kind stands before ":"
    strict: bool            # exact in the gold's own JSON types, in the form asked for alone
    parsed: bool            # at least one call could be read
    recovery: str           # what was forgiven to read it, as in `data.calls.Parsed`
    name_correct: bool      # the multisets of names are equal
    name_f1: float          # over names, one to one, in [0, 1]
    argument_f1: float      # over (name, argument, value), one to one, in [0, 1]


def f1(predicted: Iterable, gold: Iterable) -> float:
    """2 |P ∩ G| / (|P| + |G|) of multisets, one to one: `f1("aaa", "a") -> 0.5`; 1.0 of nothing."""
    predicted, gold = Counter(predicted), Counter(gold)
    total = predicted.total() + gold.total()
    return 2 * (predicted & gold).total() / total if total else 1.0


def _reason(predicted: list[tuple[str, frozenset]], gold: list[tuple[str, frozenset]]) -> str:
    """The first thing by which two answers, as call keys, differ; "" if they do not."""
    if len(predicted) != len(gold):
        return f"wrong number of calls: {len(predicted)} for {len(gold)}"
    names, gold_names = Counter(name for name, _ in predicted), Counter(name for name, _ in gold)
    if names != gold_names:
        wrong, right = next(iter(names - gold_names)), next(iter(gold_names - names))
        return f"wrong name: {wrong:.40} for {right}"
    wrong, missed = Counter(predicted) - Counter(gold), Counter(gold) - Counter(predicted)
    if not missed:
        return ""
    name, wanted = next(iter(missed))
    rivals = [pairs for other, pairs in wrong if other == name]
    given, wanted = dict(max(rivals, key=lambda pairs: len(pairs & wanted))), dict(wanted)
    if lacking := wanted.keys() - given.keys():
        return f"missing argument: {min(lacking)}"
    if further := given.keys() - wanted.keys():
        return f"extra argument: {min(further):.40}"
    return f"wrong value: {min(name for name in wanted if given[name] != wanted[name])}"


def exact_match(text: str, sample: Sample) -> Verdict:
    """The verdict on any text: `exact_match("no idea", sample).reason -> "unparsable"`."""
    parsed = parse_calls(text)
    if parsed.recovery == "unparsable" or not parsed.calls and sample.answers:
        return Verdict(text, exact=False, reason="unparsable", strict=False, parsed=False,
                       recovery=parsed.recovery, name_correct=False, name_f1=0.0, argument_f1=0.0)
    def keys(calls): return [call_key(call, sample.tools) for call in calls]
    def names(calls): return Counter(call.name for call in calls)
    def values(calls): return [(name, *pair) for name, pairs in keys(calls) for pair in pairs]
    def as_written(call): return call.name, json.dumps(call.arguments, sort_keys=True)
    calls, gold = parsed.calls, sample.answers
    same_types = Counter(map(as_written, calls)) == Counter(map(as_written, gold))
    reason = _reason(keys(calls), keys(gold))
    return Verdict(
        text, exact=not reason, reason=reason, parsed=bool(calls), recovery=parsed.recovery,
        strict=not reason and not parsed.recovery and same_types,
        name_correct=names(calls) == names(gold), name_f1=f1(names(calls), names(gold)),
        argument_f1=f1(values(calls), values(gold)))


def reachable(sample: Sample) -> bool:
    """Whether every gold call is of an offered tool; no method can be expected to call another."""
    return {call.name for call in sample.answers} <= {tool["name"] for tool in sample.tools}


# --- Records: what a run leaves on disk -----------------------------------------------------------
@dataclass
class Record:
    """One sample of a run: what H, G and T saw, and the verdicts before and after."""
    id: str
    request: str
    margin: float                   # u(x) = p(1) - p(2), in [0, 1]
    uncertain: bool                 # what the gate decided
    outcome: str                    # certain, direct, adapted, no pair, non-finite, out of memory
    candidates: dict[str, float]    # tool name: l_n in nats
    base: Verdict                   # of the direct answer
    answer: Verdict                 # of the answer that counts
    pairs: list[dict]               # of G, as in augment.Pair ...
    rejected: list[dict]            # ... and augment.Rejected
    losses: list[float]             # one a training step, in nats
    norms: list[float]              # of the gradient, likewise
    seconds: dict[str, float]       # by step
    tokens: dict[str, int]          # by step
    gold: str                       # the gold calls as text
    reachable: bool
    log_p: list[float]              # of the direct answer's tokens, its end included, in nats
    entropy: list[float]            # likewise
    ids: list[int]                  # the direct answer's tokens without its end
    prompt_tokens: int
    extra: dict = field(default_factory=dict)       # what a run of research adds

    def __post_init__(self):
        if isinstance(self.base, dict):             # as it is read
            self.base, self.answer = Verdict(**self.base), Verdict(**self.answer)


@dataclass(frozen=True)
class Run:
    folder: Path
    config: dict
    records: list[Record]


def read_run(folder: Path) -> Run:
    """A run of train.py; FileNotFoundError or ValueError name the file, the line and the fault."""
    paths = folder / "config.json", folder / "records.jsonl"
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}: is {folder} a run folder of train.py?")
    config, lines = paths[0].read_bytes(), paths[1].read_bytes().splitlines()
    records = [_read(Record, line, f"{paths[1]}, line {i}") for i, line in enumerate(lines, 1)]
    return Run(folder, _read(dict, config, str(paths[0])), records)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of `runs/*`, where the kept stages lie beside them."""
    return [read_run(folder) for folder in folders if folder.name != "stages"]


def _read(kind: type, content: bytes, where: str) -> object:
    try:
        return kind(**json.loads(content))
    except (ValueError, TypeError, RecursionError) as error:    # the second: a field lacks
        raise ValueError(f"{where}: {error}; the run's command writes it again") from None


def write_run(folder: Path, config: dict, records: list[Record]) -> None:
    """Write config.json, records.jsonl and summary.json, each whole or not at all; never a NaN."""
    def dumped(value, indent=None): return json.dumps(value, indent=indent, allow_nan=False) + "\n"
    contents = {"config.json": dumped(config, 2),
                "records.jsonl": "".join(dumped(asdict(record)) for record in records),
                "summary.json": dumped(summarise(records), 2)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)


# --- The table: one line a run --------------------------------------------------------------------
# The paper's gains in points: Qwen2.5-1.5B-Instruct, the whole benchmark, means of 5 seeds.
PAPER_GAIN = {"toolalpaca": 5.84, "nexusraven": 6.05, "sealtool": 5.76, "apibank": 4.26}
HEAD = ["run", "n", "uncertain", "adapted", "no pair", "base", "after", "gain", "fixed", "harmed",
        "names", "s/sample"]


def summarise(records: Sequence[Record]) -> dict:
    """A run's counts, shares in [0, 1] (None without records), and seconds by step."""
    def mean(values): return sum(values) / len(records) if records else None
    def kinds(reasons): return dict(Counter(r.partition(":")[0] for r in reasons).most_common())
    outcomes, seconds, measures = Counter(r.outcome for r in records), Counter(), {}
    for record in records:
        seconds.update(record.seconds)
    for name in ("strict", "parsed", "name_correct", "name_f1", "argument_f1"):
        measures[f"base_{name}"] = mean(getattr(r.base, name) for r in records)
        measures[f"answer_{name}"] = mean(getattr(r.answer, name) for r in records)
    return {"n": len(records), "uncertain": sum(r.uncertain for r in records),
            "adapted": outcomes["adapted"], "no_pair": outcomes["no pair"],
            "non_finite": outcomes["non-finite"], "out_of_memory": outcomes["out of memory"],
            "base_accuracy": mean(r.base.exact for r in records),
            "accuracy": mean(r.answer.exact for r in records),
            "fixed": sum(r.answer.exact and not r.base.exact for r in records),
            "harmed": sum(r.base.exact and not r.answer.exact for r in records),
            **measures, "reachable": mean(r.reachable for r in records),
            "reasons": kinds(r.answer.reason for r in records if r.answer.reason),
            "rejected": kinds(tried["reason"] for r in records for tried in r.rejected),
            "seconds": {step: round(total, 3) for step, total in seconds.items()}}


def table(runs: Sequence[Run], markdown: bool = False) -> str:
    """One line a run, and notes to read it by; accuracies in percent, by `exact`."""
    rows, notes = [HEAD], {}                            # notes: a note -> the runs it is about
    for run in runs:
        name, s = printable(run.folder.resolve().name), summarise(run.records)
        for note in _notes(run.config, s):
            notes.setdefault(note, []).append(name)
        if run.records:
            counts = [str(s[key]) for key in ("n", "uncertain", "adapted", "no_pair")]
            base, after = 100 * s["base_accuracy"], 100 * s["accuracy"]
            pace = sum(s["seconds"].values()) / s["n"]
            rows.append([name, *counts, f"{base:.1f}", f"{after:.1f}", f"{after - base:+.1f}",
                         str(s["fixed"]), str(s["harmed"]),
                         f"{100 * s['answer_name_correct']:.1f}", f"{pace:.2f}"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells))
    for note, names in notes.items():
        whose = "all runs" if len(names) == len(runs) > 1 else ", ".join(names)
        lines.append("\n" * markdown + f"{whose}: {note}")      # a README's paragraphs stand apart
    return "\n".join(lines)


def _notes(config: dict, summary: dict) -> list[str]:
    if not summary["n"]:
        return ["no finished sample yet"]
    source, paper = str(config.get("data")), PAPER_GAIN.get(str(config.get("bench")))
    own = source == "bundled" or source.endswith(".json")       # a file may hold any samples
    failed, too_large, share = summary["non_finite"], summary["out_of_memory"], summary["reachable"]
    notes = {
        "bundled samples, made for this project; they are not the benchmark": source == "bundled",
        f"the paper's gain (Qwen2.5-1.5B-Instruct, 5 seeds) is +{paper}": paper and not own,
        f"adaptations dropped as non-finite, the direct answer stands: {failed}": failed,
        f"adaptations out of memory, the direct answer stands: {too_large}": too_large,
        f"at most {share:.1%} can be right: elsewhere a gold tool is not offered": share < 1,
        "uses labels": config.get("uses_labels") is True}
    return [note for note, holds in notes.items() if holds]


# --- The story of one sample ----------------------------------------------------------------------
def printable(text: str) -> str:
    """Text that is safe to print: control characters, which could steer a terminal, as escapes."""
    def escaped(c): return c.encode("unicode_escape").decode()
    return "".join(c if c.isprintable() or c == "\n" else escaped(c) for c in text)


def story(record: Record, tau: float) -> str:
    """What happened to one sample, in the order of Algorithm 1, for the terminal."""
    rows = [("sample", f"{record.id}: {record.outcome}"), ("request", record.request)]
    best = max(record.candidates.values())
    weights = {name: math.exp(l - best) for name, l in record.candidates.items()}
    for name in sorted(weights, key=weights.get, reverse=True):
        p = weights[name] / sum(weights.values())               # Relative Softmax Scoring
        rows.append(("candidate", f"{p:6.1%} {'#' * round(30 * p):30} {name}"))
    side = "below" if record.margin < tau else "not below"
    rows.append(("margin", f"{record.margin:.3f}, {side} tau = {tau:.3g}"))
    for pair in record.pairs:
        rows.append(("pair", f"{pair['request']}\n{pair['text']}"))
    for tried in record.rejected:
        rows.append(("rejected", f"{tried['reason']}: {tried['text']}"))
    if record.losses:
        rows.append(("losses", " ".join(f"{loss:.3f}" for loss in record.losses)))
    for when, v in (("before", record.base), ("after", record.answer)):
        rows.append((when, f"right  {v.text}" if v.exact else f"wrong  {v.text}   ({v.reason})"))
    rows.append(("gold", record.gold))
    lines = [f"{label:>10}  {text}".replace("\n", "\n" + " " * 12) for label, text in rows]
    return printable("\n".join(lines))


# --- The program ----------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    """The program; its exit code is 0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of train.py")
    parser.add_argument("--sample", metavar="ID", help="what happened to one sample, in each run")
    parser.add_argument("--markdown", action="store_true", help="the table, for a README")
    parser.add_argument("--json", action="store_true", help="the summaries, {run: {name: value}}")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.runs)
        if args.json:
            print(json.dumps({str(run.folder): summarise(run.records) for run in runs}, indent=2))
        elif args.sample is None:
            print(table(runs, args.markdown))
        else:
            print("\n\n".join(_story_in(run, args.sample) for run in runs))
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


def _story_in(run: Run, id: str) -> str:
    records = {record.id: record for record in run.records}
    if id not in records:
        raise ValueError(f"{run.folder} has no sample {id!r}; it has {', '.join([*records][:3])}")
    return f"{printable(str(run.folder))}\n{story(records[id], run.config.get('tau', math.nan))}"


if __name__ == "__main__":
    sys.exit(main())
