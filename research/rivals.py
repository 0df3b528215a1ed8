"""Does anything cheaper do as well? The rivals of TT-SI, on the same samples and prompts.

    python -m research.rivals --rival vote --bench toolalpaca
    python -m research.rivals --rival sft --train-data FILE --bench sealtool
    python -m research.rivals --then-vote --bench toolalpaca            # what TT-SI and a vote do

--then-vote is no rival: after --method base, ttsi or ttd it samples answers of each sample's own
model, adapted or not. Sampled answers stand in a record's extra["sampled"], for votes and pass@k.
The answer stands in research/RESULTS.md, "Does anything cheaper do as well?".
"""
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import islice

import torch

import augment
import data
import train
from augment import LocalWriter, Prompt, Writer, check_text, in_form_of, stands_in, synthesize
from data import Sample, call_prompt, call_text, request_text, with_request
from data.calls import Call, parse_calls, required_arguments
from evaluate import Record, exact_match
from lora import Params, adapters
from model import seeded
from research import stream
from research.lessons import majority
from research.stream import Looked, adapt_with, answer_with, answered, fresh
from train import Adapted, Agent, Kept, Outcome, Stage, option
from uncertainty import PrefixCaches

RIVAL = "the rival"
ASK_AGAIN = ("You were not sure of this answer. Think again from the start, and answer with "
             "nothing but the tool calls that the request needs.")
LEAVE_OUT = "Leave out each argument that is not required and that the request says nothing of."


@dataclass(frozen=True)
class RivalConfig(train.Config):
    rival: str = option("", RIVAL, "vote, again, tticl (pairs as examples in the prompt): on "
                        "uncertain samples; retry: where the direct answer does not fit the tools; "
                        "prune: where it says what nobody said; told; icl, sft (one adapter), "
                        "from --train-data: on every sample",
                        "prune", "told", "vote", "retry", "again", "tticl", "icl", "sft")
    then_vote: bool = option(False, RIVAL, "Algorithm 1, and answers sampled from what it adapted")
    draws: int = option(5, RIVAL, "sampled answers for a sample")
    train_data: str = option("", RIVAL, "labelled samples in the benchmark's form")
    train_batch: int = option(8, RIVAL, "examples in a step of sft")

    def __post_init__(self):
        super().__post_init__()
        method = self.rival or self.method
        if (method in RIVALS) == self.then_vote:
            raise ValueError("choose a --rival, or --then-vote after --method base, ttsi or ttd")
        if (method in ("icl", "sft")) != bool(self.train_data):
            raise ValueError("--train-data and --rival icl or sft need each other")
        if min(self.draws, self.train_batch) < 1:
            raise ValueError("--draws and --train-batch: must be 1 or more")


Samples = Sequence[Sample]


