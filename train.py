"""TT-SI, test-time self-improvement: Algorithm 1 over the samples of a benchmark.

    python train.py --bench nexusraven                    # the bundled model, or Qwen2.5 on a GPU
    python train.py --bench sealtool --model Qwen/Qwen2.5-1.5B-Instruct --adapt suffix --seed 1
    for tau in 0.35 0.55 0.75; do python train.py --bench apibank --tau $tau; done      # H is kept
    torchrun --nproc-per-node 4 train.py --bench apibank  # four processes share the samples

A run can be stopped at any moment: the same command goes on. Read self_improve first.
"""
import argparse
import hashlib
import inspect
import json
import math
import os
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import wraps
from itertools import takewhile
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")     # torch's; it is not needed

import torch
import torch.nn.functional as F
from tqdm import tqdm

import augment
import data
import lora
import model as qwen
import uncertainty
from augment import Found, LocalWriter, ServerWriter, Writer, synthesize
from data import Sample, call_prompt, call_text, request_text, with_request
from evaluate import Record, exact_match, printable, reachable, read_run, table, write_run
from lora import adapters, new_params
from model import KVCache, Qwen2, Tokenizer, fingerprint, generate, pad, seeded
from uncertainty import PrefixCaches, answer_start, score_candidates, softmax_difference

TINY = Path(data.__file__).parent / "tiny"
TINY_LR = 2e-3          # ours: five steps of 1e-4 hardly move a model of 2.4 million parameters
BATCH_TOKENS = 1 << 15  # on a GPU: tokens of a batch's prompts
RUN, HOW = "what to run", "how to run it"


