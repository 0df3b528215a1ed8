"""Does anything cheaper do as well? The rivals of TT-SI, on the same samples and prompts.

    python -m research.rivals --rival vote --bench toolalpaca           # --all: however sure
    python -m research.rivals --rival sft --train-data FILE --merged my-model --bench sealtool
    python -m research.rivals --then-vote --bench toolalpaca            # what TT-SI and a vote do

On uncertain samples, or with --all on every one: vote: the majority of sampled answers; again: the
direct answer is shown to the model, which is asked once more; tticl: G as in TT-SI, but the pairs
go into the prompt as examples. On samples whose direct answer does not fit the tools: retry: the
first sampled answer that does. On every sample, from --train-data: icl: K examples in the prompt;
sft: one adapter, trained once. --then-vote is no rival: after --method base, ttsi or ttd it samples
answers of each sample's own model, adapted or not. Sampled answers stand in a record's
extra["sampled"], for votes and pass@k. The answer stands in research/RESULTS.md, "Does anything
cheaper do as well?".
"""
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import augment
import data
import evaluate
import lora
import train
from augment import LocalWriter, Prompt, Writer, check_text, synthesize
from data import Sample, call_prompt, call_text, with_request
from lora import Params, adapters, load_adapter, new_params, save_adapter
from model import find_checkpoint, seeded
from research.lessons import benchmark, majority
from research.stream import adapt_with, answer_with, answered, one_by_one
from train import Adapted, Agent, Assessed, Kept, Lesson, Outcome, Stage, option
from uncertainty import PrefixCaches

RIVAL = "the rival"
ASK_AGAIN = ("You were not sure of this answer. Think again from the start, and answer with "
             "nothing but the tool calls that the request needs.")


@dataclass(frozen=True)
class RivalConfig(train.Config):
    """train.py's options, and those of the rivals."""
    rival: str = option("", RIVAL, "what is done in place of Algorithm 1",
                        "vote", "retry", "again", "tticl", "icl", "sft")
    then_vote: bool = option(False, RIVAL, "Algorithm 1, and answers sampled from what it adapted")
    all: bool = option(False, RIVAL, "vote, again and tticl act on every sample, however sure")
    draws: int = option(5, RIVAL, "sampled answers for a sample")
    train_data: str = option("", RIVAL, "for icl and sft: a file of labelled samples, in the "
                             "benchmark's form, none of which is a test sample")
    train_batch: int = option(8, RIVAL, "examples in a step of sft")
    merged: str = option("", RIVAL, "sft: a folder for the trained checkpoint, for --model")

    def __post_init__(self):
        super().__post_init__()
        method = self.rival or self.method
        if (method in RIVALS) == self.then_vote:
            raise ValueError("choose a --rival, or --then-vote after --method base, ttsi or ttd")
        if (method in ("icl", "sft")) != bool(self.train_data):
            raise ValueError("--train-data and --rival icl or sft need each other")
        if self.merged and method != "sft":
            raise ValueError(f"--merged {self.merged}: only --rival sft trains for all samples")
        if min(self.draws, self.train_batch) < 1:
            raise ValueError("--draws and --train-batch: must be 1 or more")


Samples = Sequence[Sample]


