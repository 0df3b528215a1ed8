"""A run to look through: one HTML file that opens in a browser without a server or a network.

    python -m research.page RUN --out page.html
    python -m research.page RUN RUN --out page.html     # two runs of the same samples, side by side

It holds the table of runs and the story of each sample, to be searched, filtered and sorted, from
what the run folders hold. The page itself is page.html beside this file. What models and data have
written stands in it as JSON that only the page's own script reads, and is shown as text alone.
"""
import argparse
import base64
import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if not __package__:
    print("Call it in the project's folder as: python -m research.page", file=sys.stderr)
    sys.exit(2)

from data.runs import Record, Run, read_runs
from evaluate import printable, summarise, table
from train import exit_codes

PAGE = Path(__file__).with_suffix(".html")


def story(record: Record) -> dict:
    """What the page tells of one sample of one run."""
    best = max(record.candidates.values(), default=0.0)
    weights = {name: math.exp(l - best) for name, l in record.candidates.items()}
    total = sum(weights.values())
    likeliest = sorted(weights, key=weights.get, reverse=True)
    return {"outcome": record.outcome, "uncertain": record.uncertain, "margin": record.margin,
            "candidates": [[name, weights[name] / total] for name in likeliest],
            "before": asdict(record.base), "after": asdict(record.answer), "pairs": record.pairs,
            "rejected": record.rejected, "losses": record.losses, "seconds": record.seconds,
            "promptTokens": record.prompt_tokens}


def row(run: Run) -> dict:
    """What the page tells of a run: its line of the table, and the notes below that."""
    s, n = summarise(run.records), len(run.records)
    base, after = s.get("base_accuracy"), s.get("answer_accuracy")
    seconds = sum(s["seconds"].values()) / max(n, 1)
    cells = {"samples": n, "uncertain": s["uncertain"], "adapted": s["adapted"],
             "no pair": s["no_pair"], "base": "–", "after": "–", "gain": "–", "fixed": s["fixed"],
             "harmed": s["harmed"], "s/sample": f"{seconds:.2f}"}
    if base is not None:
        cells |= {"base": f"{100 * base:.1f}", "after": f"{100 * after:.1f}",
                  "gain": f"{100 * (after - base):+.1f}"}
    name = run.folder.resolve().name
    notes = [note.removeprefix(f"{printable(name)}: ") for note in table([run]).splitlines()[3:]]
    about = {key: run.config.get(key) for key in ("model", "bench", "method", "tau", "seed")}
    return {"name": name, "cells": cells, "notes": notes if n else [], **about}


def samples(runs: Sequence[Run]) -> list[dict]:
    """The samples of all runs in the order of the first, each with its story in each run, or
    None."""
    found = {}
    for i, run in enumerate(runs):
        for record in run.records:
            one = found.setdefault(record.id, {"id": record.id, "request": record.request,
                                               "gold": record.gold, "runs": [None] * len(runs)})
            one["runs"][i] = story(record)
    return list(found.values())


def shown(value: object) -> object:
    """The value with each text in it as it is safe to show: control characters as escapes."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): shown(each) for key, each in value.items()}
    return [shown(each) for each in value] if isinstance(value, (list, tuple)) else value


def page(runs: Sequence[Run]) -> str:
    """The file. No text of a run can end the JSON, whose "<" are escapes, and by its policy the
    page runs its own script alone and loads nothing."""
    text = PAGE.read_text(encoding="utf-8")
    held = json.dumps(shown({"runs": [row(run) for run in runs], "samples": samples(runs)}))
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("style", "script"):
        own = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    before, data, after = text.replace("POLICY", policy).partition("DATA")
    return before + held.replace("<", "\\u003c") + after


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="one run folder, or two")
    parser.add_argument("--out", type=Path, default=Path("page.html"), help="the file (page.html)")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs)
    if len(runs) == 2:
        one, other = [{r.id: (r.request, r.gold) for r in run.records} for run in runs]
        if any([one[id] != other[id] for id in one.keys() & other.keys()]):
            raise ValueError("the runs have other samples under the same ids: show each alone")
    if not 1 <= len(runs) <= 2:
        raise ValueError(f"these are {len(runs)} runs: a page shows one, or two side by side")
    args.out.write_text(page(runs), encoding="utf-8")
    print(f"{args.out}: {sum(len(run.records) for run in runs)} stories; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
