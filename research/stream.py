"""What is the reset for? One adapter that learns on from sample to sample, beside Algorithm 1.

    python -m research.stream --reset never --bench toolalpaca      # --seed 1, --adapt suffix, ...

With --reset never, the first uncertain sample's adapter is kept: each later one starts from it, and
from then on it answers every sample, the certain ones too. --reset sample is Algorithm 1 again, and
finds what train.py finds. H and G are kept as ever. T is not: what a sample's adapter knows depends
on all the samples before it, so a run that was stopped trains from its first sample on. The answer
stands in research/RESULTS.md, "What is the reset for?".
"""
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import train
from augment import synthesize
from data import Sample, call_prompt
from lora import Params, adapters, new_params
from model import generate, seeded
from train import Adapted, Agent, Kept, Lesson, Outcome, begin, fine_tune, lessons_of, option


@dataclass(frozen=True)
class StreamConfig(train.Config):
    """train.py's options, and one more."""
    reset: str = option("sample", "T", "sample: an adapter for each (Algorithm 1); never: one for "
                        "all, which learns on and on", "sample", "never")


# What train.adapt_batch does, in parts, for an adapter that the caller holds. Others here use them.

def answered(sample: Sample, text: str, tokens: int = 0) -> Adapted:
    """A line of T for an answer that nothing was trained for."""
    return Adapted(id=sample.id, losses=[], norms=[], finite=True, text=text, trained_tokens=0,
                   answer_tokens=tokens)


def answer_with(agent: Agent, samples: Sequence[Sample], params: Params, config: train.Config,
                chats: Sequence[list[dict]] = ()) -> list[Adapted]:
    """The answers of B samples by B adapters, or by one for all, or by none ({}). chats: the
    prompts, where they are not the usual ones."""
    chats = chats or [call_prompt(sample) for sample in samples]
    asked, cache = begin(agent, chats, config)
    with adapters(agent.model, params, config.alpha):
        answers = generate(agent.model, asked, agent.tokenizer.eos, config.max_new_tokens, cache)
    return [answered(sample, agent.tokenizer.decode(answer.ids), len(answer.ids))
            for sample, answer in zip(samples, answers)]


def adapt_with(agent: Agent, sample: Sample, lessons: Sequence[Lesson], params: Params,
               config: train.Config) -> Adapted:
    """The line of T of one sample; `params`, a batch of one adapter, learns the lessons."""
    prompts, _ = begin(agent, [messages for messages, _ in lessons], config)
    _, tools = begin(agent, [lessons[0][0]], config)
    texts = [[*agent.tokenizer.encode(text), agent.tokenizer.im_end] for _, text in lessons]
    examples = [list(zip(prompts, texts))]
    with adapters(agent.model, params, config.alpha) as tensors:
        (loss,), (norm,) = fine_tune(agent.model, examples, tensors, config, tools)
    line, = answer_with(agent, [sample], params, config)
    line.losses, line.norms = [list(takewhile(math.isfinite, values)) for values in (loss, norm)]
    line.finite = all(map(math.isfinite, loss + norm))
    line.trained_tokens = config.epochs * sum(map(len, prompts + texts))
    return line


def one_by_one(samples: Sequence[Sample], work: Callable[[Sample], Adapted]) -> list[Adapted]:
    """The lines of work(sample); none for a sample that does not fit the memory."""
    lines = []
    for sample in samples:
        try:
            lines.append(work(sample))
        except RuntimeError as error:
            if not train.out_of_memory(error):
                raise
    return lines


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
        found, start, lines = g.get(x.id), time.perf_counter(), []
        if found and found.pairs:
            name = "stream" if config.reset == "never" else x.id
            fresh = new_params(agent.model, config.rank, [seeded(config.seed, name, "lora")])
            params = copy_of(stream) if stream else fresh
            lessons = lessons_of(x, found)
            lines = one_by_one([x], lambda x: adapt_with(agent, x, lessons, params, config))
            if lines and lines[0].finite and config.reset == "never":
                stream.update(params)
        elif stream:
            lines = answer_with(agent, [x], stream, config)
        for line in lines:
            line.seconds = round(time.perf_counter() - start, 4)
        outcomes.append(Outcome(h[x.id], found, *lines))
    return outcomes


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.choose(train.parse_args(argv, StreamConfig, __doc__))
    if config.method == "base":
        raise ValueError("--method base: there is nothing to learn from; use ttsi or ttd")
    if config.reset == "never" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--reset never: one adapter learns in one process")
    agent, samples = train.set_up(config)
    kept = Kept(config, agent.facts)
    return train.run(agent, samples, config, kept, partial(improve, stream={}))


if __name__ == "__main__":
    sys.exit(main())