def direct(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> tuple[dict, list]:
    """H, which every rival begins with, and who is uncertain."""
    h = kept(train.H, samples, lambda xs: train.assess(agent, xs, config))
    return h, [x for x in samples if h[x.id].margin < config.tau]


def outcomes(samples: Samples, h: dict, g: dict, t: dict, s: dict) -> list[Outcome]:
    """Each sample's lines of H, G and T, and its sampled answers, where it has them."""
    extra = {id: {"sampled": asdict(line)} for id, line in s.items()}
    return [Outcome(h[x.id], g.get(x.id), t.get(x.id), extra.get(x.id, {})) for x in samples]


def prune(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """The direct answer without its optional arguments whose value nobody spelled: what most pairs
    teach, as a rule and without a pass."""
    (h, _), t = direct(agent, samples, config, kept), {}
    for x in samples:
        dialogue = "\n".join(message["content"] for message in x.messages)
        required = {tool["name"]: required_arguments(tool) for tool in x.tools}
        calls, spoken = parse_calls(h[x.id].text).calls, []
        for call in calls:
            needed = required.get(call.name, call.arguments)
            spoken.append(Call(call.name, {
                key: value for key, value in call.arguments.items()
                if key in needed or stands_in(value, dialogue)}))
        if spoken != list(calls):
            t[x.id] = answered(x, in_form_of(h[x.id].text, spoken))
    return outcomes(samples, h, {}, t, {})


# --------------------------------------------------------------------------------- sampled answers

@dataclass
class Sampled:
    """The sampled answers of one sample."""
    id: str
    texts: list[str]
    seconds: float = 0.0


def draw(writer: Writer, samples: Samples, config: RivalConfig) -> list[Sampled]:
    """--draws sampled answers to the usual prompt, each from a generator of its own."""
    prompts = [Prompt(call_prompt(x)) for x in samples for _ in range(config.draws)]
    keys = [(config.seed, x.id, "sample", i) for x in samples for i in range(config.draws)]
    texts = iter(writer(prompts, config.max_new_tokens, config.temperature, config.top_p, keys))
    return [Sampled(x.id, list(islice(texts, config.draws))) for x in samples]


SAMPLED = Stage("S", Sampled, ("draws", "temperature", "top_p", "seed"), (augment, draw), train.H)


def sampled(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> dict[str, Sampled]:
    """`draw` from the base model, kept."""
    writer = LocalWriter(agent.model, agent.tokenizer, agent.prefixes)
    return kept(SAMPLED, samples, lambda xs: draw(writer, xs, config))


def vote(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """Self-consistency (Wang et al. 2023): the majority."""
    h, unsure = direct(agent, samples, config, kept)
    s = sampled(agent, unsure, config, kept)
    t = {x.id: answered(x, majority(s[x.id].texts, x)[0]) for x in unsure}
    return outcomes(samples, h, {}, t, s)


def retry(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """The first sampled answer that fits the tools, where the direct one does not."""
    h, _ = direct(agent, samples, config, kept)
    misfits, t = [x for x in samples if check_text(h[x.id].text, x)], {}
    s = sampled(agent, misfits, config, kept)
    for x in misfits:
        fitting = [text for text in s[x.id].texts if not check_text(text, x)]
        t[x.id] = answered(x, [*fitting, h[x.id].text][0])
    return outcomes(samples, h, {}, t, s)


def draw_adapted(agent: Agent, config: RivalConfig, sample: Sample, params: Params) -> dict:
    """A sample's sampled answers by the model with an adapter, and the seconds."""
    # what an adapter reads is not for theta_0; with suffix, theta_0 has read the tools for it
    prefixes = agent.prefixes if config.adapt == "suffix" else PrefixCaches(agent.model)
    start = time.perf_counter()
    with adapters(agent.model, params, config.alpha):
        line, = draw(LocalWriter(agent.model, agent.tokenizer, prefixes), [sample], config)
    return asdict(replace(line, seconds=time.perf_counter() - start))


VOTED = replace(train.T, line=Looked, reads=(*train.T.reads, *SAMPLED.reads),
                code=(*train.T.code, adapt_with, draw, draw_adapted))


def then_vote(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """Algorithm 1, and sampled answers of each sample's own model, adapted or not."""
    h, unsure = direct(agent, samples, config, kept)
    unsure = unsure if config.method != "base" else []
    g = kept(train.G, unsure, lambda xs: synthesize(agent.writer, xs, h, config))
    able = [x for x in unsure if g[x.id].pairs]
    lessons = {x.id: train.lessons_of(x, g[x.id]) for x in able}
    look = partial(draw_adapted, agent, config)
    t = kept(VOTED, able, lambda xs: [adapt_with(agent, x, lessons[x.id], config, look=look)
                                      for x in xs])
    s = {id: Sampled(**line.seen) for id, line in t.items() if line.seen}
    t |= {id: replace(t[id], seconds=t[id].seconds - s[id].seconds) for id in s}
    s |= sampled(agent, [x for x in samples if x.id not in s], config, kept)
    return outcomes(samples, h, g, t, s)


# ----------------------------------------------------------------------------------- other prompts

def with_examples(sample: Sample, examples: Sequence[tuple[Sample, str]]) -> list[dict]:
    """The sample's prompt with other requests and their answers as turns before its own. The tools
    of those are not shown."""
    system, *request = call_prompt(sample)
    turns = []
    for shown, text in examples:
        turns += [*call_prompt(shown)[1:], {"role": "assistant", "content": text}]
    return [system, *turns, *request]


def ask(agent: Agent, samples: Samples, chats: dict[str, list[dict]], config: RivalConfig,
        kept: Kept, after: Stage) -> dict[str, Adapted]:
    """The base model's greedy answers to other prompts than the usual ones, kept."""
    stage = Stage(config.method, Adapted, ("k", "seed", "split"), (sys.modules[__name__], stream),
                  after)
    suffix = replace(config, adapt="suffix")        # so they continue the tools' caches
    return kept(stage, samples, lambda xs: answer_with(agent, xs, {}, suffix, chats))


def again(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """The cheapest second look: it shows the model its direct answer, and asks once more."""
    (h, unsure), chats = direct(agent, samples, config, kept), {}
    for x in unsure:
        chats[x.id] = [*call_prompt(x), {"role": "assistant", "content": h[x.id].text},
                       {"role": "user", "content": ASK_AGAIN}]
    return outcomes(samples, h, {}, ask(agent, unsure, chats, config, kept, train.H), {})


def told(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """A sentence in the prompt says what most pairs teach."""
    (h, _), chats = direct(agent, samples, config, kept), {}
    for x in samples:
        *before, last = call_prompt(x)
        chats[x.id] = [*before, {**last, "content": f"{last['content']}\n\n{LEAVE_OUT}"}]
    return outcomes(samples, h, {}, ask(agent, samples, chats, config, kept, train.H), {})


def tticl(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """TT-ICL, the paper's variant of Algorithm 1 without training: pairs as examples."""
    (h, unsure), chats = direct(agent, samples, config, kept), {}
    g = kept(train.G, unsure, lambda xs: synthesize(agent.writer, xs, h, config))
    able = [x for x in unsure if g[x.id].pairs]
    for x in able:
        pairs = [(with_request(x, pair.request), pair.text) for pair in g[x.id].pairs]
        chats[x.id] = with_examples(x, pairs)
    return outcomes(samples, h, g, ask(agent, able, chats, config, kept, train.G), {})


def icl(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept,
        split: Samples) -> list[Outcome]:
    """K labelled examples of the training split, drawn for each sample."""
    (h, _), chats = direct(agent, samples, config, kept), {}
    for x in samples:
        order = torch.randperm(len(split), generator=seeded(config.seed, x.id, "icl")).tolist()
        examples = [split[i] for i in order[:config.k]]
        chats[x.id] = with_examples(x, [(one, call_text(one.answers)) for one in examples])
    return outcomes(samples, h, {}, ask(agent, samples, chats, config, kept, train.H), {})


# ------------------------------------------------------------------------------------- the program

def supervised(agent: Agent, split: Samples, config: RivalConfig) -> Params:
    """One adapter, trained on shuffled batches of the split. RuntimeError if it diverges."""
    examples, steps = [], []
    for x in split:
        answer = [*agent.tokenizer.encode(call_text(x.answers)), agent.tokenizer.im_end]
        examples.append((agent.tokenizer.chat(call_prompt(x)), answer))
    for epoch in range(config.epochs):
        order = torch.randperm(len(split), generator=seeded(config.seed, "sft", epoch))
        steps += order.split(config.train_batch)
    params = fresh(agent, "sft", config)
    agent.model.checkpointing = config.checkpointing
    with adapters(agent.model, params, config.alpha) as tensors:
        optimizer = torch.optim.AdamW(tensors, weight_decay=0.0)
        for step, batch in enumerate(steps):
            optimizer.zero_grad()
            own = [examples[i] for i in batch.tolist()]
            train.answer_loss(agent.model, own, None).mean().backward()
            torch.nn.utils.clip_grad_norm_(tensors, 1.0, error_if_nonfinite=True)
            optimizer.param_groups[0]["lr"] = config.lr * train.schedule(step, len(steps))
            optimizer.step()
    return params


def sft(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept, trained) -> list[Outcome]:
    """Answers of the one adapter, `trained()`. Its training counts as time of the first batch."""
    (h, _), full = direct(agent, samples, config, kept), replace(config, adapt="full")
    stage = replace(train.T, name="sft", reads=(*train.T.reads, "split", "train_batch", "seed"),
                    code=(*train.T.code, supervised, stream), after=train.H)
    t = kept(stage, samples, lambda xs: answer_with(agent, xs, trained(), full))
    return outcomes(samples, h, {}, t, {})


RIVALS = {"prune": prune, "told": told, "vote": vote, "retry": retry, "again": again,
          "tticl": tticl, "icl": icl, "sft": sft}


def judged(record: Record, samples: Samples, agent: Agent) -> Record:
    """The record with verdicts on sampled answers, for which this takes the label, and costs."""
    line = record.extra.get("sampled")
    if not line:
        return record
    sample = next(x for x in samples if x.id == record.id)
    tokens = sum(len(agent.tokenizer.encode(text)) for text in line["texts"])
    return replace(
        record, extra={"sampled": [asdict(exact_match(text, sample)) for text in line["texts"]]},
        seconds={**record.seconds, "sampled": line["seconds"]},
        tokens={**record.tokens, "sampled": tokens})


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.parse_args(argv, RivalConfig, __doc__)
    # a rival is a method: so it is called in config.json and in the run folder's name
    config = train.choose(replace(config, method=config.rival or config.method, rival=""))
    agent, tested = train.set_up(replace(config, limit=0))
    samples = tested[:config.limit or None]
    split = data.load(config.bench, config.train_data) if config.train_data else []
    agent.facts["split"] = hashlib.sha256(repr(split).encode()).hexdigest()
    if shared := {request_text(x) for x in split} & {request_text(x) for x in tested}:
        raise ValueError(f"--train-data: {len(shared)} of its requests are test samples")
    improve = then_vote if config.then_vote else RIVALS[config.method]
    if config.method == "icl":
        improve = partial(icl, split=split)
    if config.method == "sft":
        improve = partial(sft, trained=cache(partial(supervised, agent, split, config)))
    judge = partial(judged, samples=samples, agent=agent)
    return train.run(agent, samples, config, Kept(config, agent.facts), improve, judge)


if __name__ == "__main__":
    sys.exit(main())