def option(default, phase: str, text: str, *choices: str):
    """A field of Config with what its command-line flag needs to know."""
    return field(default=default, metadata={"phase": phase, "help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. A default is the paper's value unless it says "ours"."""
    bench: str = option("nexusraven", RUN, "the benchmark", *data.PUBLISHED)
    data: str = option("", RUN, "its file or folder (default: $TTSI_DATA, the cache, a download)")
    model: str = option("", RUN, "hub id, folder or tiny (default: Qwen2.5-1.5B-Instruct on a GPU)")
    method: str = option("ttsi", RUN, "base: direct answers; ttsi: adapt to the uncertain samples; "
                         "ttd: to pairs that --teacher wrote", "base", "ttsi", "ttd")
    teacher: str = option("", RUN, "hub id, folder, or URL of an OpenAI-compatible API (.../v1)")
    teacher_model: str = option("", RUN, "the teacher's name at that URL; key: OPENAI_API_KEY")
    seed: int = option(0, RUN, "seeds every draw, together with the sample's id")
    limit: int = option(0, RUN, "only the first N samples (0: all)")
    tau: float = option(0.95, "H", "uncertain where the softmax difference is below, in [0, 1]")
    k: int = option(1, "G", "pairs for each uncertain sample")
    pair: str = option("call", "G", "joint (paper): a request and its call in one go; call (ours): "
                       "a call of the likeliest tool, then its request", "joint", "call")
    temperature: float = option(0.7, "G", "of all sampling")
    top_p: float = option(0.95, "G", "nucleus of all sampling, in (0, 1]")
    adapt: str = option("full", "T", "full (paper): the adapter acts on all tokens; suffix (ours), "
                        "which is cheaper: on those after the tools", "full", "suffix")
    rank: int = option(8, "T", "rank r of the LoRA adapters")
    alpha: float = option(16.0, "T", "the adapter is scaled by alpha / r")
    epochs: int = option(5, "T", "passes over a sample's pairs")
    lr: float = option(0.0, "T", "peak learning rate (default: 1e-4, the paper's; tiny: 2e-3)")
    batch: int = option(0, HOW, "samples at a time (0: 1 on a CPU, as many as fit on a GPU)")
    checkpointing: bool = option(False, HOW, "in training, less memory for more time")
    max_new_tokens: int = option(256, HOW, "longest answer, in tokens")
    out: str = option("", HOW, "run folder (default: runs/<bench>-<model>-<method>-...-s<seed>)")
    device: str = option("auto", HOW, "auto, cpu, cuda, cuda:1, ...")
    dtype: str = option("auto", HOW, "of the weights (auto: bfloat16 on a GPU, else float32)",
                        "auto", "float32", "bfloat16")
    pack: bool = option(True, HOW, "on a CPU hold large weights twice: less time, more memory")
    offline: bool = option(False, HOW, "never download anything")
    fresh: bool = option(False, HOW, "forget what is kept of this configuration")

    def __post_init__(self):
        def need(name: str, holds: bool, allowed: str) -> None:
            if not holds:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {getattr(self, name)}: must be {allowed}")
        need("tau", 0 <= self.tau <= 1, "in [0, 1]")
        need("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        need("alpha", 0 < self.alpha < math.inf, "above 0")
        for name in ("temperature", "lr", "limit", "batch"):
            need(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("k", "rank", "epochs", "max_new_tokens"):
            need(name, getattr(self, name) >= 1, "1 or more")
        if (self.method == "ttd") != bool(self.teacher):
            raise ValueError("--method ttd and --teacher need each other")
        if ("://" in self.teacher) != bool(self.teacher_model):
            raise ValueError("--teacher URL and --teacher-model NAME need each other")
        if self.fresh and os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError("--fresh: one process alone can forget what all have kept")


@dataclass
class Agent:
    """The frozen model M with the prefixes that it has read, and who writes the pairs."""
    model: Qwen2
    tokenizer: Tokenizer
    prefixes: PrefixCaches
    writer: Writer
    facts: dict[str, str]               # digests of samples and weights, versions
    batch: int                          # samples at a time; in training, what the memory has held


# ------------------------------------------------------------------------------ H: how sure is M?

@dataclass
class Assessed:
    """A line of H: how sure the model is of one sample, and its direct answer."""
    id: str
    request: str
    candidates: dict[str, float]        # tool name -> l_n, nats
    margin: float                       # u(x), the softmax difference
    prompt_tokens: int
    text: str                           # the direct answer
    ids: list[int]                      # its tokens, without the end token
    log_p: list[float]                  # of each token chosen, the end token included, nats
    entropy: list[float]                # of the distribution that each was chosen from, nats
    seconds: float = 0.0                # the batch's time divided by its lines; by Kept


def assess(agent: Agent, samples: Sequence[Sample], config: Config) -> list[Assessed]:
    """H and the direct answers of a batch: how sure is theta_0 of each sample?"""
    model, tokenizer = agent.model, agent.tokenizer
    caches, last, lines = [], [], []
    for sample in samples:
        head, rest = tokenizer.split_chat(call_prompt(sample))      # the tools; the request
        caches.append(agent.prefixes.read(head, rest[:-1]))         # x is read once, for all
        last.append(rest[-1:])
    answers = generate(model, last, tokenizer.eos, config.max_new_tokens, KVCache.stack(caches))
    for sample, answer, cache, end in zip(samples, answers, caches, last):
        text, names = tokenizer.decode(answer.ids), [tool["name"] for tool in sample.tools]
        l = score_candidates(model, tokenizer, cache, end, names, answer_start(text))
        lines.append(Assessed(
            sample.id, request_text(sample), dict(zip(names, l.tolist())), softmax_difference(l),
            cache.length + 1, text, answer.ids, answer.log_p, answer.entropy))
    return lines


# ----------------------------------------------------------------------- T: learn, answer, forget

@dataclass
class Adapted:
    """A line of T: what learning one sample's pairs was like, and the answer after it."""
    id: str
    losses: list[float]                 # of each step, nats a token, up to the first not finite
    norms: list[float]                  # of each step's gradient, before clipping
    finite: bool                        # else the direct answer stands
    text: str
    trained_tokens: int
    answer_tokens: int
    seconds: float = 0.0


Lesson = tuple[list[dict], str]         # a prompt's messages, and the answer to learn
Example = tuple[list[int], list[int]]   # the same as token ids; the loss is on the answer's


def lessons_of(sample: Sample, found: Found) -> list[Lesson]:
    """What a sample's adapter is to learn: each pair's request x' with its calls y'."""
    return [(call_prompt(with_request(sample, pair.request)), pair.text) for pair in found.pairs]


def answer_loss(model: Qwen2, batch: Sequence[Example], prefix: KVCache | None) -> torch.Tensor:
    """The mean of -log P of each row's answer tokens, nats, (B,). prefix: what the prompts
    continue (--adapt suffix), or None."""
    ids = pad([[*prompt, *answer[:-1]] for prompt, answer in batch], model.device)
    hidden = model(ids, prefix.fork() if prefix else None)
    losses = []
    for row, (prompt, answer) in zip(hidden, batch):
        logits = model.logits(row[len(prompt) - 1:][:len(answer)])
        losses.append(F.cross_entropy(logits, torch.tensor(answer, device=model.device)))
    return torch.stack(losses)


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step (from 0): a linear warm-up, then a cosine."""
    # paper: 3 % of the steps warm up.
    # ours: the warm-up is rounded down. The usual scheduler rounds it up to a whole step of
    # learning rate 0, which of five steps would be one that does nothing.
    warm = int(0.03 * steps)
    if step < warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def fine_tune(model: Qwen2, examples: Sequence[Sequence[Example]], tensors: list[torch.Tensor],
              config: Config, prefix: KVCache | None = None) -> tuple[list, list]:
    """T: train B adapters, (B, ...) each tensor, as B independent problems in one pass, each on
    its own K examples. Gives each row's loss and gradient norm at each step, (B, steps) each.

    AdamW is element by element, so one over the batch is B of them; a row that is not finite
    stays so in its own tensors.
    """
    # paper: AdamW, lr 1e-4, cosine, 3 % warm-up, batch 1.
    # ours: no weight decay, gradients clipped to norm 1.
    optimizer = torch.optim.AdamW(tensors, weight_decay=0.0)
    steps, losses, norms = config.epochs * len(examples[0]), [], []
    model.checkpointing = config.checkpointing
    for step in range(steps):
        loss = answer_loss(model, [own[step % len(own)] for own in examples], prefix)   # (B,)
        optimizer.zero_grad()
        loss.sum().backward()                       # a row's adapter is in its own loss only
        norm = torch.stack([t.grad.flatten(1).square().sum(1) for t in tensors]).sum(0).sqrt()
        clip = (1 / (norm + 1e-6)).clamp(max=1)
        for tensor in tensors:
            tensor.grad *= clip[:, None, None]
        optimizer.param_groups[0]["lr"] = config.lr * schedule(step, steps)
        optimizer.step()
        losses.append(loss.tolist())
        norms.append(norm.tolist())
    return list(zip(*losses)), list(zip(*norms))


def acted_on(agent: Agent, chat: list[dict], config: Config) -> list[int]:
    """The tokens of a prompt that an adapter acts on: all; with --adapt suffix, what follows the
    tools."""
    if config.adapt == "full":
        return agent.tokenizer.chat(chat)
    return agent.tokenizer.split_chat(chat)[1]


def before_them(agent: Agent, chats: Sequence[list[dict]], config: Config) -> KVCache | None:
    """What those tokens continue: nothing; with --adapt suffix, the tools as theta_0 reads them (so
    call this outside of `adapters`)."""
    if config.adapt == "full":
        return None
    tools = [agent.tokenizer.split_chat(chat[:1])[0] for chat in chats]
    return KVCache.stack([agent.prefixes.read(ids) for ids in tools])


def adapt_batch(agent: Agent, samples: Sequence[Sample], lessons: Sequence[Sequence[Lesson]],
                config: Config, params: lora.Params | None = None) -> list[Adapted]:
    """T for samples with equally many lessons: an adapter each (`params`, or fresh ones), its
    answer, and the reset."""
    model, tokenizer, examples = agent.model, agent.tokenizer, []
    for own in lessons:
        prompts = [acted_on(agent, chat, config) for chat, _ in own]
        answers = [[*tokenizer.encode(text), tokenizer.im_end] for _, text in own]
        examples.append(list(zip(prompts, answers)))
    chats = [call_prompt(sample) for sample in samples]
    asked = [acted_on(agent, chat, config) for chat in chats]
    tools = before_them(agent, [own[0][0] for own in lessons], config)
    cache = before_them(agent, chats, config)
    draws = [seeded(config.seed, x.id, "lora") for x in samples]
    params = params or new_params(model, config.rank, draws)
    with adapters(model, params, config.alpha) as tensors:                      # l.6  theta_0 + BA
        losses, norms = fine_tune(model, examples, tensors, config, tools)      # l.7  T
        answers = generate(model, asked, tokenizer.eos, config.max_new_tokens, cache)   # l.8
    lines = []                                                                  # l.9  theta_0 again
    for sample, own, loss, norm, answer in zip(samples, examples, losses, norms, answers):
        tokens = config.epochs * sum(len(prompt) + len(text) for prompt, text in own)
        lines.append(Adapted(
            sample.id, list(takewhile(math.isfinite, loss)), list(takewhile(math.isfinite, norm)),
            all(map(math.isfinite, loss + norm)), tokenizer.decode(answer.ids), tokens,
            len(answer.ids)))
    return lines


def adapt(agent: Agent, samples: Sequence[Sample], lessons: Sequence[Sequence[Lesson]],
          config: Config) -> list[Adapted]:
    """`adapt_batch` for any samples: equally many lessons go together, as many as the memory
    holds. A sample that it does not hold alone gets no line: its direct answer stands."""
    lines, todo = [], sorted(zip(samples, lessons), key=lambda one: len(one[1]))
    while todo:
        alike = [one for one in todo if len(one[1]) == len(todo[0][1])][:agent.batch]
        try:
            lines += adapt_batch(agent, *zip(*alike), config)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if len(alike) > 1:
                agent.batch = len(alike) // 2
                continue
        todo = todo[len(alike):]
    return lines


def out_of_memory(error: RuntimeError) -> bool:
    """Also where cuBLAS cannot get its workspace, which torch reports in another way."""
    return (isinstance(error, torch.OutOfMemoryError)
            or "CUBLAS_STATUS_ALLOC_FAILED" in str(error))


# ------------------------------------------------------------------------------------ Algorithm 1

@dataclass(frozen=True)
class Outcome:
    """What became of one sample: its lines."""
    h: Assessed
    g: Found | None = None              # None: nothing was written for it
    t: Adapted | None = None
    extra: dict = field(default_factory=dict)       # what research adds to a record


def self_improve(agent: Agent, samples: Sequence[Sample], config: Config,
                 kept: "Kept") -> list[Outcome]:
    """Algorithm 1 for a batch of test samples (without labels), each a problem of its own."""
    h = kept(H, samples, lambda xs: assess(agent, xs, config))                      # l.2-3  u(x_i)
    if config.method == "base":
        return [Outcome(h[x.id]) for x in samples]
    unsure = [x for x in samples if h[x.id].margin < config.tau]                    # l.4
    g = kept(G, unsure, lambda xs: synthesize(agent.writer, xs, h, config))         # l.5  (x', y')
    able = [x for x in unsure if g[x.id].pairs]
    lessons = {x.id: lessons_of(x, g[x.id]) for x in able}
    t = kept(T, able, lambda xs: adapt(agent, xs, [lessons[x.id] for x in xs], config))  # l.6-9
    return [Outcome(h[x.id], g.get(x.id), t.get(x.id)) for x in samples]


# ------------------------------------------------------------------------------- the kept stages

@dataclass(frozen=True)
class Stage:
    """A function from a sample to a line of JSON. Its lines are kept in files that are named by a
    digest of all that a line depends on besides its sample."""
    name: str
    line: type                          # the dataclass of a line
    reads: tuple[str, ...]              # the options, and the agent's facts, that it looks at
    code: tuple                         # the modules and functions that it runs
    after: "Stage | None" = None        # the stage whose lines it looks at

    def key(self, known: dict) -> dict:
        """What a line depends on, of the options and facts that are `known`."""
        source = "".join(inspect.getsource(part) for part in self.code)
        return {"stage": self.name, **{name: known[name] for name in self.reads},
                "code": hashlib.sha256(source.encode()).hexdigest()[:16],
                "after": self.after.key(known) if self.after else None}


H = Stage("H", Assessed, ("samples", "weights", "tokenizer", "max_new_tokens"),
          (qwen, uncertainty, data, data.calls, assess))
G = Stage("G", Found, ("writer", "k", "pair", "temperature", "top_p", "seed"), (augment,), H)
T = Stage("T", Adapted, ("adapt", "rank", "alpha", "epochs", "lr"),
          (lora, lessons_of, answer_loss, schedule, fine_tune, acted_on, before_them,
           adapt_batch), G)


class Kept:
    """The lines of stages: what is there is read, what is not is computed and appended. Each
    process appends to files of its own, so any number of them may work, and be killed."""

    def __init__(self, config: Config, facts: dict[str, str], computing: bool = True):
        self.known, self.computing = {**asdict(config), **facts}, computing
        self.folder = Path(config.out).parent / "stages"
        self.name = f"{config.bench}-{Path(config.model).name}"
        self.process = uuid.uuid4().hex[:8]
        self.lines: dict[str, dict] = {}            # file name of a stage -> sample id -> line

    def __call__(self, stage: Stage, samples: Sequence[Sample], compute: Callable) -> dict:
        """The lines of the samples by id; compute gives those that are not there. KeyError if a
        line is missing and computing is off."""
        key = json.dumps({"key": stage.key(self.known)})
        name = f"{stage.name}-{self.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        if name not in self.lines:
            self.lines[name] = self.read(stage, name)
        lines = self.lines[name]
        missing = [x for x in samples if x.id not in lines]
        if missing and not self.computing:
            raise KeyError(missing[0].id)
        start = time.perf_counter()
        new = compute(missing) if missing else []
        for line in new:
            line.seconds = round((time.perf_counter() - start) / len(new), 4)
            lines[line.id] = line
        if new:                         # in one write, flushed and synced
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"{name}.{self.process}.jsonl", "a", encoding="utf-8") as file:
                texts = [json.dumps(asdict(line)) for line in new]
                file.write("\n".join(texts if file.tell() else [key, *texts]) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return {x.id: lines[x.id] for x in samples if x.id in lines}

    def read(self, stage: Stage, name: str) -> dict:
        """All lines that any process has kept, by sample; a torn one is skipped with a notice.
        With --fresh the files are deleted, and there is none."""
        lines = {}
        files = [file for file in self.folder.glob("*.jsonl") if file.name.startswith(f"{name}.")]
        for file in sorted(files):
            if self.known["fresh"] and self.computing:      # who only reads never deletes
                file.unlink()
                continue
            for number, text in enumerate(file.read_bytes().split(b"\n")[1:], 2):
                if not text:
                    continue
                try:
                    line = stage.line(**json.loads(text))
                    lines[line.id] = line
                except (ValueError, TypeError):
                    print(f"{file}, line {number}: is torn; its sample is computed again")
        return lines


# ------------------------------------------------------------------------------------ the program

def parse_args(argv: Sequence[str] | None, config: type = Config, text: str = __doc__) -> Config:
    """The command line as a Config, one flag a field, grouped by the phases of Algorithm 1."""
    parser = argparse.ArgumentParser(description=text,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for f in fields(config):
        phase, told = f.metadata["phase"], f.metadata["help"].replace("%", "%%")
        if phase not in groups:
            groups[phase] = parser.add_argument_group(phase)
        kind = {"type": type(f.default), "choices": f.metadata["choices"] or None}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        if f.default not in ("", 0):
            told += f" (default: {f.default})"
        flag = "--" + f.name.replace("_", "-")
        groups[phase].add_argument(flag, default=f.default, help=told, **kind)
    return config(**vars(parser.parse_args(argv)))


SILENT = ("bench", "model", "method", "seed", "batch", "checkpointing", "out", "device", "pack",
          "offline", "fresh")           # options that a run's name need not tell


def choose(config: Config) -> Config:
    """Fill in what the user left open, and say what was chosen."""
    device, dtype = config.device, config.dtype
    if device == "auto":
        found = torch.cuda.is_available()
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if found else "cpu"
    gpu = device.startswith("cuda")
    if dtype == "auto":
        dtype = "bfloat16" if gpu else "float32"
    model = config.model or ("Qwen/Qwen2.5-1.5B-Instruct" if gpu else "tiny")
    source = config.data or ("bundled" if model == "tiny" else "")
    told = [f"{f.name}={Path(str(getattr(config, f.name))).name}" for f in fields(config)
            if f.name not in SILENT and getattr(config, f.name) != f.default]
    name = "-".join([config.bench, Path(model).name, config.method, *told, f"s{config.seed}"])
    what = "bundled samples, not the benchmark" if source == "bundled" else "the real samples"
    print(f"{config.bench}: {model} on {what}; {device}, {dtype}   (--model, --data and --device "
          "change it)", flush=True)
    return replace(config, model=model, device=device, dtype=dtype, data=source,
                   out=config.out or f"runs/{name}",
                   lr=config.lr or (TINY_LR if model == "tiny" else 1e-4))


def load_local(name: str, config: Config) -> LocalWriter:
    """A model with its tokenizer and caches: the agent's own, or a teacher's."""
    if name == "tiny":
        torch.set_num_threads(1)        # on matrices this small, more get in each other's way
    folder = TINY if name == "tiny" else qwen.find_checkpoint(name, config.offline)
    pack = config.pack and config.device == "cpu" and name != "tiny"
    model = qwen.load_model(folder, config.device, getattr(torch, config.dtype), pack)
    return LocalWriter(model, Tokenizer(folder), PrefixCaches(model))


def set_up(config: Config) -> tuple[Agent, list[Sample]]:
    """Load samples and model; ValueError or OSError in one sentence for what is not sound."""
    samples = data.load(config.bench, config.data, config.offline)
    seen = json.dumps([asdict(sample.without_answers()) for sample in samples])
    samples = samples[:config.limit or None]
    try:
        me = writer = load_local(config.model, config)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {config.device}: {str(error).splitlines()[0]}") from error
    weights, who = fingerprint(me.model), "the model"
    if config.teacher_model:
        writer, who = ServerWriter(config.teacher, config.teacher_model), config.teacher_model
    elif config.teacher:
        writer = load_local(config.teacher, config)
        who = fingerprint(writer.model)
    longest, id = max((len(me.tokenizer.chat(call_prompt(x))), x.id) for x in samples)
    if longest + config.max_new_tokens > me.model.config.max_position_embeddings:
        raise ValueError(f"{id}: its prompt of {longest} tokens and an answer of "
                         f"{config.max_new_tokens} exceed the model's context")
    batch = config.batch or (1 if config.device == "cpu" else max(1, BATCH_TOKENS // longest))
    tokens = me.tokenizer.bpe.to_str() + str(sorted(me.tokenizer.eos))
    facts = {"samples": hashlib.sha256(seen.encode()).hexdigest(), "weights": weights,
             "tokenizer": hashlib.sha256(tokens.encode()).hexdigest(), "writer": who,
             "torch": torch.__version__, "python": sys.version.split()[0]}
    return Agent(me.model, me.tokenizer, me.prefixes, writer, facts, batch), samples


def record_of(agent: Agent, sample: Sample, config: Config, outcome: Outcome) -> Record:
    """The join: a sample's lines, with the verdicts on its answers before and after."""
    h, g, t = outcome.h, outcome.g or Found(sample.id), outcome.t
    uncertain = h.margin < config.tau
    kind, tokens = "direct" if uncertain else "certain", {"H": h.prompt_tokens + len(h.ids)}
    seconds, after = {"H": h.seconds}, h.text
    if outcome.g:
        kind, seconds["G"] = "out of memory" if g.pairs else "no pair", g.seconds
        tokens["G"] = sum(len(agent.tokenizer.encode(text)) for text in g.texts)
    if t:
        kind, seconds["T"] = "adapted" if t.finite else "non-finite", t.seconds
        tokens["T"], after = t.trained_tokens + t.answer_tokens, t.text if t.finite else h.text
    return Record(
        id=sample.id, request=h.request, margin=h.margin, uncertain=uncertain, outcome=kind,
        candidates=h.candidates, base=exact_match(h.text, sample),
        answer=exact_match(after, sample), pairs=[asdict(pair) for pair in g.pairs],
        rejected=[asdict(each) for each in g.rejected], losses=t.losses if t else [],
        norms=t.norms if t else [], seconds=seconds, tokens=tokens,
        gold=call_text(sample.answers), reachable=reachable(sample), log_p=h.log_p,
        entropy=h.entropy, ids=h.ids, prompt_tokens=h.prompt_tokens, extra=outcome.extra)


def run(agent: Agent, samples: Sequence[Sample], config: Config, kept: Kept,
        improve: Callable, change: Callable[[Record], Record] = lambda record: record) -> int:
    """Improve this process's share of the samples in batches, then join; the exit code. change:
    gives the record to write in place of each."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share, records, size = samples[rank::world], {}, agent.batch

    def improved(part: Sequence[Sample], kept: Kept) -> dict[str, Record]:
        outcomes = improve(agent, [x.without_answers() for x in part], config, kept)
        return {x.id: change(record_of(agent, x, config, outcome))
                for x, outcome in zip(part, outcomes)}

    for number in (signal.SIGINT, signal.SIGTERM):      # also where a shell's job ignores SIGINT
        signal.signal(number, signal.default_int_handler)       # raises KeyboardInterrupt
    try:
        with tqdm(total=len(share), unit="sample", dynamic_ncols=True, disable=rank > 0) as bar:
            for batch in [share[i:i + size] for i in range(0, len(share), size)]:
                records |= improved(batch, kept)
                bar.update(len(batch))
                right = sum(r.answer.exact for r in records.values())
                bar.set_postfix_str(f"{right / len(records):.0%} right")
    except KeyboardInterrupt:
        print(f"Interrupted after {len(records)} samples: the same command goes on.")
        join(samples, config, agent.facts, records)
        return 130
    if fingerprint(agent.model) != agent.facts["weights"]:
        raise ValueError("the base weights have changed: this run's lines are not to be trusted")
    everybody = Kept(config, agent.facts, computing=False)      # what all processes have kept
    for sample in [x for x in samples if x.id not in records]:
        try:
            records |= improved([sample], everybody)
        except KeyError:                                        # it is not there yet
            continue
    if len(records) < len(samples):
        print(f"{len(samples) - len(records)} samples are with other processes; where one was "
              "killed, the same command computes them.")
    else:
        join(samples, config, agent.facts, records)
    return 0


def join(samples: Sequence[Sample], config: Config, facts: dict, records: dict) -> None:
    """Write the run folder, and tell what came out."""
    folder, ordered = Path(config.out), [records[x.id] for x in samples if x.id in records]
    write_run(folder, asdict(config) | {"facts": facts}, ordered)
    print(table([read_run(folder)]))
    if ordered:
        changed = min(ordered, key=lambda r: r.base.exact == r.answer.exact)    # if any has
        print(f"Next: python evaluate.py {folder} --sample {changed.id}    tells its story.")


def exit_codes(main: Callable) -> Callable:
    """A program's errors as one sentence and exit code 2; 130 when interrupted."""
    @wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except KeyboardInterrupt:                       # before the first sample
            return 130
        except (ValueError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not out_of_memory(error):
                raise
            line = printable((str(error) or type(error).__name__).splitlines()[0])
            early = isinstance(error, (ValueError, FileNotFoundError))      # nothing was begun
            print(f"error: {line}{'' if early else ' (what is finished is kept)'}", file=sys.stderr)
            return 2
    return wrapped


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = choose(parse_args(argv))
    agent, samples = set_up(config)
    return run(agent, samples, config, Kept(config, agent.facts), self_improve)


if __name__ == "__main__":
    sys.exit(main())
