"""Does anything cheaper do as well? The rivals of TT-SI, on the same samples and prompts.

    python -m research.rivals --rival vote --bench toolalpaca           # --all: however sure
    python -m research.rivals --rival retry --draws 3 --bench toolalpaca
    python -m research.rivals --rival sft --train-data FILE --merged my-model --bench sealtool
    python -m research.rivals --then-vote --bench toolalpaca            # what TT-SI and a vote do

On uncertain samples, or with --all on every one: vote: the majority of sampled answers; again: the
direct answer is shown to the model, which is asked once more; tticl: G as in TT-SI, but the pairs go
into the prompt as examples, and nothing is trained. On every sample whose direct answer does not fit
the tools: retry: the first sampled answer that does. On every sample, from --train-data: icl: K
examples in the prompt; sft: one adapter, trained once. --then-vote is no rival: it samples answers
of each sample's own model, adapted or not, after --method base, ttsi or ttd.

Sampled answers stand in a record's extra["sampled"], for votes and pass@k (research/report.py). The
answer stands in research/RESULTS.md, "Does anything cheaper do as well?".
"""
import hashlib
import json
import shutil
import sys
import time
from collections import Counter
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
from augment import LocalWriter, Writer, check_text, synthesize
from data import Sample, call_prompt, call_text, with_request
from data.calls import calls_key, parse_calls
from lora import Params, adapters, load_adapter, new_params, save_adapter
from model import Qwen2, find_checkpoint, generate, seeded
from research.lessons import benchmark
from research.stream import adapt_with, answer_with
from train import Adapted, Agent, Assessed, Kept, Lesson, Outcome, Stage, answer_loss, option
from uncertainty import PrefixCaches

RIVAL = "the rival"
ASK_AGAIN = ("You were not sure of this answer. Think again from the start, and answer with nothing "
             "but the tool calls that the request needs.")


@dataclass(frozen=True)
class RivalConfig(train.Config):
    """train.py's options, and those of the rivals."""
    rival: str = option("", RIVAL, "what is done in place of Algorithm 1",
                        "vote", "retry", "again", "tticl", "icl", "sft")
    then_vote: bool = option(False, RIVAL, "Algorithm 1, and sampled answers of each sample's model")
    all: bool = option(False, RIVAL, "vote, again and tticl act on every sample, however sure")
    draws: int = option(5, RIVAL, "sampled answers for a sample")
    train_data: str = option("", RIVAL, "for icl and sft: a file of labelled samples, in the "
                             "benchmark's form, none of which is a test sample")
    train_batch: int = option(8, RIVAL, "examples in a step of sft")
    merged: str = option("", RIVAL, "sft: a folder for the trained checkpoint, for train.py --model")

    def __post_init__(self):
        super().__post_init__()
        method = self.rival or self.method
        if (method in RIVALS) == self.then_vote:
            raise ValueError("choose a --rival, or --then-vote after --method base, ttsi or ttd")
        if (method in ("icl", "sft")) != bool(self.train_data):
            raise ValueError("--train-data and --rival icl or sft need each other")
        if self.merged and method != "sft":
            raise ValueError(f"--merged {self.merged}: only --rival sft trains one for all samples")
        for name in ("draws", "train_batch"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)}: must be 1 or more")


def direct(agent: Agent, samples: Sequence[Sample], config: RivalConfig,
           kept: Kept) -> dict[str, Assessed]:
    """H, which every rival begins with."""
    return kept(train.H, samples, lambda xs: train.assess(agent, xs, config))


def uncertain(samples: Sequence[Sample], h: dict[str, Assessed], config: RivalConfig) -> list[Sample]:
    """Whom vote, again and tticl act on."""
    return [x for x in samples if config.all or h[x.id].margin < config.tau]


# --------------------------------------------------------------------------------- sampled answers

@dataclass
class Sampled:
    """The sampled answers of one sample."""
    id: str
    texts: list[str]
    seconds: float = 0.0


def draw(writer: Writer, samples: Sequence[Sample], config: RivalConfig) -> list[Sampled]:
    """--draws sampled answers to the usual prompt, each from a generator of its own."""
    prompts = [(call_prompt(x), "") for x in samples]
    keys = [[(config.seed, x.id, "sample", i) for i in range(config.draws)] for x in samples]
    texts = writer(prompts, config.max_new_tokens, config.temperature, config.top_p, keys)
    return [Sampled(x.id, own) for x, own in zip(samples, texts)]


SAMPLED = Stage("S", Sampled, ("draws", "temperature", "top_p", "seed"), (augment, draw), train.H)


