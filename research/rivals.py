"""Does anything cheaper do as well? The rivals of TT-SI, on the same samples and prompts.

    python -m research.rivals --rival vote --bench toolalpaca
    python -m research.rivals --rival sft --train-data FILE --bench sealtool
    python -m research.rivals --then-vote --bench toolalpaca            # what TT-SI and a vote do

--then-vote is no rival: after --method base, ttsi or ttd it samples answers of each sample's own
model, adapted or not. Sampled answers stand in a record's extra["sampled"], for votes and pass@k.
The answer stands in research/RESULTS.md, "Does anything cheaper do as well?".
"""
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice

if not __package__:
    print("Call it in the project's folder as: python -m research.rivals", file=sys.stderr)
    sys.exit(2)

import torch

import data
import train
from augment import stands_in, synthesize
from data import Sample, call_prompt, request_text
from data.calls import Call, call_text, parse_calls, required_arguments
from data.runs import Kept, Lines, Record, digest, stage
from evaluate import exact_match
from lora import Params, adapters
from model import KVCache, generate, seeded
from research.lessons import majority, valid
from research.stream import Looked, Samples, adapt_with, answer_with, fresh, pairs_as_lessons
from train import Adapted, Agent, Lesson, Outcome, adapt, answer_loss, assess, option, schedule

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
        if self.keep_adapters and self.rival:
            raise ValueError("--keep-adapters: a rival has no adapter for each sample")


def direct(samples: Samples, config: RivalConfig, kept: Kept) -> tuple[Lines, list, list]:
    """H, which every rival begins with, for whom it did not fail, and who of these is uncertain."""
    h = kept(assess, samples)
    there = [x for x in samples if not h[x.id].failed]
    return h, there, [x for x in there if h[x.id].margin < config.tau]


def outcomes(samples: Samples, h: dict, t: dict, g: dict, s: dict) -> list[Outcome]:
    """Each sample's lines of H, T and G, and its sampled answers, where it has them."""
    extra = {id: {"sampled": asdict(line)} for id, line in s.items()}
    return [Outcome(h[x.id], g.get(x.id), t.get(x.id), extra.get(x.id, {})) for x in samples]