def direct(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> dict[str, Assessed]:
    """H, which every rival begins with."""
    return kept(train.H, samples, lambda xs: train.assess(agent, xs, config))


def uncertain(samples: Samples, h: dict[str, Assessed], config: RivalConfig) -> list[Sample]:
    """Whom vote, again, tticl and --then-vote act on."""
    return [x for x in samples if config.all or h[x.id].margin < config.tau]


# --------------------------------------------------------------------------------- sampled answers

@dataclass
class Sampled:
    """The sampled answers of one sample."""
    id: str
    texts: list[str]
    seconds: float = 0.0


def draw(writer: Writer, samples: Samples, config: RivalConfig) -> list[Sampled]:
    """--draws sampled answers to the usual prompt, each from a generator of its own."""
    prompts = [Prompt(call_prompt(x)) for x in samples]
    keys = [[(config.seed, x.id, "sample", i) for i in range(config.draws)] for x in samples]
    texts = writer(prompts, config.max_new_tokens, config.temperature, config.top_p, keys)
    return [Sampled(x.id, own) for x, own in zip(samples, texts)]


SAMPLED = Stage("S", Sampled, ("draws", "temperature", "top_p", "seed"), (augment, draw), train.H)


def sampled(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> dict[str, Sampled]:
    """`draw` from the base model, kept."""
    writer = LocalWriter(agent.model, agent.tokenizer, agent.prefixes)
    return kept(SAMPLED, samples, lambda xs: draw(writer, xs, config))


def vote(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """Self-consistency (Wang et al. 2023)."""
    h, outcomes = direct(agent, samples, config, kept), []
    s = sampled(agent, uncertain(samples, h, config), config, kept)
    for x in samples:
        t = answered(x, majority(s[x.id].texts, x)[0]) if x.id in s else None
        outcomes.append(Outcome(h[x.id], None, t, extra_of(s.get(x.id))))
    return outcomes


def retry(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """The first answer that passes the check which a pair must pass: the direct one, then the
    sampled ones; the direct one if none does."""
    h, outcomes = direct(agent, samples, config, kept), []
    s = sampled(agent, [x for x in samples if check_text(h[x.id].text, x)], config, kept)
    for x in samples:
        fitting = [text for text in s[x.id].texts if not check_text(text, x)] if x.id in s else []
        t = answered(x, [*fitting, h[x.id].text][0]) if x.id in s else None
        outcomes.append(Outcome(h[x.id], None, t, extra_of(s.get(x.id))))
    return outcomes


def extra_of(line: Sampled | None) -> dict:
    return {"sampled": asdict(line)} if line else {}


def score_sampled(folder: Path, samples: Samples, agent: Agent) -> None:
    """Replace the sampled answers in a run's records by verdicts on them, for which it takes the
    labels, and add what they cost."""
    run, labelled, records = evaluate.read_run(folder), {x.id: x for x in samples}, []
    for record in run.records:
        line = record.extra.get("sampled")
        if isinstance(line, dict):
            verdicts = [evaluate.exact_match(text, labelled[record.id]) for text in line["texts"]]
            tokens = sum(len(agent.tokenizer.encode(text)) for text in line["texts"])
            record = replace(record, extra={"sampled": [asdict(verdict) for verdict in verdicts]},
                             seconds={**record.seconds, "sampled": line["seconds"]},
                             tokens={**record.tokens, "sampled": tokens})
        records.append(record)
    evaluate.write_run(folder, run.config, records)


# ----------------------------------------------------------------------------------- other prompts

def with_examples(sample: Sample, examples: Sequence[tuple[Sample, str]]) -> list[dict]:
    """The sample's prompt with other requests and their answers as turns before its own. The tools
    of those are not shown."""
    system, *request = call_prompt(sample)
    turns = []
    for shown, text in examples:
        turns += [*call_prompt(shown)[1:], {"role": "assistant", "content": text}]
    return [system, *turns, *request]


def shown_again(sample: Sample, text: str) -> list[dict]:
    """The sample's prompt, this answer, and the request to think again."""
    return [*call_prompt(sample), {"role": "assistant", "content": text},
            {"role": "user", "content": ASK_AGAIN}]


def ask(agent: Agent, samples: Samples, chats: dict[str, list[dict]],
        config: RivalConfig) -> list[Adapted]:
    """The base model's greedy answers to other prompts than the usual ones."""
    config = replace(config, adapt="suffix")        # so they continue the tools' caches
    return answer_with(agent, samples, {}, config, [chats[x.id] for x in samples])


AGAIN = Stage("again", Adapted, (), (shown_again, ask, answer_with), train.H)
TTICL = Stage("tticl", Adapted, (), (with_examples, ask, answer_with), train.G)
ICL = Stage("icl", Adapted, ("k", "seed", "split"), (with_examples, ask, answer_with), train.H)


def again(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """The cheapest second look."""
    h = direct(agent, samples, config, kept)
    chats = {x.id: shown_again(x, h[x.id].text) for x in samples}
    t = kept(AGAIN, uncertain(samples, h, config), lambda xs: ask(agent, xs, chats, config))
    return [Outcome(h[x.id], None, t.get(x.id)) for x in samples]


def tticl(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """TT-ICL, the paper's variant of Algorithm 1 without training."""
    h, chats = direct(agent, samples, config, kept), {}
    unsure = uncertain(samples, h, config)
    g = kept(train.G, unsure, lambda xs: synthesize(agent.writer, xs, h, config))
    for x in unsure:
        pairs = [(with_request(x, pair.request), pair.text) for pair in g[x.id].pairs]
        chats[x.id] = with_examples(x, pairs)
    able = [x for x in unsure if g[x.id].pairs]
    t = kept(TTICL, able, lambda xs: ask(agent, xs, chats, config))
    return [Outcome(h[x.id], g.get(x.id), t.get(x.id)) for x in samples]


def icl(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept,
        split: Samples) -> list[Outcome]:
    """K labelled examples of the training split, drawn for each sample."""
    h, chats = direct(agent, samples, config, kept), {}
    for x in samples:
        order = torch.randperm(len(split), generator=seeded(config.seed, x.id, "icl")).tolist()
        examples = [split[i] for i in order[:config.k]]
        chats[x.id] = with_examples(x, [(one, call_text(one.answers)) for one in examples])
    t = kept(ICL, samples, lambda xs: ask(agent, xs, chats, config))
    return [Outcome(h[x.id], None, t[x.id]) for x in samples]


def read_split(config: RivalConfig) -> list[Sample]:
    """The samples of --train-data; ValueError if the benchmark asks one of their requests."""
    def said(sample):
        text = "".join(message["content"] for message in sample.messages)
        return "".join(c for c in text.casefold() if c.isalnum())
    split = data.load(config.bench, config.train_data)
    if shared := set(map(said, split)) & set(map(said, benchmark(config))):
        raise ValueError(f"--train-data {config.train_data}: {len(shared)} of its requests are "
                         "test samples")
    return split


# --------------------------------------------------------------------------------------------- SFT

def supervised(agent: Agent, split: Samples, config: RivalConfig) -> Params:
    """One adapter trained on the whole split: --epochs passes over shuffled batches of
    --train-batch. ValueError if it diverges."""
    tokenizer, model, steps = agent.tokenizer, agent.model, []
    examples = [(tokenizer.chat(call_prompt(x)),
                 [*tokenizer.encode(call_text(x.answers)), tokenizer.im_end]) for x in split]
    for epoch in range(config.epochs):
        order = torch.randperm(len(examples), generator=seeded(config.seed, "sft", epoch))
        steps += order.split(config.train_batch)
    params = new_params(model, config.rank, [seeded(config.seed, "sft", "lora")])
    model.checkpointing = config.checkpointing
    with adapters(model, params, config.alpha) as tensors:
        optimizer = torch.optim.AdamW(tensors, weight_decay=0.0)
        for step, batch in enumerate(tqdm(steps, unit="step", desc="sft", dynamic_ncols=True)):
            loss = train.answer_loss(model, [examples[i] for i in batch.tolist()], None).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(tensors, 1.0)
            if not (loss.isfinite() and norm.isfinite()):
                raise ValueError(f"sft: step {step + 1} is not finite; lower --lr ({config.lr:g})")
            optimizer.param_groups[0]["lr"] = config.lr * train.schedule(step, len(steps))
            optimizer.step()
    return {name: tuple(t.detach() for t in pair) for name, pair in params.items()}


SFT = Stage("sft", Adapted, ("split", "train_batch", "rank", "alpha", "epochs", "lr", "seed"),
            (lora, train.answer_loss, train.schedule, supervised, answer_with), train.H)


def trained(agent: Agent, split: Samples, config: RivalConfig) -> tuple[Params, float]:
    """The adapter of sft, in peft's format in the run folder, and the seconds of its training: it
    is trained unless it is there."""
    folder, key = Path(config.out) / "adapter", SFT.key({**asdict(config), **agent.facts})
    told, key, start = folder / "training.json", json.dumps(key), time.perf_counter()
    if told.is_file() and not config.fresh:
        before = json.loads(told.read_text())
        if before["key"] == key:
            return load_adapter(folder, agent.model)[0], before["seconds"]
    params = supervised(agent, split, config)
    seconds = time.perf_counter() - start
    told.unlink(missing_ok=True)
    save_adapter(folder, params, config.alpha)
    told.write_text(json.dumps({"key": key, "seconds": seconds}))   # last: else it is not whole
    return params, seconds


def sft(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept, params: Params,
        share: float) -> list[Outcome]:
    """Answers of the one adapter, which acts on every token, as in its training. share: a sample's
    part of the seconds that it took."""
    h, full = direct(agent, samples, config, kept), replace(config, adapt="full")
    t = kept(SFT, samples, lambda xs: answer_with(agent, xs, params, full))
    t = {id: replace(line, seconds=round(line.seconds + share, 4)) for id, line in t.items()}
    return [Outcome(h[x.id], None, t[x.id]) for x in samples]


def write_merged(agent: Agent, params: Params, config: RivalConfig) -> None:
    """A checkpoint folder, --merged, of the model with the adapter merged into its weights."""
    tiny, folder = Path(data.__file__).parent / "tiny", Path(config.merged)
    source = tiny if config.model == "tiny" else find_checkpoint(config.model, config.offline)
    folder.mkdir(parents=True, exist_ok=True)
    layers, state = dict(agent.model.named_modules()), agent.model.state_dict()
    if agent.model.config.tie_word_embeddings:
        del state["lm_head.weight"]                 # it is the embedding
    for name, (A, B) in params.items():
        state[f"{name}.weight"] = lora.merge(layers[name], A[0], B[0], config.alpha)
    state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*.json"):
        if "safetensors" not in file.name:          # the index of what were shards
            shutil.copy(file, folder)


# ---------------------------------------------------------------- Algorithm 1, and sampled answers

@dataclass
class Voted(Adapted):
    """A line of T with sampled answers of the adapted model, and the seconds that those took."""
    texts: list[str] = field(default_factory=list)
    drawing: float = 0.0


def adapt_and_draw(agent: Agent, sample: Sample, lessons: Sequence[Lesson],
                   config: RivalConfig) -> Voted:
    """T for one sample, and what its adapter answers when sampled."""
    params = new_params(agent.model, config.rank, [seeded(config.seed, sample.id, "lora")])
    line = adapt_with(agent, sample, lessons, params, config)
    prefixes = PrefixCaches(agent.model)            # what an adapter reads is not for theta_0
    if config.adapt == "suffix":
        prefixes = agent.prefixes
        prefixes.read(agent.tokenizer.split_chat(call_prompt(sample))[0])       # read by theta_0
    start = time.perf_counter()
    with adapters(agent.model, params, config.alpha):
        writer = LocalWriter(agent.model, agent.tokenizer, prefixes)
        texts = draw(writer, [sample], config)[0].texts if line.finite else []
    return Voted(**vars(line), texts=texts, drawing=time.perf_counter() - start)


VOTED = replace(train.T, line=Voted, reads=(*train.T.reads, *SAMPLED.reads),
                code=(*train.T.code, adapt_with, draw, adapt_and_draw))


def then_vote(agent: Agent, samples: Samples, config: RivalConfig, kept: Kept) -> list[Outcome]:
    """Algorithm 1, and sampled answers of each sample's own model, adapted or not."""
    h = direct(agent, samples, config, kept)
    unsure = [] if config.method == "base" else uncertain(samples, h, config)
    g = kept(train.G, unsure, lambda xs: synthesize(agent.writer, xs, h, config))
    able = [x for x in unsure if g[x.id].pairs]
    lessons = {x.id: train.lessons_of(x, g[x.id]) for x in able}
    t = kept(VOTED, able, lambda xs: one_by_one(
        xs, lambda x: adapt_and_draw(agent, x, lessons[x.id], config)))
    s = {id: Sampled(id, line.texts, line.drawing) for id, line in t.items() if line.texts}
    s |= sampled(agent, [x for x in samples if x.id not in s], config, kept)
    t = {id: replace(line, seconds=line.seconds - line.drawing) for id, line in t.items()}
    return [Outcome(h[x.id], g.get(x.id), t.get(x.id), extra_of(s[x.id])) for x in samples]


# ------------------------------------------------------------------------------------- the program

RIVALS = {"vote": vote, "retry": retry, "again": again, "tticl": tticl, "icl": icl, "sft": sft}


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.parse_args(argv, RivalConfig, __doc__)
    # a rival is a method: so it is called in config.json and in the run folder's name
    config = train.choose(replace(config, method=config.rival or config.method, rival=""))
    split = read_split(config) if config.train_data else []
    agent, samples = train.set_up(config)
    agent.facts["split"] = hashlib.sha256(repr(split).encode()).hexdigest()
    improve = then_vote if config.then_vote else RIVALS[config.method]
    if config.method == "icl":
        improve = partial(icl, split=split)
    if config.method == "sft":
        params, seconds = trained(agent, split, config)
        improve = partial(sft, params=params, share=seconds / len(samples))
        if config.merged:
            write_merged(agent, params, config)
    code = train.run(agent, samples, config, Kept(config, agent.facts), improve)
    if (Path(config.out) / "records.jsonl").is_file():      # else another process is not done yet
        score_sampled(Path(config.out), samples, agent)
    return code


if __name__ == "__main__":
    sys.exit(main())