def sampled(agent: Agent, samples: Sequence[Sample], config: RivalConfig,
            kept: Kept) -> dict[str, Sampled]:
    """`draw` from the base model, kept."""
    writer = LocalWriter(agent.model, agent.tokenizer, agent.prefixes)
    return kept(SAMPLED, samples, lambda xs: draw(writer, xs, config))


def chosen(line: Sampled, text: str) -> Adapted:
    """One of the sampled answers as a line of T, which has cost no more than those."""
    return Adapted(id=line.id, losses=[], norms=[], finite=True, text=text, trained_tokens=0,
                   answer_tokens=0)


def plurality(texts: Sequence[str], sample: Sample) -> str:
    """The first text that calls what most of them call."""
    meanings = [calls_key(parse_calls(text).calls, sample.tools) for text in texts]
    return texts[meanings.index(Counter(meanings).most_common(1)[0][0])]


def vote(agent: Agent, samples: Sequence[Sample], config: RivalConfig, kept: Kept) -> list[Outcome]:
    """Self-consistency (Wang et al. 2023)."""
    h = direct(agent, samples, config, kept)
    s = sampled(agent, uncertain(samples, h, config), config, kept)
    t = {x.id: chosen(s[x.id], plurality(s[x.id].texts, x)) for x in samples if x.id in s}
    return [Outcome(h[x.id], None, t.get(x.id), extra_of(s.get(x.id))) for x in samples]


def retry(agent: Agent, samples: Sequence[Sample], config: RivalConfig, kept: Kept) -> list[Outcome]:
    """The first answer that passes the check which a pair must pass: the direct one, then the
    sampled ones; the direct one if none does."""
    h = direct(agent, samples, config, kept)
    s = sampled(agent, [x for x in samples if check_text(h[x.id].text, x)], config, kept)
    t = {}
    for x in [x for x in samples if x.id in s]:
        fitting = [text for text in s[x.id].texts if not check_text(text, x)]
        t[x.id] = chosen(s[x.id], [*fitting, h[x.id].text][0])
    return [Outcome(h[x.id], None, t.get(x.id), extra_of(s.get(x.id))) for x in samples]


def extra_of(line: Sampled | None) -> dict:
    return {"sampled": asdict(line)} if line else {}


def score_sampled(folder: Path, samples: Sequence[Sample], agent: Agent) -> None:
    """Replace the sampled answers in a run's records by verdicts on them, for which it takes the
    labels, and add what they cost."""
    run, labelled, records = evaluate.read_run(folder), {x.id: x for x in samples}, []
    for record in run.records:
        line = record.extra.get("sampled")
        if isinstance(line, dict):
            verdicts = [asdict(evaluate.exact_match(t, labelled[record.id])) for t in line["texts"]]
            tokens = sum(len(agent.tokenizer.encode(text)) for text in line["texts"])
            record = replace(record, extra={**record.extra, "sampled": verdicts},
                             seconds={**record.seconds, "sampled": line["seconds"]},
                             tokens={**record.tokens, "sampled": tokens})
        records.append(record)
    evaluate.write_run(folder, run.config, records)


# ---------------------------------------------------------------------------------- other prompts

def ask(agent: Agent, samples: Sequence[Sample], chats: Sequence[list[dict]],
        config: RivalConfig) -> list[Adapted]:
    """The base model's greedy answers to other prompts than the usual ones, as lines of T."""
    rests, cache = train.begin(agent, chats, replace(config, adapt="suffix"))       # theta_0's caches
    answers = generate(agent.model, rests, agent.tokenizer.eos, config.max_new_tokens, cache)
    return [Adapted(id=x.id, losses=[], norms=[], finite=True, trained_tokens=0,
                    text=agent.tokenizer.decode(answer.ids), answer_tokens=len(answer.ids))
            for x, answer in zip(samples, answers)]


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


AGAIN = Stage("again", Adapted, (), (shown_again, ask), train.H)
TTICL = Stage("tticl", Adapted, (), (with_examples, ask), train.G)
ICL = Stage("icl", Adapted, ("k", "seed", "training"), (with_examples, ask), train.H)


def again(agent: Agent, samples: Sequence[Sample], config: RivalConfig, kept: Kept) -> list[Outcome]:
    """The cheapest second look."""
    h = direct(agent, samples, config, kept)
    t = kept(AGAIN, uncertain(samples, h, config), lambda xs: ask(
        agent, xs, [shown_again(x, h[x.id].text) for x in xs], config))
    return [Outcome(h[x.id], None, t.get(x.id)) for x in samples]


