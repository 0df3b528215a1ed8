"""When is an answer right? Scores answers, prints the table of runs and one sample's story.

    python evaluate.py runs/*                           # the table (--markdown, --json)
    python evaluate.py runs/NAME --list harmed          # a line a sample; of two runs, what differs
    python evaluate.py runs/NAME --sample sealtool-7    # what happened to one sample, or several
    python evaluate.py runs --stages                    # what is kept for later runs (--prune)
"""
import signal

if __name__ == "__main__":                              # an interrupt needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import json
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data import Sample
from data.calls import call_keys, parse_calls
from data.runs import (KeptFile, Record, Run, Verdict, kept_files, prune, read_run, read_runs,
                       write_run)


# --- Scoring: (text, gold calls) -> verdict -------------------------------------------------------
def exact_match(text: str, sample: Sample) -> Verdict:
    """The verdict on any text: `exact_match("no idea", sample).reason -> "unparsable"`.

    `exact` is whether the calls in it are the gold calls, one to one, values read by the schema.
    Beside it, each in [0, 1]: `strict` (also in the gold's own JSON types, and in the form asked
    for alone), `parsed` (at least one call could be read), `name_correct` (the multisets of names
    are equal), `name_f1`, `argument_f1` (over (name, argument, value)), and `reachable` (every
    gold call is of an offered tool; no method can be expected to call another). Without a gold
    answer `exact` is None: neither right nor wrong."""
    if sample.answers is None:
        return Verdict(text, None, "no gold answer", {})
    parsed, gold, reason = parse_calls(text), sample.answers, ""
    both = (parsed.calls, gold)
    names, gold_names = [Counter([call.name for call in calls]) for calls in both]
    said, wanted = [call_keys(calls, sample.tools) for calls in both]
    missed, reachable = wanted - said, gold_names.keys() <= {tool["name"] for tool in sample.tools}
    measures = {"strict": 0.0, "parsed": 0.0, "name_correct": 0.0, "name_f1": 0.0,
                "argument_f1": 0.0, "reachable": float(reachable)}
    if parsed.recovery == "unparsable" or gold and not parsed.calls:
        return Verdict(text, False, "unparsable", measures)
    if len(parsed.calls) != len(gold):
        reason = f"wrong number of calls: {len(parsed.calls)} for {len(gold)}"
    elif names != gold_names:
        wrong, right = next(iter(names - gold_names)), next(iter(gold_names - names))
        reason = f"wrong name: {wrong:.40} for {right}"
    elif missed:
        reason = wrong_argument(said - wanted, *next(iter(missed)))
    parts, gold_parts = [Counter([(name, *pair) for name, pairs in keys.elements()
                                  for pair in pairs]) for keys in (said, wanted)]
    for part, predicted, golden in (("name", names, gold_names), ("argument", parts, gold_parts)):
        total, common = predicted.total() + golden.total(), (predicted & golden).total()
        # 2 |P and G| / (|P| + |G|), one to one
        measures[f"{part}_f1"] = 2 * common / total if total else 1.0
    written, asked = [Counter([(call.name, json.dumps(call.arguments, sort_keys=True))
                               for call in calls]) for calls in both]
    as_asked = not parsed.recovery and written == asked
    measures |= {"strict": float(not reason and as_asked), "parsed": float(bool(parsed.calls)),
                 "name_correct": float(names == gold_names)}
    return Verdict(text, not reason, reason, measures)


def wrong_argument(wrong: Counter, name: str, wanted: frozenset) -> str:
    """How the call that is wanted differs from the nearest of the wrong ones of its name, as call
    keys."""
    rivals = [pairs for other, pairs in wrong if other == name]
    shared = [len(pairs & wanted) for pairs in rivals]
    given, wanted = dict(rivals[shared.index(max(shared))]), dict(wanted)
    if lacking := wanted.keys() - given.keys():
        return f"missing argument: {min(lacking)}"
    if further := given.keys() - wanted.keys():
        return f"extra argument: {min(further):.40}"
    return f"wrong value: {min(name for name in wanted if given[name] != wanted[name])}"


