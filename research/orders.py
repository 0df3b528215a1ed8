"""Does the order of the tools change what the model is sure of? The passes of mutual information.

    python -m research.orders --orders 4 --bench toolalpaca
    python -m research.scores runs/toolalpaca-tiny-orders-s0

It scores each sample's candidates under several orders of its tools, the sample's own first, and
puts the l_n into a record's extra["orders"], from which research/scores.py makes mutual information
(BALD: Houlsby et al. 2011). The answer stands in research/RESULTS.md, "Which uncertainty?".
"""
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import train
from data import Sample, call_prompt
from model import seeded
from train import Agent, Assessed, Kept, Outcome, Stage, option
from uncertainty import answer_start, score_candidates


@dataclass(frozen=True)
class OrdersConfig(train.Config):
    """train.py's options, and how many orders there are."""
    orders: int = option(4, "H", "orders of the tools that are scored")


@dataclass
class Ordered:
    """The candidates' scores of one sample under M orders."""
    id: str
    orders: list[list[float]]           # (M, N) l_n, nats, in the order of the sample's own tools
    seconds: float = 0.0


def reorder(agent: Agent, sample: Sample, h: Assessed, config: OrdersConfig) -> Ordered:
    """l_n, after the same words, under up to --orders different orders. Lists of one length are
    shuffled alike, so equal ones share their caches."""
    n, rows = len(sample.tools), []
    draw, orders = seeded(config.seed, "order", n), [list(range(n))]
    while len(orders) < min(config.orders, math.factorial(n)):
        order = torch.randperm(n, generator=draw).tolist()
        if order not in orders:
            orders.append(order)
    for order in orders:
        shuffled = replace(sample, tools=tuple(sample.tools[i] for i in order))
        head, rest = agent.tokenizer.split_chat(call_prompt(shuffled))
        l = score_candidates(agent.model, agent.tokenizer, agent.prefixes.read(head), rest,
                             [tool["name"] for tool in shuffled.tools], answer_start(h.text))
        rows.append(l[torch.tensor(order).argsort()].tolist())
    return Ordered(sample.id, rows)


ORDERS = Stage("orders", Ordered, ("orders", "seed"), (reorder,), train.H)


def improve(agent: Agent, samples: Sequence[Sample], config: OrdersConfig,
            kept: Kept) -> list[Outcome]:
    """H, and its scores again under other orders."""
    h = kept(train.H, samples, lambda xs: train.assess(agent, xs, config))
    o = kept(ORDERS, samples, lambda xs: [reorder(agent, x, h[x.id], config) for x in xs])
    return [Outcome(h[x.id], extra={"orders": o[x.id].orders}) for x in samples]


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.choose(replace(train.parse_args(argv, OrdersConfig, __doc__), method="orders"))
    agent, samples = train.set_up(config)
    return train.run(agent, samples, config, Kept(config, agent.facts), improve)


if __name__ == "__main__":
    sys.exit(main())