def tticl(agent: Agent, samples: Sequence[Sample], config: RivalConfig, kept: Kept) -> list[Outcome]:
    """TT-ICL, the paper's variant of Algorithm 1 without training."""
    h = direct(agent, samples, config, kept)
    unsure = uncertain(samples, h, config)
    g = kept(train.G, unsure, lambda xs: synthesize(agent.writer, xs, config))
    able, chats = [x for x in unsure if g[x.id].pairs], {}
    for x in able:
        pairs = [(with_request(x, pair.request), pair.text) for pair in g[x.id].pairs]
        chats[x.id] = with_examples(x, pairs)
    t = kept(TTICL, able, lambda xs: ask(agent, xs, [chats[x.id] for x in xs], config))
    return [Outcome(h[x.id], g.get(x.id), t.get(x.id)) for x in samples]


def icl(agent: Agent, samples: Sequence[Sample], config: RivalConfig, kept: Kept,
        training: Sequence[Sample]) -> list[Outcome]:
    """K labelled examples, drawn for each sample."""
    h, chats = direct(agent, samples, config, kept), {}
    for x in samples:
        order = torch.randperm(len(training), generator=seeded(config.seed, x.id, "icl"))
        examples = [training[i] for i in order[:config.k].tolist()]
        chats[x.id] = with_examples(x, [(one, call_text(one.answers)) for one in examples])
    t = kept(ICL, samples, lambda xs: ask(agent, xs, [chats[x.id] for x in xs], config))
    return [Outcome(h[x.id], None, t[x.id]) for x in samples]


# ------------------------------------------------------------------------------------ SFT

@dataclass
class Trained:
    """The one adapter of sft."""
    params: Params
    losses: list[float]                 # of each step, nats a token
    seconds: float


def supervised(agent: Agent, training: Sequence[Sample], config: RivalConfig) -> Trained:
    """An adapter trained on the whole split: --epochs passes of shuffled batches of --train-batch.
    ValueError if it diverges."""
    start, tokenizer, losses, batches = time.perf_counter(), agent.tokenizer, [], []
    examples = [(tokenizer.chat(call_prompt(x)),
                 [*tokenizer.encode(call_text(x.answers)), tokenizer.im_end]) for x in training]
    for epoch in range(config.epochs):
        generator = seeded(config.seed, "sft", epoch)
        batches += torch.randperm(len(examples), generator=generator).split(config.train_batch)
    params = new_params(agent.model, config.rank, [seeded(config.seed, "sft", "lora")])
    agent.model.checkpointing = config.checkpointing
    with adapters(agent.model, params, config.alpha) as tensors:
        optimizer = torch.optim.AdamW(tensors, weight_decay=0.0)
        for step, batch in enumerate(tqdm(batches, unit="step", desc="sft", dynamic_ncols=True)):
            loss = answer_loss(agent.model, [examples[i] for i in batch.tolist()], None).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(tensors, 1.0)
            if not (loss.isfinite() and norm.isfinite()):
                raise ValueError(f"sft: the loss is not finite at step {step + 1}; lower --lr "
                                 f"({config.lr:g})")
            optimizer.param_groups[0]["lr"] = config.lr * train.schedule(step, len(batches))
            optimizer.step()
            losses.append(loss.item())
    params = {name: tuple(t.detach() for t in pair) for name, pair in params.items()}
    return Trained(params, losses, round(time.perf_counter() - start, 4))


SFT = Stage("sft", Adapted, ("training", "train_batch", "rank", "alpha", "epochs", "lr", "seed"),
            (lora, answer_loss, train.schedule, supervised, answer_with), train.H)


def trained(agent: Agent, training: Sequence[Sample], config: RivalConfig) -> Trained:
    """`supervised`, whose adapter is kept in the run folder in peft's format."""
    folder = Path(config.out) / "adapter"
    told, key = folder / "training.json", SFT.key({**asdict(config), **agent.facts})
    if told.is_file() and not config.fresh:
        before = json.loads(told.read_text(encoding="utf-8"))
        if before["key"] == json.loads(json.dumps(key)):
            params, _ = load_adapter(folder, agent.model)
            return Trained(params, before["losses"], before["seconds"])
    adapter = supervised(agent, training, config)
    save_adapter(folder, adapter.params, config.alpha)
    told.write_text(json.dumps({"key": key, "losses": adapter.losses, "seconds": adapter.seconds}))
    return adapter


