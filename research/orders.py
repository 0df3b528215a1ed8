"""Does the order of the tools change what the model is sure of? The passes of mutual information.

    python -m research.orders --orders 8 --bench toolalpaca         # with tables of u
    python -m research.orders --orders 4 --average --bench toolalpaca
    python -m research.scores runs/toolalpaca-tiny-orders-orders=8-s0

It scores each sample's candidates under several orders of its tools, the sample's own first, and
puts the l_n into a record's extra["orders"], from which research/scores.py makes mutual information
(BALD: Houlsby et al. 2011). Its tables say how u from p averaged over some of the orders ranks the
wrong answers, and how two such draws agree. With --average that p is Algorithm 1's: it gates by it,
and pairs are of the tool that it finds likeliest. The answer stands in research/RESULTS.md, "Which
uncertainty?".
"""
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

if not __package__:
    print("Call it in the project's folder as: python -m research.orders", file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
from scipy.special import softmax

import train
from augment import synthesize
from data.runs import Kept, Lines, Record, read_run, run_folder, stage
from model import seeded
from research.scores import areas, show
from research.stream import Samples
from train import Agent, Outcome, adapt, assess, option
from uncertainty import score_candidates, softmax_difference


@dataclass(frozen=True)
class OrdersConfig(train.Config):
    """train.py's options, and how many orders there are."""
    orders: int = option(4, "H", "orders of the tools that are scored")
    average: bool = option(False, "H", "Algorithm 1 by p averaged over these orders")


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


def mean_p(orders: Sequence[Sequence[float]]) -> torch.Tensor:
    """The mean of p over orders of l_n (M, N), nats; (N,)."""
    return torch.tensor(softmax(np.array(orders), axis=1).mean(0))


def averaged(h: Lines, o: Lines) -> Lines:
    """The lines of H with log p, averaged over the orders, in place of l_n, and its u."""
    lines = Lines(h)
    for id, line in o.items():
        p = mean_p(line.orders).clamp(min=1e-300)       # its log is kept
        lines[id] = replace(h[id], margin=softmax_difference(p.log()),
                            candidates=dict(zip(h[id].candidates, p.log().tolist())))
    lines.key = o.key                               # which holds H's
    return lines


def improve(samples: Samples, config: OrdersConfig, kept: Kept) -> list[Outcome]:
    """H, and its scores again under other orders; with --average Algorithm 1 by both."""
    h, g, t = kept(assess, samples), {}, {}
    o = kept(reorder, [x for x in samples if not h[x.id].failed], h)
    extra = {id: {"orders": line.orders} for id, line in o.items()}
    if config.average:
        h = averaged(h, o)
        g = kept(synthesize, [x for x in samples if h[x.id].margin < config.tau], h)
        t = kept(adapt, [x for x in samples if x.id in g and g[x.id].pairs], g, h)
    return [Outcome(h[x.id], g.get(x.id), t.get(x.id), extra.get(x.id, {})) for x in samples]


def tables(records: Sequence[Record]) -> dict[str, list[dict]]:
    """Of the records that have all M orders and a gold answer, for 1, 2, 4, ... orders that are
    averaged: how many are below tau = 0.95, the AUROC of 1 - u for a wrong name and a wrong answer,
    and how u and the likeliest tool agree between two draws of as many orders each."""
    most = max([len(r.extra.get("orders", ())) for r in records], default=0)
    records = [r for r in records if len(r.extra.get("orders", ())) == most > 1
               and r.base.exact is not None]
    wrong = {"name": np.array([not r.base.measures.get("name_correct") for r in records]),
             "answer": np.array([not r.base.exact for r in records])}
    rows, count = [], 1
    while records and count <= most:
        row, draws = {"orders": count, "n": len(records)}, []
        for begin in (0, count):                    # the first draw, and another without its orders
            ps = [mean_p(r.extra["orders"][begin:begin + count]) for r in records
                  if begin + count <= most]
            draws.append((np.array([softmax_difference(p.log()) for p in ps]),
                          np.array([int(p.argmax()) for p in ps])))
        (u, best), (other_u, other_best) = draws
        row["uncertain"] = int((u < 0.95).sum())
        for what, errors in wrong.items():
            row[f"AUROC, wrong {what}"] = float(areas(1 - u, errors)["AUROC"])
        if len(other_u) and u.std() and other_u.std():
            row["correlation of u"] = float(np.corrcoef(u, other_u)[0, 1])
            row["same likeliest tool"] = float((best == other_best).mean())
        rows.append(row)
        count *= 2
    return {"u from p averaged over orders": rows}


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.fill_in(replace(train.parse_args(argv, OrdersConfig, __doc__), method="orders"))
    agent, samples = train.set_up(config)
    code = train.run(agent, samples, config, improve)
    folder = Path(run_folder(config, agent.facts))
    if (folder / "records.jsonl").is_file():
        show(tables(read_run(folder).records))
    return code


if __name__ == "__main__":
    sys.exit(main())
