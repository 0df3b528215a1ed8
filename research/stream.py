"""What is the reset for? One adapter that learns on from sample to sample, beside Algorithm 1.

    python -m research.stream --reset never --bench toolalpaca      # --seed 1, --adapt suffix, ...

With --reset never, the first uncertain sample's adapter is kept: each later one starts from it, and
from then on it answers every sample, the certain ones too. --reset sample is Algorithm 1 again. T
is not kept, since what an adapter knows depends on all the samples before: a run that was stopped
trains from its first sample on. The answer stands in research/RESULTS.md, "What is the reset for?".
"""
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import train
from augment import synthesize
from data import Sample, call_prompt
from lora import Params, adapters, new_params
from model import generate, seeded
from train import (Adapted, Agent, Kept, Lesson, Outcome, acted_on, adapt_batch, before_them,
                   lessons_of, option)


@dataclass(frozen=True)
class StreamConfig(train.Config):
    method: str = option("ttsi", train.RUN, "who writes the pairs", "ttsi", "ttd")
    reset: str = option("sample", "T", "sample: an adapter for each (Algorithm 1); never: one for "
                        "all, which learns on and on", "sample", "never")


# What the other files here share.

def answered(sample: Sample, text: str, tokens: int = 0) -> Adapted:
    """A line of T for an answer that nothing was trained for."""
    return Adapted(sample.id, [], [], True, text, trained_tokens=0, answer_tokens=tokens)


def answer_with(agent: Agent, samples: Sequence[Sample], params: Params, config: train.Config,
                chats: dict[str, list[dict]] | None = None) -> list[Adapted]:
    """The answers of one adapter, or of none ({}), to the usual prompts or to `chats`, by id."""
    chats = chats or {x.id: call_prompt(x) for x in samples}
    asked = [acted_on(agent, chats[x.id], config) for x in samples]
    cache = before_them(agent, [chats[x.id] for x in samples], config)
    with adapters(agent.model, params, config.alpha):
        answers = generate(agent.model, asked, agent.tokenizer.eos, config.max_new_tokens, cache)
    return [answered(x, agent.tokenizer.decode(answer.ids), len(answer.ids))
            for x, answer in zip(samples, answers)]


def fresh(agent: Agent, name: str, config: train.Config) -> Params:
    """A batch of one adapter that has learnt nothing."""
    return new_params(agent.model, config.rank, [seeded(config.seed, name, "lora")])


@dataclass
class Looked(Adapted):
    """A line of T with what was seen of the adapter before the reset; {} if it is not finite."""
    seen: dict = field(default_factory=dict)


def adapt_with(agent: Agent, sample: Sample, lessons: Sequence[Lesson], config: train.Config,
               params: Params | None = None, look: Callable | None = None) -> Looked:
    """The line of T of one sample; `params`, or a fresh adapter, learns the lessons. look: gives
    what is seen of (sample, params) afterwards."""
    params = params or fresh(agent, sample.id, config)
    line, = adapt_batch(agent, [sample], [lessons], config, params)
    return Looked(**vars(line), seen=look(sample, params) if look and line.finite else {})


# ------------------------------------------------------------------------------------ the program

def copy_of(params: Params) -> Params:
    """The same adapter, to be trained on while this one stays as it is."""
    return {name: tuple(t.detach().clone().requires_grad_() for t in pair)
            for name, pair in params.items()}


def improve(agent: Agent, samples: Sequence[Sample], config: StreamConfig, kept: Kept,
            stream: Params) -> list[Outcome]:
    """Algorithm 1, but for its last line. `stream` is the adapter so far, {} before the first."""
    h = kept(train.H, samples, lambda xs: train.assess(agent, xs, config))
    unsure = [x for x in samples if h[x.id].margin < config.tau]
    g = kept(train.G, unsure, lambda xs: synthesize(agent.writer, xs, h, config))
    outcomes = []
    for x in samples:                               # in their order, whatever the batch
        found, line, start = g.get(x.id), None, time.perf_counter()
        if found and found.pairs:
            name = "stream" if config.reset == "never" else x.id
            params = copy_of(stream) or fresh(agent, name, config)
            line = adapt_with(agent, x, lessons_of(x, found), config, params)
            if line.finite and config.reset == "never":
                stream.update(params)
        elif stream:
            line, = answer_with(agent, [x], stream, config)
        if line:
            line.seconds = round(time.perf_counter() - start, 4)
        outcomes.append(Outcome(h[x.id], found, line))
    return outcomes


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.choose(train.parse_args(argv, StreamConfig, __doc__))
    if config.reset == "never" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--reset never: one adapter learns in one process")
    agent, samples = train.set_up(config)
    kept = Kept(config, agent.facts)
    return train.run(agent, samples, config, kept, partial(improve, stream={}))


if __name__ == "__main__":
    sys.exit(main())