def sft(agent: Agent, samples: Sequence[Sample], config: RivalConfig, kept: Kept,
        params: Params) -> list[Outcome]:
    """Answers of the one adapter, which acts on every token, as in its training."""
    h = direct(agent, samples, config, kept)
    t = kept(SFT, samples, lambda xs: answer_with(agent, xs, params, replace(config, adapt="full")))
    return [Outcome(h[x.id], None, t[x.id]) for x in samples]


def write_merged(model: Qwen2, params: Params, alpha: float, source: Path, folder: Path) -> None:
    """A checkpoint folder of the model with the adapter merged into its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    layers, state = dict(model.named_modules()), model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]                         # it is the embedding
    for name, (A, B) in params.items():
        state[f"{name}.weight"] = lora.merge(layers[name], A[0], B[0], alpha)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def training_split(config: RivalConfig) -> list[Sample]:
    """The samples of --train-data; ValueError if the benchmark asks one of their requests."""
    training = data.load(config.bench, config.train_data)
    def said(x): return "".join(c for m in x.messages for c in m["content"].casefold() if c.isalnum())
    if shared := {said(x) for x in training} & {said(x) for x in benchmark(config)}:
        raise ValueError(f"--train-data {config.train_data}: {len(shared)} of its requests are test "
                         "samples")
    return training


# --------------------------------------------------------------- Algorithm 1, and sampled answers

@dataclass
class Voted(Adapted):
    """A line of T with sampled answers of the adapted model."""
    texts: list[str] = field(default_factory=list)


def adapt_and_draw(agent: Agent, sample: Sample, lessons: Sequence[Lesson],
                   config: RivalConfig) -> Voted:
    """T for one sample, and what its adapter answers when sampled."""
    params = new_params(agent.model, config.rank, [seeded(config.seed, sample.id, "lora")])
    line = adapt_with(agent, sample, lessons, params, config)
    if not line.finite:
        return Voted(**vars(line))
    prefixes = PrefixCaches(agent.model)            # what an adapter reads is not for theta_0
    if config.adapt == "suffix":
        prefixes = agent.prefixes
        prefixes.read(agent.tokenizer.split_chat(call_prompt(sample))[0])       # read by theta_0
    with adapters(agent.model, params, config.alpha):
        writer = LocalWriter(agent.model, agent.tokenizer, prefixes)
        drawn, = draw(writer, [sample], config)
    return Voted(**vars(line), texts=drawn.texts)


VOTED = replace(train.T, line=Voted, reads=(*train.T.reads, *SAMPLED.reads),
                code=(*train.T.code, adapt_with, draw, adapt_and_draw))


def then_vote(agent: Agent, samples: Sequence[Sample], config: RivalConfig,
              kept: Kept) -> list[Outcome]:
    """Algorithm 1, and sampled answers of each sample's own model, adapted or not."""
    h = direct(agent, samples, config, kept)
    unsure = [] if config.method == "base" else uncertain(samples, h, config)
    g = kept(train.G, unsure, lambda xs: synthesize(agent.writer, xs, config))
    able = [x for x in unsure if g[x.id].pairs]
    t = kept(VOTED, able, lambda xs: [
        adapt_and_draw(agent, x, train.lessons_of(x, g[x.id]), config) for x in xs])
    s = {x.id: Sampled(x.id, t[x.id].texts) for x in able if t[x.id].finite}
    s |= sampled(agent, [x for x in samples if x.id not in s], config, kept)
    return [Outcome(h[x.id], g.get(x.id), t.get(x.id), extra_of(s[x.id])) for x in samples]


# ------------------------------------------------------------------------------------ the program

RIVALS = {"vote": vote, "retry": retry, "again": again, "tticl": tticl, "icl": icl, "sft": sft}


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.parse_args(argv, RivalConfig, __doc__)
    # a rival is a method: so it is called in config.json and in the run folder's name
    config = train.choose(replace(config, method=config.rival or config.method, rival=""))
    training = training_split(config) if config.train_data else []
    agent, samples = train.set_up(config)
    agent.facts["training"] = hashlib.sha256(repr(training).encode()).hexdigest()
    improve = then_vote if config.then_vote else RIVALS[config.method]
    if config.method == "icl":
        improve = partial(icl, training=training)
    if config.method == "sft":
        params = trained(agent, training, config).params
        improve = partial(sft, params=params)
        if config.merged:
            name, tiny = config.model, config.model == "tiny"
            source = train.TINY if tiny else find_checkpoint(name, config.offline)
            write_merged(agent.model, params, config.alpha, source, Path(config.merged))
    code = train.run(agent, samples, config, Kept(config, agent.facts), improve)
    score_sampled(Path(config.out), samples, agent)
    return code


if __name__ == "__main__":
    sys.exit(main())
