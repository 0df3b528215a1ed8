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
from dataclasses import dataclass, field, replace

if not __package__:
    print("Call it in the project's folder as: python -m research.orders", file=sys.stderr)
    sys.exit(2)

import torch

import train
from data.runs import Kept, Lines, stage
from model import seeded
from research.stream import Samples
from train import Agent, Outcome, assess, option
from uncertainty import score_candidates


@dataclass(frozen=True)
class OrdersConfig(train.Config):
    """train.py's options, and how many orders there are."""
    orders: int = option(4, "H", "orders of the tools that are scored")


@dataclass
class Ordered:
    """The candidates' scores of one sample under M orders."""
    id: str
    failed: str = ""
    orders: list[list[float]] = field(default_factory=list)     # (M, N) l_n, nats, in the order of
    seconds: float = 0.0                                        # the sample's own tools


@stage("orders", Ordered, "orders", "seed")
def reorder(agent: Agent, samples: Samples, config: OrdersConfig, h: Lines) -> list[Ordered]:
    """l_n of each sample, after the same words, under up to --orders different orders. Lists of one
    length are shuffled alike, so equal ones share their caches."""
    task, lines = agent.task, []
    for x in samples:
        n, rows = len(x.tools), []
        draw, orders = seeded(config.seed, "order", n), [list(range(n))]
        while len(orders) < min(config.orders, math.factorial(n)):
            order = torch.randperm(n, generator=draw).tolist()
            if order not in orders:
                orders.append(order)
        for order in orders:
            shuffled = replace(x, tools=tuple(x.tools[i] for i in order))
            chats = [task.prompt(shuffled)]
            (cache,), (rest,) = agent.prefixes.split(agent.tokenizer, chats, "suffix")
            l = score_candidates(agent.model, agent.tokenizer, cache, rest, task.actions(shuffled),
                                 task.answer_start(h[x.id].text), task.action_end)
            rows.append(l[torch.tensor(order).argsort()].tolist())
        lines.append(Ordered(x.id, orders=rows))
    return lines


def improve(samples: Samples, config: OrdersConfig, kept: Kept) -> list[Outcome]:
    """H, and its scores again under other orders."""
    h = kept(assess, samples)
    o = kept(reorder, [x for x in samples if not h[x.id].failed], h)
    extra = {id: {"orders": line.orders} for id, line in o.items()}
    return [Outcome(h[x.id], extra=extra.get(x.id, {})) for x in samples]


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.fill_in(replace(train.parse_args(argv, OrdersConfig, __doc__), method="orders"))
    agent, samples = train.set_up(config)
    return train.run(agent, samples, config, improve)


if __name__ == "__main__":
    sys.exit(main())