# --- The end of a run -----------------------------------------------------------------------------
def join(run: Run) -> None:
    """Write the run folder, and print the result."""
    if not write_run(run, summarise(run.records)):
        print(f"{run.folder}: more samples are in it already; it is left as it is")
        run = read_run(run.folder)
    if run.config.get("ask") and run.records:
        print(story_in(run, run.records[0].id))
        return
    print(table([run]))
    changed = [record for record in run.records if record.base.exact != record.answer.exact]
    for record in [*changed, *run.records][:1]:
        command = shlex.join(["python", "evaluate.py", str(run.folder), "--sample", record.id])
        print(f"Next: {command}    tells its story.")


# --- The table: one line a run --------------------------------------------------------------------
# of samples that research/benchmarks.py has looked at: what can be known, what a rule names, in %
KNOWN = Path(__file__).parent / "data" / "known.json"
# The paper's gains in points: Qwen2.5-1.5B-Instruct, the whole benchmark, means of 5 seeds.
PAPER_GAIN = {"toolalpaca": 5.84, "nexusraven": 6.05, "sealtool": 5.76, "apibank": 4.26}
HEAD = ["run", "n", "uncertain", "adapted", "no pair", "base", "after", "gain", "fixed", "harmed",
        "names", "s/sample"]


def summarise(records: Sequence[Record]) -> dict:
    """A run's counts, shares in [0, 1] (absent without gold answers), and seconds by stage."""
    outcomes = Counter([r.outcome for r in records])
    scored = [r for r in records if r.answer.exact is not None]
    reasons = Counter([r.answer.reason.partition(":")[0] for r in scored if not r.answer.exact])
    rejected = Counter([each["reason"].partition(":")[0] for r in records for each in r.rejected])
    seconds, measures = Counter(), Counter()
    for record in records:
        seconds.update(record.seconds)
    for record in scored:
        for when, verdict in (("base", record.base), ("answer", record.answer)):
            measures[f"{when}_accuracy"] += verdict.exact
            measures.update({f"{when}_{name}": v for name, v in verdict.measures.items()})
    return {
        "n": len(records), "uncertain": sum([r.uncertain for r in records]),
        "adapted": outcomes["adapted"], "no_pair": outcomes["no pair"],
        "non_finite": outcomes["non-finite"], "out_of_memory": outcomes["out of memory"],
        "too_long": outcomes["too long"],
        "fixed": sum([r.answer.exact and not r.base.exact for r in scored]),
        "harmed": sum([r.base.exact and not r.answer.exact for r in scored]),
        "no_gold": len(records) - len(scored),
        **{name: total / len(scored) for name, total in measures.items()},
        "cut": sum([count for why, count in reasons.items() if why.startswith("cut at")]),
        "reasons": dict(reasons.most_common()), "rejected": dict(rejected.most_common()),
        "seconds": {stage: round(total, 3) for stage, total in seconds.items()}}


def table(runs: Sequence[Run], markdown: bool = False) -> str:
    """One line for each run, and notes below; accuracies in percent, by `exact`."""
    rows, notes = [HEAD], {}                            # notes: a note -> the runs it is about
    looked_at = json.loads(KNOWN.read_text(encoding="utf-8"))
    for run in runs:
        name, s, config = printable(run.folder.resolve().name), summarise(run.records), run.config
        source, paper = str(config.get("data")), PAPER_GAIN.get(str(config.get("bench")))
        own = source == "bundled" or Path(source).suffix            # a file may hold any samples
        share = s.get("answer_reachable", 1)
        known, named = looked_at.get(config.get("facts", {}).get("samples"), ("", ""))
        said = {
            "no finished sample yet": not run.records,
            "bundled samples, made for this project; they are not the benchmark":
                run.records and source == "bundled",
            f"the paper's gain (Qwen2.5-1.5B-Instruct, 5 seeds) is +{paper}":
                run.records and paper and not own,
            f"non-finite, the direct answer stands: {s['non_finite']}": s["non_finite"],
            f"out of memory, the direct answer stands: {s['out_of_memory']}": s["out_of_memory"],
            f"too long for the model's context: {s['too_long']}": s["too_long"],
            f"wrong answers that were cut at --max-new-tokens: {s['cut']}": s["cut"],
            f"at most {share:.1%} can be right: elsewhere a gold tool is not offered":
                share < 1 and not known,
            f"at most {known} % can be known from the prompt; naming by rule: {named} %": known,
            f"without a gold answer, so neither right nor wrong: {s['no_gold']}": s["no_gold"],
            "uses labels": config.get("uses_labels") is True}
        for note in [note for note, holds in said.items() if holds]:
            notes.setdefault(note, []).append(name)
        if run.records:
            accuracies = ["-", "-", "-"]
            if "base_accuracy" in s:
                base, after = 100 * s["base_accuracy"], 100 * s["answer_accuracy"]
                accuracies = [f"{base:.1f}", f"{after:.1f}", f"{after - base:+.1f}"]
            of = "" if s["n"] == config.get("samples", s["n"]) else f" of {config['samples']}"
            names = f"{100 * s['answer_name_correct']:.1f}" if "answer_name_correct" in s else "-"
            rows.append([name, f"{s['n']}{of}", f"{s['uncertain']}", f"{s['adapted']}",
                         f"{s['no_pair']}", *accuracies, f"{s['fixed']}", f"{s['harmed']}", names,
                         f"{sum(s['seconds'].values()) / s['n']:.2f}"])
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