def prune(samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """The direct answer without its optional arguments whose value nobody spelled: what most pairs
    teach, as a rule and without a pass."""
    (h, there, _), t = direct(samples, config, kept), {}
    for x in there:
        dialogue = "\n".join(message["content"] for message in x.messages)
        required = {tool["name"]: required_arguments(tool) for tool in x.tools}
        calls, spoken = parse_calls(h[x.id].text).calls, []
        for call in calls:
            needed = required.get(call.name, call.arguments)
            spoken.append(Call(call.name, {
                key: value for key, value in call.arguments.items()
                if key in needed or stands_in(value, dialogue)}))
        if spoken != list(calls):
            t[x.id] = Adapted(x.id, text=call_text(spoken, like=h[x.id].text))
    return outcomes(samples, h, t, {}, {})


# --------------------------------------------------------------------------------- sampled answers

@dataclass
class Sampled:
    """The sampled answers of one sample."""
    id: str
    failed: str = ""
    texts: list[str] = field(default_factory=list)
    seconds: float = 0.0


@stage("S", Sampled, *assess.stage.reads, "draws", "temperature", "top_p", "seed")
def draw(agent: Agent, samples: Samples, config: RivalConfig,
         read: tuple[list[KVCache], list[list[int]]] | None = None) -> list[Sampled]:
    """--draws sampled answers to the usual prompt, each from a generator of its own. read: what was
    read of each prompt and what was not, if adapters act on it."""
    chats = [call_prompt(x) for x in samples for _ in range(config.draws)]
    keys = [(config.seed, x.id, "sample", i) for x in samples for i in range(config.draws)]
    caches, last = read or agent.prefixes.split(agent.tokenizer, chats, "answer")
    rows = iter(generate(agent.model, agent.tokenizer, last, config.max_new_tokens, caches,
                         config.temperature, config.top_p, keys))
    return [Sampled(x.id, texts=[row.text for row in islice(rows, config.draws)]) for x in samples]


def vote(samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """Self-consistency (Wang et al. 2023): the majority."""
    (h, _, unsure), t = direct(samples, config, kept), {}
    s = kept(draw, unsure)
    for x in unsure:
        for text in majority(s[x.id].texts, x)[:1]:
            t[x.id] = Adapted(x.id, text=text)
    return outcomes(samples, h, t, {}, s)


def retry(samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """The first sampled answer that fits the tools, where the direct one does not."""
    (h, there, _), t = direct(samples, config, kept), {}
    misfits = [x for x in there if not valid([h[x.id].text], x)]
    s = kept(draw, misfits)
    for x in misfits:
        t[x.id] = Adapted(x.id, text=[*valid(s[x.id].texts, x), h[x.id].text][0])
    return outcomes(samples, h, t, {}, s)


def draw_adapted(agent: Agent, x: Sample, params: Params, config: RivalConfig) -> dict:
    """A sample's sampled answers by the model with an adapter, and the seconds."""
    start = time.perf_counter()
    caches, (rest,) = agent.prefixes.split(agent.tokenizer, [call_prompt(x)], config.adapt)
    cache = caches[0] if caches else KVCache()
    with adapters(agent.model, params, config.alpha), torch.no_grad():
        if rest[:-1]:                       # what the adapter acts on is read once for all draws
            agent.model([rest[:-1]], cache)
        line, = draw(agent, [x], config, ([cache] * config.draws, [rest[-1:]] * config.draws))
    return asdict(replace(line, seconds=time.perf_counter() - start))


@stage("T+S", Looked, *adapt.stage.reads, *draw.stage.reads, adapters=True)
def adapt_and_draw(agent: Agent, samples: Samples, config: RivalConfig, g: Lines) -> list[Looked]:
    """T of the first sample, and sampled answers of its adapted model."""
    lessons = pairs_as_lessons(samples[0], g[samples[0].id])
    return [adapt_with(agent, samples[0], lessons, config, look=draw_adapted)]


def then_vote(samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """Algorithm 1, and sampled answers of each sample's own model, adapted or not."""
    h, there, unsure = direct(samples, config, kept)
    if config.method == "base":
        unsure = []
    g = kept(synthesize, unsure, h)
    t = kept(adapt_and_draw, [x for x in unsure if g[x.id].pairs], g)
    s = {id: Sampled(**line.seen) for id, line in t.items() if line.seen}
    for id in s:
        t[id] = replace(t[id], seconds=t[id].seconds - s[id].seconds)
    s |= kept(draw, [x for x in there if x.id not in s])
    return outcomes(samples, h, t, g, s)


# ----------------------------------------------------------------------------------- other prompts

def answer_chats(agent: Agent, samples: Samples, config: RivalConfig,
                 chats: Sequence[list[dict]]) -> list[Adapted]:
    """The base model's greedy answers to other prompts; they continue the tools' caches."""
    return answer_with(agent, samples, {}, replace(config, adapt="suffix"), chats)


def with_examples(x: Sample, examples: Sequence[Lesson]) -> list[dict]:
    """The sample's prompt with other requests and their answers as turns before its own. The tools
    of those are not shown."""
    system, *request = call_prompt(x)
    turns = []
    for shown, text in examples:
        turns += [*call_prompt(shown)[1:], {"role": "assistant", "content": text}]
    return [system, *turns, *request]


@stage("again", Adapted)
def answer_again(agent: Agent, samples: Samples, config: RivalConfig, h: Lines) -> list[Adapted]:
    """The answers after the direct one was shown."""
    chats = []
    for x in samples:
        chats.append([*call_prompt(x), {"role": "assistant", "content": h[x.id].text},
                      {"role": "user", "content": ASK_AGAIN}])
    return answer_chats(agent, samples, config, chats)


def again(samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """The cheapest second look: it shows the model its direct answer, and asks once more."""
    h, _, unsure = direct(samples, config, kept)
    return outcomes(samples, h, kept(answer_again, unsure, h), {}, {})


@stage("told", Adapted, *assess.stage.reads)
def answer_told(agent: Agent, samples: Samples, config: RivalConfig) -> list[Adapted]:
    """The answers where a sentence in the prompt says what most pairs teach."""
    chats = []
    for x in samples:
        *before, last = call_prompt(x)
        chats.append([*before, {**last, "content": f"{last['content']}\n\n{LEAVE_OUT}"}])
    return answer_chats(agent, samples, config, chats)


@stage("tticl", Adapted)
def answer_after_pairs(agent: Agent, samples: Samples, config: RivalConfig,
                       g: Lines) -> list[Adapted]:
    """The answers after each sample's own pairs."""
    chats = [with_examples(x, pairs_as_lessons(x, g[x.id])) for x in samples]
    return answer_chats(agent, samples, config, chats)


def tticl(samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """TT-ICL, the paper's variant of Algorithm 1 without training: pairs as examples."""
    h, _, unsure = direct(samples, config, kept)
    g = kept(synthesize, unsure, h)
    t = kept(answer_after_pairs, [x for x in unsure if g[x.id].pairs], g)
    return outcomes(samples, h, t, g, {})


# ------------------------------------------------------------------------------ the training split

class Split(Lines):
    """The labelled samples of --train-data by id, and the adapter that learnt them, once it did."""
    adapter: Params | None = None


@stage("icl", Adapted, *assess.stage.reads, "k", "seed", "split")
def answer_after_examples(agent: Agent, samples: Samples, config: RivalConfig,
                          split: Split) -> list[Adapted]:
    """The answers after K labelled examples of the split, drawn for each sample."""
    labelled, chats = list(split.values()), []
    for x in samples:
        order = torch.randperm(len(split), generator=seeded(config.seed, x.id, "icl")).tolist()
        drawn = [labelled[i] for i in order[:config.k]]
        chats.append(with_examples(x, [(one, call_text(one.answers)) for one in drawn]))
    return answer_chats(agent, samples, config, chats)


def supervised(agent: Agent, split: Samples, config: RivalConfig) -> Params:
    """One adapter, trained on shuffled batches of the split. RuntimeError if it diverges."""
    examples, steps = [], []
    for x in split:
        system, rest = agent.tokenizer.chat(call_prompt(x))
        answer = [*agent.tokenizer.encode(call_text(x.answers)), agent.tokenizer.im_end]
        examples.append((system + rest, answer))
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
            answer_loss(agent.model, own, []).mean().backward()
            torch.nn.utils.clip_grad_norm_(tensors, 1.0, error_if_nonfinite=True)
            optimizer.param_groups[0]["lr"] = config.lr * schedule(step, len(steps))
            optimizer.step()
    return params


@stage("sft", Adapted, *assess.stage.reads, "rank", "alpha", "epochs", "lr", "train_batch", "seed",
       "split")
def answer_supervised(agent: Agent, samples: Samples, config: RivalConfig,
                      split: Split) -> list[Adapted]:
    """The answers of the one adapter. Its training counts as time of the first batch."""
    if split.adapter is None:
        try:
            split.adapter = supervised(agent, list(split.values()), config)
        except (OverflowError, torch.OutOfMemoryError) as error:    # it is not these samples'
            raise ValueError(f"--train-data: {error}") from error
    return answer_with(agent, samples, split.adapter, replace(config, adapt="full"))


# ------------------------------------------------------------------------------------- the program

def for_all(samples: Samples, config: RivalConfig, kept: Kept, answer: Callable,
            seen: Sequence[Lines] = ()) -> list[Outcome]:
    """The answers of a stage to every sample, in place of the direct ones."""
    h, there, _ = direct(samples, config, kept)
    return outcomes(samples, h, kept(answer, there, *seen), {}, {})


RIVALS = {"prune": prune, "told": partial(for_all, answer=answer_told), "vote": vote,
          "retry": retry, "again": again, "tticl": tticl,
          "icl": partial(for_all, answer=answer_after_examples),
          "sft": partial(for_all, answer=answer_supervised)}


def judged(record: Record, samples: dict[str, Sample]) -> Record:
    """The record with verdicts on sampled answers, for which this takes the label, and costs."""
    line = record.extra.get("sampled")
    if not line:
        return record
    verdicts = [asdict(exact_match(text, samples[record.id])) for text in line["texts"]]
    return replace(record, extra={"sampled": verdicts},
                   seconds={**record.seconds, "sampled": line["seconds"]})


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.parse_args(argv, RivalConfig, __doc__)
    # a rival is a method: so it is called in config.json and in the run folder's name
    config = train.fill_in(replace(config, method=config.rival or config.method, rival=""))
    agent, samples = train.set_up(config)
    split = data.load(config.bench, config.train_data) if config.train_data else []
    tested = data.load(config.bench, config.data, config.offline)       # with those past --limit
    if shared := {request_text(x) for x in split} & {request_text(x) for x in tested}:
        raise ValueError(f"--train-data: {len(shared)} of its requests are test samples")
    agent.facts["split"] = digest(split)
    improve = then_vote if config.then_vote else RIVALS[config.method]
    if config.train_data:
        improve = partial(improve, seen=[Split({x.id: x for x in split})])
    judge = partial(judged, samples={x.id: x for x in samples})
    return train.run(agent, samples, config, improve, judge)


if __name__ == "__main__":
    sys.exit(main())
