"""Whom to adapt? Algorithm 1 with another gate than u(x) < tau.

    python -m research.gates --gate all --bench toolalpaca
    python -m research.gates --gate score --gate-score answer_nll --budget 0.3 --bench toolalpaca

all: every sample. certain: only those with u(x) >= tau. random: as many as are uncertain, drawn by
the seed. oracle: those whose direct answer is wrong, which uses labels. score: those above a
threshold of another score (research/scores.py); the threshold is given, or such that a share of the
samples is above it (--budget), or chosen without labels by Otsu's rule. A gate looks at H's lines
of all samples, so H runs over all of them first; then G and T run on whom it lets through. The
answer stands in research/RESULTS.md, "Whom to adapt?".
"""
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

import evaluate
import train
from augment import synthesize
from data import Sample
from model import Tokenizer, seeded
from research.scores import SCORES, otsu, scores_of, threshold_between
from train import Agent, Assessed, Kept, Outcome, adapt, assess, lessons_of, option


@dataclass(frozen=True)
class GateConfig(train.Config):
    """train.py's options, and those of the gate."""
    gate: str = option("", "H", "who is adapted to", "all", "certain", "random", "oracle", "score")
    gate_score: str = option("margin", "H", "with --gate score: which (1 - u is 'margin')", *SCORES)
    threshold: str = option("otsu", "H", "with --gate score: those above it: a number, or otsu")
    budget: float = option(0.0, "H", "with --gate score: this share of the samples, in (0, 1]")
    uses_labels: bool = option(False, "H", "set by the program where a run reads labels")

    def __post_init__(self):
        super().__post_init__()
        if not self.gate:
            raise ValueError("--gate is needed: all, certain, random, oracle or score")
        if self.method == "base":
            raise ValueError("--method base: it adapts to nobody; use ttsi or ttd")
        if not 0 <= self.budget <= 1:
            raise ValueError(f"--budget {self.budget}: must be in (0, 1]")
        if self.budget and self.threshold != "otsu":
            raise ValueError("--budget and --threshold: choose one")
        if self.threshold != "otsu" and not is_number(self.threshold):
            raise ValueError(f"--threshold {self.threshold}: must be a number, or otsu")


def is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


# ---------------------------------------------------- the gates: H's lines -> who is let through

def by_margin(lines: Sequence[Assessed], tau: float) -> set[str]:
    """The paper's own gate: the ids with u(x) < tau."""
    return {line.id for line in lines if line.margin < tau}


def at_random(lines: Sequence[Assessed], count: int, seed: int) -> set[str]:
    """`count` ids. What a sample draws depends on the seed and its id alone."""
    def draw(line): return seeded(seed, line.id, "gate").initial_seed()
    return {line.id for line in sorted(lines, key=draw)[:count]}


def by_labels(lines: Sequence[Assessed], samples: Sequence[Sample]) -> set[str]:
    """The ids whose direct answer is wrong. The only gate that reads a label."""
    return {line.id for line, sample in zip(lines, samples)
            if not evaluate.exact_match(line.text, sample).exact}


def by_score(lines: Sequence[Assessed], config: GateConfig, tokenizer: Tokenizer) -> set[str]:
    """The ids above a threshold of the score. Who has no score (NaN) is above any."""
    found = scores_of(lines, tokenizer)
    if config.gate_score not in found:
        raise ValueError(f"--gate-score {config.gate_score}: H's lines do not hold what it needs; "
                         f"choose one of {', '.join(found)}")
    values = found[config.gate_score].tolist()
    if config.budget:
        threshold = threshold_between(values, round(config.budget * len(values)))
    else:
        threshold = otsu(values) if config.threshold == "otsu" else float(config.threshold)
    print(f"{config.gate_score}: the threshold is {threshold:.4g}")
    return {line.id for line, value in zip(lines, values) if not value <= threshold}


def let_through(lines: Sequence[Assessed], samples: Sequence[Sample], config: GateConfig,
                tokenizer: Tokenizer) -> set[str]:
    """The ids of those to adapt to. lines: of all samples, in their order."""
    everyone, unsure = {line.id for line in lines}, by_margin(lines, config.tau)
    if config.gate == "all":
        return everyone
    if config.gate == "certain":
        return everyone - unsure
    if config.gate == "random":
        return at_random(lines, len(unsure), config.seed)
    if config.gate == "oracle":
        return by_labels(lines, samples)
    return by_score(lines, config, tokenizer)


# ------------------------------------------------------------------------------------ the program

def assess_all(agent: Agent, samples: Sequence[Sample], config: GateConfig,
               kept: Kept) -> list[Assessed]:
    """H's lines of all samples, in their order."""
    seen, lines = [sample.without_answers() for sample in samples], {}
    for i in tqdm(range(0, len(seen), agent.batch), unit="batch", desc="H", dynamic_ncols=True):
        lines |= kept(train.H, seen[i:i + agent.batch], lambda xs: assess(agent, xs, config))
    return [lines[sample.id] for sample in samples]


def improve(agent: Agent, samples: Sequence[Sample], config: GateConfig, kept: Kept,
            through: set[str]) -> list[Outcome]:
    """Algorithm 1 with another line 4: `through` are the ids of those to adapt to."""
    h = kept(train.H, samples, lambda xs: assess(agent, xs, config))
    chosen = [x for x in samples if x.id in through]
    g = kept(train.G, chosen, lambda xs: synthesize(agent.writer, xs, h, config))
    able = [x for x in chosen if g[x.id].pairs]
    lessons = {x.id: lessons_of(x, g[x.id]) for x in able}
    t = kept(train.T, able, lambda xs: adapt(agent, xs, [lessons[x.id] for x in xs], config))
    return [Outcome(h[x.id], g.get(x.id), t.get(x.id)) for x in samples]


def mark(folder: Path, through: set[str]) -> None:
    """Write into a run's records what this gate decided, in place of what tau would have."""
    run = evaluate.read_run(folder)
    records = [replace(record, uncertain=record.id in through) for record in run.records]
    evaluate.write_run(folder, run.config, records)


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.choose(train.parse_args(argv, GateConfig, __doc__))
    config = replace(config, uses_labels=config.gate == "oracle")
    agent, samples = train.set_up(config)
    kept = Kept(config, agent.facts)
    lines = assess_all(agent, samples, config, kept)
    through = let_through(lines, samples, config, agent.tokenizer)
    code = train.run(agent, samples, config, kept, partial(improve, through=through))
    if (Path(config.out) / "records.jsonl").is_file():      # else another process is not done yet
        mark(Path(config.out), through)
    return code


if __name__ == "__main__":
    sys.exit(main())