# --- The story of one sample ----------------------------------------------------------------------
def printable(text: str) -> str:
    """Text that is safe to print: control characters, which could steer a terminal, as escapes."""
    def escaped(c): return c.encode("unicode_escape").decode()
    return "".join(c if c.isprintable() or c == "\n" else escaped(c) for c in text)


def story(record: Record, tau: float) -> str:
    """What happened to one sample, in the order of Algorithm 1, for the terminal."""
    rows = [("sample", f"{record.id}: {record.outcome}"), ("request", record.request)]
    best = max(record.candidates.values(), default=0.0)
    weights = {name: math.exp(l - best) for name, l in record.candidates.items()}
    for name in sorted(weights, key=weights.get, reverse=True):
        p = weights[name] / sum(weights.values())               # Relative Softmax Scoring
        rows.append(("candidate", f"{p:6.1%} {'#' * round(30 * p):30} {name}"))
    if record.margin is not None:                               # None: H has failed
        side = "below" if record.margin < tau else "not below"
        rows.append(("margin", f"{record.margin:.3f}, {side} tau = {tau:.3g}"))
    for pair in record.pairs:
        rows.append(("pair", f"{pair['request']}\n{pair['text']}"))
    for tried in record.rejected:
        rows.append(("rejected", f"{tried['reason']}: {tried['text']}"))
    if record.losses:
        rows.append(("losses", " ".join(f"{loss:.3f}" for loss in record.losses)))
    for when, v in (("before", record.base), ("after", record.answer)):
        worth = {True: "right  ", False: "wrong  ", None: ""}[v.exact]
        rows.append((when, f"{worth}{v.text}" + (f"   ({v.reason})" if v.reason else "")))
    if record.answer.exact is not None:
        rows.append(("gold", record.gold))
    lines = [f"{label:>10}  {text}".replace("\n", "\n" + " " * 12) for label, text in rows]
    return printable("\n".join(lines))


# --- The samples of a run, a line each ------------------------------------------------------------
LISTS = ("fixed", "harmed", "uncertain", "rejected", "all")


def is_in(record: Record, which: str) -> bool:
    """Does one of LISTS have this sample? rejected: G has rejected a try at a pair for it."""
    before, after = record.base.exact, record.answer.exact
    return {"fixed": after and before is False, "harmed": before and after is False,
            "uncertain": record.uncertain, "rejected": bool(record.rejected), "all": True}[which]


def in_words(record: Record) -> str:
    """What came of a sample, on one line: `adapted  u 0.417  wrong -> right  wrong value: x`."""
    worth = {True: "right", False: "wrong", None: "?"}
    margin = "-" if record.margin is None else f"{record.margin:.3f}"
    why = record.answer.reason or record.base.reason
    return (f"{record.outcome:<8}  u {margin:>5}  {worth[record.base.exact]:>5} -> "
            f"{worth[record.answer.exact]:<5}  {why}").rstrip()


