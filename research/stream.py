"""What is the reset for? One adapter that learns on from sample to sample, beside Algorithm 1.

    python -m research.stream --reset never --bench toolalpaca      # --seed 1, --adapt suffix, ...

With --reset never, the first uncertain sample's adapter is kept: each later one starts from it, and
from then on it answers every sample, the certain ones too. --reset sample is Algorithm 1 again. Its
T is kept; that of --reset never is not, since what an adapter knows depends on all the samples
before: a run that was stopped trains from its first sample on. The answer stands in
research/RESULTS.md, "What is the reset for?".
"""
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

if not __package__:
    print("Call it in the project's folder as: python -m research.stream", file=sys.stderr)
    sys.exit(2)

import train
from augment import Form, Found, Prompt, Writer, synthesize
from data import Sample, call_prompt, with_request
from data.runs import Kept, Lines, Missing, stage
from lora import Params, adapters, new_params
from model import generate, seeded
from train import Adapted, Agent, Lesson, Outcome, assess, learn, option

Samples = Sequence[Sample]


@dataclass(frozen=True)
class StreamConfig(train.Config):
    method: str = option("ttsi", train.RUN, "who writes the pairs", "ttsi", "ttd")
    reset: str = option("sample", "T", "sample: an adapter for each (Algorithm 1); never: one for "
                        "all, which learns on and on", "sample", "never")


# What the other files here share.

def answer_with(agent: Agent, samples: Samples, params: Params, config: train.Config,
                chats: Sequence[list[dict]] = ()) -> list[Adapted]:
    """The answers of one adapter, or of none ({}), to the usual prompts or to `chats`."""
    chats = chats or [call_prompt(x) for x in samples]
    caches, prompts = agent.prefixes.split(agent.tokenizer, chats, config.adapt)
    with adapters(agent.model, params, config.alpha):
        answers = generate(agent.model, agent.tokenizer, prompts, config.max_new_tokens, caches)
    return [Adapted(x.id, text=answer.text, ids=answer.ids)
            for x, answer in zip(samples, answers)]


def written(writer: Writer, samples: Samples, ask: str, starts: Sequence[str],
            forms: Iterable[Form], limit: int, attempt: int, config: train.Config,
            prompt: Callable[[Sample], list[dict]] = call_prompt) -> list[str]:
    """What the writer is asked for, once for each sample, drawn as augment.py does: `ask` takes the
    place of the request, behind the sample's system turn; the answer begins with start and form."""
    prompts, keys = [], []
    for x, start, form in zip(samples, starts, forms):
        chat = [prompt(x)[0], {"role": "user", "content": ask}]
        prompts.append(Prompt(chat, start, form))
        keys.append((config.seed, x.id, "pair", attempt))
    return writer(prompts, limit, config.temperature, config.top_p, keys)


def fresh(agent: Agent, name: str, config: train.Config) -> Params:
    """A batch of one adapter that has learnt nothing."""
    return new_params(agent.model, config.rank, [seeded(config.seed, name, "lora")])


def pairs_as_lessons(sample: Sample, found: Found) -> list[Lesson]:
    """Each pair that was written for a sample: its request x' and the calls y' to learn for it."""
    return [(with_request(sample, pair.request), pair.text) for pair in found.pairs]


@dataclass
class Looked(Adapted):
    """A line of T with what was seen of the adapter before the reset; {} if it is not finite."""
    seen: dict = field(default_factory=dict)


def adapt_with(agent: Agent, sample: Sample, lessons: Sequence[Lesson], config: train.Config,
               params: Params | None = None, look: Callable | None = None) -> Looked:
    """The line of T of one sample; `params`, or a fresh adapter, learns the lessons. look: gives
    what is seen of (agent, sample, params, config) afterwards."""
    params = params or fresh(agent, sample.id, config)
    line, = learn(agent, [sample], [lessons], config, params)
    is_seen = look and not line.failed
    return Looked(**vars(line), seen=look(agent, sample, params, config) if is_seen else {})


# ------------------------------------------------------------------------------------ the program

def copy_of(params: Params) -> Params:
    """The same adapter, to be trained on while this one stays as it is."""
    return {name: tuple(t.detach().clone().requires_grad_() for t in pair)
            for name, pair in params.items()}


@stage("stream", Adapted)
def learn_next(agent: Agent, samples: Samples, config: StreamConfig, g: Lines,
               stream: Params) -> list[Adapted]:
    """The answer of one sample after its pairs, if it has any, were learnt by `stream`."""
    x, = samples
    if x.id not in g or not g[x.id].pairs:
        return answer_with(agent, samples, stream, config)
    params = copy_of(stream) or fresh(agent, "stream", config)
    line = adapt_with(agent, x, pairs_as_lessons(x, g[x.id]), config, params)
    if not line.failed:
        stream.update(params)
    return [line]


def learn_on(samples: Samples, config: StreamConfig, kept: Kept, stream: Params) -> list[Outcome]:
    """Algorithm 1, but for its last line. `stream` is the adapter so far, {} before the first."""
    if not kept.computing:
        raise Missing(samples[0].id)                # T is not kept
    h = kept(assess, samples)
    g = kept(synthesize, [x for x in samples if h[x.id].margin < config.tau], h)
    outcomes = []
    for x in samples:                               # in their order, whatever the batch
        found, line = g.get(x.id), None
        if found and found.pairs or stream and not h[x.id].failed:
            line, = kept.compute(learn_next, [x], [g, stream])
        outcomes.append(Outcome(h[x.id], found, line))
    return outcomes


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.fill_in(train.parse_args(argv, StreamConfig, __doc__))
    if config.reset == "never" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--reset never: one adapter learns in one process")
    agent, samples = train.set_up(config)
    improve = partial(learn_on, stream={}) if config.reset == "never" else train.self_improve
    return train.run(agent, samples, config, improve)


if __name__ == "__main__":
    sys.exit(main())
