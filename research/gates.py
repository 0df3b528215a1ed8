"""Whom to adapt? Algorithm 1 with another gate than u(x) < tau.

    python -m research.gates --gate all --bench toolalpaca
    python -m research.gates --gate score --gate-score answer_nll --budget 0.3 --bench toolalpaca

all: every sample. certain: only those with u(x) >= tau. random: as many as are uncertain, drawn by
the seed. oracle: those whose direct answer is wrong, which uses labels. score: those above a
threshold of another score (research/scores.py). The answer stands in research/RESULTS.md, "Whom to
adapt?".
"""
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

if not __package__:
    print("Call it in the project's folder as: python -m research.gates", file=sys.stderr)
    sys.exit(2)

from tqdm import tqdm

import train
from augment import synthesize
from data.runs import Kept, Record
from evaluate import exact_match
from model import seeded
from research.scores import SCORES, otsu, scores_of, threshold_between
from research.stream import Samples
from train import Agent, Outcome, adapt, assess, option


@dataclass(frozen=True)
class GateConfig(train.Config):
    method: str = option("ttsi", train.RUN, "who writes the pairs", "ttsi", "ttd")
    gate: str = option("", "H", "who is adapted to", "all", "certain", "random", "oracle", "score")
    gate_score: str = option("margin", "H", "with --gate score: which (1 - u is 'margin')", *SCORES)
    threshold: str = option("otsu", "H", "those with a score above it: a number, or otsu, which "
                            "finds one without labels")
    budget: float = option(0.0, "H", "in place of --threshold: this share of the samples")
    uses_labels: bool = option(False, "H", "set by the program where a run reads labels")

    def __post_init__(self):
        super().__post_init__()
        if not self.gate:
            raise ValueError("--gate is needed: all, certain, random, oracle or score")
        if not 0 <= self.budget <= 1 or self.budget and self.threshold != "otsu":
            raise ValueError(f"--budget {self.budget}: must be in [0, 1], without --threshold")


def let_through(agent: Agent, samples: Samples, config: GateConfig, kept: Kept) -> set:
    """The ids of those to adapt to. A gate looks at H's lines of all samples, so H comes first; it
    lets none through whose H failed."""
    h, seen = {}, [replace(sample, answers=()) for sample in samples]
    for i in tqdm(range(0, len(seen), agent.batch), unit="batch", desc="H", dynamic_ncols=True):
        h |= kept(assess, seen[i:i + agent.batch])
    h = {id: line for id, line in h.items() if not line.failed}
    unsure = {id for id in h if h[id].margin < config.tau}
    if config.gate == "all" or not h:
        return set(h)
    if config.gate == "certain":
        return set(h) - unsure
    if config.gate == "random":                     # what an id draws depends on the seed alone
        def draw(id): return seeded(config.seed, id, "gate").initial_seed()
        return set(sorted(h, key=draw)[:len(unsure)])
    if config.gate == "oracle":                     # the only gate that reads a label
        return {x.id for x in samples if x.id in h and exact_match(h[x.id].text, x).exact is False}
    values = scores_of(list(h.values()), agent.tokenizer)[config.gate_score].tolist()
    if config.budget:
        threshold = threshold_between(values, round(config.budget * len(values)))
    else:
        threshold = otsu(values) if config.threshold == "otsu" else float(config.threshold)
    print(f"{config.gate_score}: the threshold is {threshold:.4g}")
    return {id for id, value in zip(h, values) if not value <= threshold}       # NaN is above any


def improve(samples: Samples, config: GateConfig, kept: Kept, through: set[str]) -> list[Outcome]:
    """Algorithm 1 with another line 4: `through` are the ids of those to adapt to."""
    h = kept(assess, samples)
    chosen = [x for x in samples if x.id in through and not h[x.id].failed]
    g = kept(synthesize, chosen, h)
    t = kept(adapt, [x for x in chosen if g[x.id].pairs], g, h)
    return [Outcome(h[x.id], g.get(x.id), t.get(x.id)) for x in samples]


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.fill_in(train.parse_args(argv, GateConfig, __doc__))
    config = replace(config, uses_labels=config.gate == "oracle")
    agent, samples = train.set_up(config)
    through = let_through(agent, samples, config, Kept(agent, config))

    def mark(record: Record) -> Record:             # by this gate, in place of tau
        return replace(record, uncertain=record.id in through)
    return train.run(agent, samples, config, partial(improve, through=through), mark)


if __name__ == "__main__":
    sys.exit(main())