def listing(run: Run, which: str) -> str:
    """One line for each sample of the list `which`, in the run's order."""
    listed = [record for record in run.records if is_in(record, which)]
    wide, lines = max([len(record.id) for record in listed], default=0), []
    for record in listed:
        reasons = [each["reason"] for each in record.rejected] if which == "rejected" else []
        lines.append("  ".join([record.id.ljust(wide), in_words(record), *reasons]))
    lines.append(f"{run.folder}: {which}: {len(listed)} of {len(run.records)} samples")
    return "\n".join([printable(line.replace("\n", " ")) for line in lines])


def difference(one: Run, other: Run, which: str) -> str:
    """What differs between two runs in each sample that the list `which` has of either, and what
    came of it in both."""
    theirs, lines, alone = {record.id: record for record in other.records}, [], 0
    for a in one.records:
        b = theirs.pop(a.id, None)
        alone += b is None
        if b and (is_in(a, which) or is_in(b, which)):
            parts = ("request", "gold", "margin", "pairs", "base", "answer")
            named = ", ".join([part for part in parts if getattr(a, part) != getattr(b, part)])
            if named:
                lines += [f"{a.id}: {named}", f"  1  {in_words(a)}", f"  2  {in_words(b)}"]
    lines += [f"1 = {one.folder}, 2 = {other.folder}: {which}: {len(lines) // 3} samples differ; "
              f"in one run alone: {alone + len(theirs)}"]
    return "\n".join([printable(line.replace("\n", " ")) for line in lines])


def files_table(files: Sequence[KeptFile]) -> str:
    """The kept lines: the files' sizes, and the runs that read them."""
    lines, total = [], sum([each.size for each in files])
    for each in files:
        read = ", ".join([run.name for run in each.readers]) or "no run"
        read = read if each.key else "torn: no key tells what it is of"
        lines.append(f"{each.size / 1e3:10,.1f} kB  {each.path.stem}  {read}")
    return printable("\n".join([*lines, f"{total / 1e3:10,.1f} kB in all"]))


# --- The program ----------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    """The program; its exit code is 0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of train.py")
    parser.add_argument("--sample", metavar="ID", nargs="+", action="extend",
                        help="what happened to these samples, in each run")
    parser.add_argument("--list", choices=LISTS, help="a line a sample; of two runs, what differs")
    parser.add_argument("--stages", action="store_true",
                        help="of a folder of runs: what is kept, its size, which runs read it")
    parser.add_argument("--prune", action="store_true", help="delete what no run there reads")
    parser.add_argument("--markdown", action="store_true", help="the table, for a README")
    parser.add_argument("--json", action="store_true", help="the summaries, {run: {name: value}}")
    args = parser.parse_args(argv)
    try:
        print(told(args), flush=True)
    except BrokenPipeError:                 # who reads it has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


def told(args: argparse.Namespace) -> str:
    """What the command line asks for."""
    if args.prune:
        return "\n".join([f"deleted:\n{files_table(prune(folder))}" for folder in args.runs])
    if args.stages:
        return "\n".join([files_table(kept_files(folder)) for folder in args.runs])
    runs = read_runs(args.runs)
    if args.json:
        return json.dumps({str(run.folder): summarise(run.records) for run in runs}, indent=2)
    if args.sample:
        return "\n\n".join([story_in(run, id) for id in args.sample for run in runs])
    if args.list and len(runs) == 2:
        return difference(*runs, args.list)
    if args.list:
        return "\n\n".join([listing(run, args.list) for run in runs])
    return table(runs, args.markdown)


def story_in(run: Run, id: str) -> str:
    """A sample's story under the name of its run, which says if that is not finished."""
    records = {record.id: record for record in run.records}
    if id not in records:
        raise ValueError(f"{run.folder} has no sample {id!r}; it has {', '.join([*records][:3])}")
    head, all_of_them = printable(str(run.folder)), run.config.get("samples", len(records))
    if len(records) != all_of_them:
        head += f": {len(records)} of {all_of_them} samples"
    return f"{head}\n{story(records[id], run.config.get('tau', math.nan))}"


if __name__ == "__main__":
    sys.exit(main())
