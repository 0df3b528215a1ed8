"""TT-SI, test-time self-improvement: Algorithm 1 over the samples of a benchmark.

    python train.py --bench nexusraven                    # the bundled model, or Qwen2.5 on a GPU
    python train.py --bench sealtool --model Qwen/Qwen2.5-1.5B-Instruct --adapt suffix --seed 1
    for tau in 0.35 0.55 0.75; do python train.py --bench apibank --tau $tau; done      # H is kept
    torchrun --nproc-per-node 4 train.py --bench apibank  # four processes share the samples

You can stop a run at any moment; the same command continues it. This file reads downward: Algorithm
1, its parts H and T (G is in augment.py), the options, the program.
"""
from __future__ import annotations

import signal

if __name__ == "__main__":      # while torch loads, and at the end, an interrupt needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import math
import os
import sys
import threading
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

import data
from augment import Found, LocalWriter, ServerWriter, synthesize, try_call_first, try_joint
from data import Sample, Task, request_text, with_request
from data.calls import call_start, call_text
from data.chat import Tokenizer
from data.runs import (FREE, NON_FINITE, Kept, Lines, Missing, Record, Run, adapter_folder, digest,
                       forget, other_keys, out_of_memory, run_folder, stage)
from evaluate import exact_match, join, printable
from lora import Params, adapters, new_params, reset, save_adapter
from model import KVCache, Qwen2, find_checkpoint, fingerprint, generate, load_model, seeded
from uncertainty import PrefixCaches, score_candidates, softmax_difference


# ------------------------------------------------------------------------------------ Algorithm 1

def self_improve(samples: Sequence[Sample], config: Config, kept: Kept) -> list[Outcome]:
    """Algorithm 1 for a batch of test samples without labels; each is treated on its own."""
    h = kept(assess, samples)                                       # l.2-3  l_n, u(x_i)
    if config.method == "base":
        return [Outcome(h[x.id]) for x in samples]
    unsure = [x for x in samples if h[x.id].margin < config.tau]    # l.4    the others are certain
    g = kept(synthesize, unsure, h)                                 # l.5    K pairs (x', y')
    able = [x for x in unsure if g[x.id].pairs]
    t = kept(adapt, able, g, h)                                     # l.6-9  learn, answer, reset
    return [Outcome(h[x.id], g.get(x.id), t.get(x.id)) for x in samples]


@dataclass(frozen=True)
class Outcome:
    """The lines of H, G and T for one sample."""
    h: Assessed
    g: Found | None = None              # None: nothing was written for it
    t: Adapted | None = None            # None: nothing was learnt for it
    extra: dict = field(default_factory=dict)       # what research adds to a record


@dataclass
class Agent:
    """The frozen model M with its prefix caches, its task, and the writer of the pairs."""
    task: Task
    model: Qwen2
    tokenizer: Tokenizer
    prefixes: PrefixCaches
    writer: Callable                    # as augment.Writer
    facts: dict[str, str]               # what a run depends on besides its options
    batch: int                          # samples at a time


# ------------------------------------------------------------------------------ H: how sure is M?

@dataclass
class Assessed:
    """A line of H: how sure the model is of one sample, and its direct answer."""
    id: str
    failed: str = ""                    # why there are no scores; "" if there are
    request: str = ""
    candidates: dict[str, float] = field(default_factory=dict)      # action -> l_n, nats
    margin: float = 1.0                 # u(x), the softmax difference; where H has failed, 1
    prompt_tokens: int = 0
    text: str = ""                      # the direct answer
    ids: list[int] = field(default_factory=list)        # its tokens, without the end token
    # of each of its tokens and the end, nats, by the model itself, without --repetition-penalty
    log_p: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)  # of the distribution at each of them, nats
    seconds: float = 0.0                # the batch's time divided by its lines; set by Kept


@stage("H", Assessed, "weights", "shape", "tokenizer", "penalty", "numerics", "asks", "order",
       "max_new_tokens")
def assess(agent: Agent, samples: Sequence[Sample], config: Config) -> list[Assessed]:
    """H and the direct answers of a batch: how sure is theta_0 of each sample?"""
    model, tokenizer, task, lines = agent.model, agent.tokenizer, agent.task, []
    chats = [task.prompt(x) for x in samples]
    caches, last = agent.prefixes.split(tokenizer, chats, "answer")     # x is read once
    answers = generate(model, tokenizer, last, config.max_new_tokens, caches)
    for x, answer, cache, end in zip(samples, answers, caches, last):
        actions, begun = task.actions(x), task.answer_start(answer.text)
        l = score_candidates(model, tokenizer, cache, end, actions, begun, task.action_end)   # l.2
        u = softmax_difference(l)                                                       # l.3
        line = Assessed(x.id, "", request_text(x), dict(zip(actions, l.tolist())), u,
                        cache.length + 1, answer.text, answer.ids, answer.log_p, answer.entropy)
        if not all(map(math.isfinite, [u, *l.tolist(), *answer.log_p, *answer.entropy])):
            line = replace(line, failed=NON_FINITE, candidates={}, margin=1.0, log_p=[], entropy=[])
        lines.append(line)
    return lines


# ----------------------------------------------------------------------- T: learn, answer, forget

@dataclass
class Adapted:
    """A line of T: how one sample's pairs were learnt, and the adapted answer."""
    id: str
    failed: str = ""                    # why the direct answer is used; "" if it is not
    # of each step, up to the first that is not finite
    losses: list[float] = field(default_factory=list)   # nats a token
    norms: list[float] = field(default_factory=list)    # of the gradient before it is clipped
    text: str = ""                      # the adapted answer
    ids: list[int] = field(default_factory=list)        # its tokens, without the end token
    seconds: float = 0.0


@stage("T", Adapted, "adapt", "rank", "alpha", "epochs", "lr", "seed", adapters=True)
def adapt(agent: Agent, samples: Sequence[Sample], config: Config, g: Lines,
          h: Lines) -> list[Adapted]:
    """T: each sample's pairs are learnt. Its direct answer is a guess at the adapted one."""
    lessons = []
    for x in samples:
        lessons.append([(with_request(x, pair.request), pair.text) for pair in g[x.id].pairs])
    return learn(agent, samples, lessons, config, drafts=[h[x.id].ids for x in samples])


Lesson = tuple[Sample, str]             # a sample x', and the answer y' to learn for it
Example = tuple[list[int], list[int]]   # the ids of a prompt, and of an answer for the loss


def learn(agent: Agent, samples: Sequence[Sample], lessons: Sequence[Sequence[Lesson]],
          config: Config, params: Params | None = None,
          drafts: Sequence[list[int]] = ()) -> list[Adapted]:
    """T for the first sample and those with equally many lessons (`Kept` comes again with the
    others): train an adapter for each (`params`, or fresh ones), answer with it, and remove it.
    drafts: for each sample the ids of a guess at its answer, which make decoding faster."""
    model, tokenizer, rounds, lines = agent.model, agent.tokenizer, [], []
    alike = [i for i, each in enumerate(lessons) if len(each) == len(lessons[0])]
    samples, lessons = [samples[i] for i in alike], [lessons[i] for i in alike]
    for one_each in zip(*lessons):              # the first lesson of each sample, the second, ...
        chats = [agent.task.prompt(x) for x, _ in one_each]
        caches, prompts = agent.prefixes.split(tokenizer, chats, config.adapt)
        targets = [[*tokenizer.encode(text), tokenizer.im_end] for _, text in one_each]
        rounds.append((list(zip(prompts, targets)), caches))
    chats = [agent.task.prompt(x) for x in samples]
    caches, prompts = agent.prefixes.split(tokenizer, chats, config.adapt)
    params = params or new_params(model, config.rank,
                                  [seeded(config.seed, x.id, "lora") for x in samples])
    with adapters(model, params, config.alpha) as tensors:                      # l.6  theta_0 + BA
        losses, norms = fine_tune(model, rounds, tensors, config)               # l.7  T
        answers = generate(model, tokenizer, prompts, config.max_new_tokens, caches,    # l.8
                           drafts=[[*drafts[i], tokenizer.im_end] for i in alike if drafts])
    # l.9  the reset: on leaving the block the adapters are gone, and the model is theta_0 again
    for i, (x, answer) in enumerate(zip(samples, answers)):
        numbers = [*losses[i], *norms[i], *answer.log_p, *answer.entropy]
        failed = "" if all(map(math.isfinite, numbers)) else NON_FINITE
        lines.append(Adapted(x.id, failed, list(takewhile(math.isfinite, losses[i])),
                             list(takewhile(math.isfinite, norms[i])), answer.text, answer.ids))
        if config.keep_adapters and not failed:
            base = TINY if config.model == "tiny" else config.model
            save_adapter(adapter_folder(config.out, x.id), params, config.alpha, base, row=i)
    return lines


def fine_tune(model: Qwen2, rounds: Sequence[tuple[list[Example], list[KVCache]]],
              tensors: list[torch.Tensor], config: Config) -> tuple[list, list]:
    """T: train a batch of adapters as independent problems in one pass. Each tensor has a part for
    each row, (rows, ...). A round holds one example for each row and the caches that these
    continue, if any; a step learns one round. Returns each row's loss and gradient norm at each
    step, (rows, steps) each.

    AdamW works element by element, so one optimizer for the batch equals one for each row. A row
    that is not finite does not affect the others.
    """
    # paper: AdamW, lr 1e-4, cosine, 3 % warm-up, batch 1.
    # ours: no weight decay, gradients clipped to norm 1.
    optimizer = torch.optim.AdamW(tensors, weight_decay=0.0, fused=True)    # in one kernel
    steps, losses, norms = config.epochs * len(rounds), [], []
    model.checkpointing = config.checkpointing
    for step in range(steps):
        loss = answer_loss(model, *rounds[step % len(rounds)])                          # (rows,)
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


def answer_loss(model: Qwen2, examples: Sequence[Example],
                caches: Sequence[KVCache]) -> torch.Tensor:
    """The mean of -log P of each row's answer tokens, nats, (rows,). caches: of what
    stands before the prompts, if anything."""
    cache = KVCache.stack(caches) if caches else None
    hidden, losses = model([[*prompt, *answer[:-1]] for prompt, answer in examples], cache), []
    for row, (prompt, answer) in zip(hidden, examples):
        logits = model.lm_head(row[len(prompt) - 1:][:len(answer)]).float()
        losses.append(F.cross_entropy(logits, torch.tensor(answer, device=logits.device)))
    return torch.stack(losses)


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step (from 0): a linear warm-up, then a cosine."""
    # paper: 3 % of the steps warm up.
    # ours: the warm-up is rounded down. The usual scheduler rounds it up to a whole step of
    # learning rate 0, and then one of five steps does nothing.
    warm = int(0.03 * steps)
    if step < warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


# ------------------------------------------------------------------------------------ the options

RUN, HOW = "what to run", "how to run it"


def option(default, phase: str, text: str, *choices: str):
    """A field of Config with what its command-line flag needs."""
    return field(default=default, metadata={"phase": phase, "help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Everything that a user decides. A default is the paper's value unless it says "ours"."""
    bench: str = option("", RUN, "the benchmark (default: nexusraven, or your own --data)",
                        *data.PUBLISHED)
    data: str = option("", RUN, "the benchmark's file or folder, or \"bundled\" for its stand-in "
                       "(default: $TTSI_DATA, the cache, a download); without --bench a file of "
                       "your own, or its folder (data/README.md)")
    ask: str = option("", RUN, "one request of your own; --data FILE tells what it may choose from "
                      "(a file of nothing else, or of samples: then what its first one may)")
    model: str = option("", RUN, "hub id, folder or tiny (default: Qwen2.5-1.5B-Instruct on a GPU, "
                        "tiny on a CPU)")
    method: str = option("ttsi", RUN, "base: direct answers; ttsi: adapt to the uncertain samples; "
                         "ttd: to pairs that --teacher wrote", "base", "ttsi", "ttd")
    teacher: str = option("", RUN, "hub id, folder, or base URL of an OpenAI-compatible API")
    teacher_model: str = option("", RUN, "the teacher's name at that URL; key: OPENAI_API_KEY")
    teacher_option: str = option("", RUN, "fields of a request to change, as max_tokens=none,"
                                 "max_completion_tokens=320; none leaves a field out")
    seed: int = option(0, RUN, "seeds every draw, together with the sample's id")
    limit: int = option(0, RUN, "only the first N samples (0: all)")
    tools: str = option("as-given", RUN, "the order of a sample's tools; shuffled (ours): drawn by "
                        "the seed and the sample's id", "as-given", "shuffled")
    tau: float = option(0.95, "H", "uncertain where the softmax difference is below, in [0, 1]")
    k: int = option(1, "G", "pairs for each uncertain sample")
    pair: str = option("call", "G", "joint (paper): a request and its call in one go; call (ours): "
                       "a call of the likeliest action, then its request", "joint", "call")
    temperature: float = option(0.7, "G", "temperature of all sampling")
    top_p: float = option(0.95, "G", "nucleus of all sampling, in (0, 1]")
    # ours: suffix and answer. What stands before the adapted tokens is theta_0's cache.
    adapt: str = option("full", "T", "full (paper): the adapter acts on all tokens; suffix (ours): "
                        "on those after the system turn, three to four times as fast; answer "
                        "(ours): on the last token of the prompt and the answer's, learnt twice "
                        "as fast again",
                        "full", "suffix", "answer")
    rank: int = option(8, "T", "rank r of the LoRA adapters")
    alpha: float = option(16.0, "T", "the adapter is scaled by alpha / r")
    epochs: int = option(5, "T", "passes over a sample's pairs")
    lr: float = option(0.0, "T", "peak learning rate (default: 1e-4, the paper's; tiny: 2e-3)")
    batch: int = option(0, HOW, "samples at a time (0: 1 on a CPU, up to 32 on a GPU)")
    checkpointing: bool = option(False, HOW, "in training, less memory for more time")
    max_new_tokens: int = option(256, HOW, "longest answer, in tokens")
    repetition_penalty: str = option("1.0", HOW, "makes what stands in prompt and answer less "
                                     "likely to be written again by a local model (ours: 1.0, "
                                     "none); checkpoint: by its generation_config.json's number")
    out: str = option("", HOW, "run folder (default: runs/<bench>-<model>-<method>-...-s<seed>)")
    device: str = option("auto", HOW, "auto, cpu, cuda or cuda:N")
    dtype: str = option("auto", HOW, "of the weights (auto: bfloat16 on a GPU, else float32)",
                        "auto", "float32", "bfloat16")
    pack: bool = option(True, HOW, "on a CPU hold large weights twice: less time, more memory")
    offline: bool = option(False, HOW, "never download anything")
    keep_adapters: bool = option(False, HOW, "each adapter in peft's format, as adapters/<id> in "
                                 "the run folder (peft answers as the run did with --adapt full)")
    fresh: bool = option(False, HOW, "forget what is kept of this configuration")

    def __post_init__(self):
        said, checks = str(self.repetition_penalty), []     # (option, does it hold, what must be)
        for name in ("k", "rank", "epochs", "max_new_tokens"):
            checks.append((name, getattr(self, name) >= 1, "1 or more"))
        for name in ("temperature", "lr", "limit", "batch"):
            checks.append((name, 0 <= getattr(self, name) < math.inf, "0 or more"))
        is_device = self.device in ("auto", "cpu") or self.device.startswith("cuda")
        is_number = said.replace(".", "", 1).isdecimal() and 0 < float(said) <= 10
        checks += [("ask", not self.ask or self.ask.strip(), "a request"),
                   ("device", is_device, "auto, cpu, cuda or cuda:N"),
                   ("tau", 0 <= self.tau <= 1, "in [0, 1]"),
                   ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
                   ("alpha", 0 < self.alpha < math.inf, "above 0"),
                   ("repetition_penalty", is_number or said == "checkpoint",
                    'in (0, 10], or "checkpoint"')]
        for name, holds, what in checks:
            if not holds:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {getattr(self, name)}: must be {what}")
        if (self.method == "ttd") != bool(self.teacher):
            raise ValueError("--method ttd and --teacher need each other")
        if ("://" in self.teacher) != bool(self.teacher_model):
            raise ValueError("--teacher URL and --teacher-model NAME need each other")
        if self.fresh and os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError("--fresh: one process alone can forget what all have kept")


# ------------------------------------------------------------------------------------ the program

def exit_codes(main: Callable) -> Callable:
    """Print a program's error as one sentence and return 2; return 130 when it is interrupted."""
    @wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        """The program with its errors told, and interrupted once; gives its exit code."""
        before = {}
        if threading.current_thread() is threading.main_thread():   # only it may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):  # also in a job that ignores SIGINT
                before[number] = signal.signal(number, interrupt)
        try:
            return main(argv)
        except KeyboardInterrupt:                       # before the first sample
            return 130
        except BrokenPipeError:                         # who reads the output has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except (ValueError, OSError, OverflowError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not out_of_memory(error):
                raise
            line = printable((str(error) or type(error).__name__).splitlines()[0])
            early = isinstance(error, (ValueError, FileNotFoundError))      # nothing was begun
            print(f"error: {line}{'' if early else ' (what is finished is kept)'}", file=sys.stderr)
            return 2
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return wrapped


def interrupt(number: int, frame: object) -> None:
    """KeyboardInterrupt, once: what is finished is then put in order, and nothing may stop that."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    config = fill_in(parse_args(argv))
    agent, samples = set_up(config)
    return run(agent, samples, config)


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
    parsed = config(**vars(parser.parse_args(argv)))
    if parsed.ask and config is not Config:
        raise ValueError("--ask is train.py's alone: this program takes a file of samples")
    return parsed


TINY = Path(data.__file__).parent / "tiny"
TINY_LR = 2e-3          # ours: five steps of 1e-4 hardly move a model of 2.4 million parameters
GPU_BATCH = 32          # where the memory does not hold as many, `Kept` halves it
# options that a run's name does not tell as NAME=VALUE; the last four stand in it in any case
SILENT = FREE - {"dtype"} | {"bench", "model", "method", "seed"}


def fill_in(config: Config) -> Config:
    """Fill in what the user left open. The run folder's name tells what differs from the defaults;
    where two configurations could have that name, it ends in "*" for a digest. ValueError if it is
    not clear which file of a folder is meant."""
    bench, told = config.bench or "nexusraven", []
    if config.repetition_penalty != "checkpoint":                   # 1 is 1.0
        config = replace(config, repetition_penalty=str(float(config.repetition_penalty)))
    if config.data not in ("", "bundled") and not config.bench:     # own data, under its own name
        path = Path(config.data).expanduser()
        if path.is_dir():
            files = sorted([*path.glob("*.json"), *path.glob("*.jsonl")])
            if len(files) != 1:
                raise ValueError(f"--data {config.data} has {len(files)} files .json and .jsonl: "
                                 "give one of them, or say --bench")
            path = files[0]
        stem = path.stem.encode(errors="replace")[:60].decode(errors="ignore")
        bench, config = "ask" if config.ask else stem, replace(config, data=str(path))
    elif config.ask:
        raise ValueError("--ask needs --data FILE, without --bench: what may be chosen from")
    for f in fields(config):
        value = getattr(config, f.name)
        is_named = f.name in SILENT or f.name == "data" and not config.bench
        if not is_named and value != f.default:
            told.append(f"{f.name}={Path(str(value)).resolve().name[:40]}")
    device, dtype = config.device, config.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    gpu = device.startswith("cuda")
    if dtype == "auto":
        dtype = "bfloat16" if gpu else "float32"
    model = config.model or ("Qwen/Qwen2.5-1.5B-Instruct" if gpu else "tiny")
    source = config.data or ("bundled" if model == "tiny" else "")
    lr = config.lr or (TINY_LR if model == "tiny" else 1e-4)
    stem = Path(model).resolve().name[:40]
    name = "-".join([bench, stem, config.method, *told, f"s{config.seed}"])
    cut = name.encode()[:180].decode(errors="ignore")           # a file system allows 255 bytes
    if (model, source, config.teacher) != ("tiny", "bundled", "") or cut != name:
        name = f"{cut}-*"
    return replace(config, bench=bench, model=model, device=device, dtype=dtype, data=source, lr=lr,
                   out=config.out or f"runs/{name}")


CALLING = Task(data.call_prompt, data.call_names, call_start, '"',
               {"call": try_call_first, "joint": try_joint}, exact_match, call_text)


def set_up(config: Config, task: Task = CALLING,
           samples: Sequence[Sample] | None = None) -> tuple[Agent, list[Sample]]:
    """Load the samples (or take these) and the model, and say which. ValueError or OSError, in one
    sentence, for bad input."""
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}: torch finds no GPU here; use --device cpu")
    said = {f"one request, with what {config.data} offers": config.ask,
            "samples of its own": samples,
            "bundled samples, not the benchmark": config.data == "bundled",
            f"the samples of {config.data}": Path(config.data).expanduser().is_file(),
            "the real samples": True}
    what = next(filter(said.get, said))         # the first that holds
    print(f"{config.bench}: {config.model} on {what}; {config.device}, {config.dtype}   (--model, "
          "--data and --device change it)", flush=True)
    samples = samples or data.load(config.bench, config.data, config.offline, config.ask)
    samples = samples[:config.limit or None]
    try:
        me, facts = load_local(config.model, config)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {config.device}: {str(error).splitlines()[0]}") from error
    width = me.model.config.hidden_size
    if config.rank > width:             # B A of a higher rank is nothing that one of this is not
        raise ValueError(f"--rank {config.rank}: must be at most the model's width, {width}")
    writer, who = me, "the model"
    if config.teacher_model:
        writer = ServerWriter(config.teacher, config.teacher_model, options=config.teacher_option)
        who = f"{config.teacher_model} at {config.teacher} {config.teacher_option}".strip()
    elif config.teacher:
        writer, who = load_local(config.teacher, config)
    batch, kind = config.batch or 1, torch.backends.cpu.get_cpu_capability()
    if config.device != "cpu":
        batch, kind = config.batch or GPU_BATCH, torch.cuda.get_device_name(config.device)
    facts |= {**task.code, "writer": who, "samples": digest(samples), "numerics": config.dtype,
              "device": kind, "batch": batch, "torch": torch.__version__,
              "python": sys.version.split()[0], "order": config.tools}
    if config.dtype != "float32":       # then the numbers depend on the batch size
        facts["numerics"] += f", {kind}, batch {batch}, torch {torch.__version__}"
    if config.tools == "shuffled":      # facts["samples"] are as given, the same for every seed
        facts["order"] += f" by seed {config.seed}"
        samples = [data.shuffled(x, config.seed) for x in samples]
    return Agent(task, me.model, me.tokenizer, me.prefixes, writer, facts, batch), samples


def load_local(name: str, config: Config) -> tuple[LocalWriter, dict]:
    """A model with its tokenizer and caches, the agent's own or a teacher's; and the facts that
    identify it: its weights, its config.json as it was read, its tokenizer."""
    if name == "tiny":
        torch.set_num_threads(1)        # on matrices this small more threads are slower
    folder = TINY if name == "tiny" else find_checkpoint(name, config.offline)
    pack = config.pack and config.device == "cpu" and name != "tiny"
    model = load_model(folder, config.device, getattr(torch, config.dtype), pack)
    tokenizer = Tokenizer(folder)
    penalty = config.repetition_penalty
    if penalty == "checkpoint":
        penalty = tokenizer.penalty
        if not isinstance(penalty, (int, float)) or not 0 < penalty <= 10:
            raise ValueError(f"{folder}: its repetition_penalty is {penalty!r}, not in (0, 10]; "
                             "give a number with --repetition-penalty")
        print(f"{name}: its repetition penalty is {penalty}")
    model.repetition_penalty = float(penalty)
    facts = {"weights": fingerprint(model), "shape": asdict(model.config),
             "tokenizer": tokenizer.digest, "penalty": model.repetition_penalty}
    return LocalWriter(model, tokenizer, PrefixCaches(model)), facts


def run(agent: Agent, samples: Sequence[Sample], config: Config, improve: Callable = self_improve,
        change: Callable[[Record], Record] | None = None) -> int:
    """Improve this process's share of the samples in batches, then write the run; return the exit
    code. change: maps each record to the one that is written."""
    process, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    config = replace(config, out=run_folder(config, agent.facts))
    if config.fresh:
        forget(config, agent.facts)
    there, records = Kept(agent, config, computing=False), {}
    for x in samples:                                   # those whose lines are all on disk
        records |= improved([x], config, there, improve, change)
    share = [x for x in samples[process::processes] if x.id not in records]
    print(f"kept: {len(records)} of {len(samples)} samples; to compute: {len(share)}", flush=True)
    if share:
        for told in other_keys(there):
            print(told, flush=True)
    kept, code = Kept(agent, config), 0
    try:
        bar = tqdm(range(0, len(share), agent.batch), unit="batch", dynamic_ncols=True,
                   disable=process > 0)
        for i in bar:
            records |= improved(share[i:i + agent.batch], config, kept, improve, change)
            scores = [record.answer.exact for record in records.values()]
            if None not in scores:
                bar.set_postfix_str(f"{sum(scores) / len(scores):.0%} right")
    except KeyboardInterrupt:
        reset(agent.model)                              # it may have come amid a reset
        code = 130
    if fingerprint(agent.model) != agent.facts["weights"]:
        for path in kept.files.values():
            path.unlink()
        raise ValueError("the base weights have changed: what this process kept was deleted")
    everybody = Kept(agent, config, computing=False, failures=True)
    for x in samples:                                   # those of other processes
        if x.id not in records:
            records |= improved([x], config, everybody, improve, change)
    if code:
        how = "goes on" if not config.fresh else "would begin anew; without --fresh it goes on"
        print(f"Interrupted after {len(records)} of {len(samples)} samples: the same command "
              f"{how}.")
    elif len(records) < len(samples):
        print(f"{len(samples) - len(records)} samples are with other processes; where one was "
              "killed, the same command computes them.")
        return 0
    stages = {key["stage"]: key["code"] for key in {**there.keys, **kept.keys}.values()}
    about = {**asdict(config), "samples": len(samples), "facts": agent.facts, "code": stages}
    join(Run(Path(config.out), about, [records[x.id] for x in samples if x.id in records]))
    return code


def improved(samples: Sequence[Sample], config: Config, kept: Kept, improve: Callable,
             change: Callable | None) -> dict[str, Record]:
    """The records of samples, by id: their lines, and the verdicts on the answers before and after.
    Only the verdicts read the labels. {} if a line is missing and `kept` computes none."""
    unlabelled, task, records = [replace(x, answers=()) for x in samples], kept.agent.task, {}
    try:
        outcomes = improve(unlabelled, config, kept)
    except Missing:
        return {}
    for x, outcome in zip(samples, outcomes):
        h, g, t = outcome.h, outcome.g, outcome.t
        uncertain, verdicts, found = h.margin < config.tau, [], asdict(g or Found(x.id))
        kind, seconds = h.failed or ("direct" if uncertain else "certain"), {"H": h.seconds}
        if g:
            kind, seconds["G"] = g.failed or "no pair", g.seconds
        if t:
            kind, seconds["T"] = t.failed or "adapted", t.seconds
        for line in (h, t if t and not t.failed else h):
            verdict = task.verdict(line.text, x)
            if len(line.ids) >= config.max_new_tokens and verdict.exact is False:
                reason = f"cut at {config.max_new_tokens} tokens: {verdict.reason}"
                verdict = replace(verdict, reason=reason)
            verdicts.append(verdict)
        record = Record(
            id=x.id, request=h.request or request_text(x), margin=None if h.failed else h.margin,
            uncertain=uncertain, outcome=kind, candidates=h.candidates,
            base=verdicts[0], answer=verdicts[1], pairs=found["pairs"], rejected=found["rejected"],
            losses=t.losses if t else [], norms=t.norms if t else [], seconds=seconds,
            gold=task.gold(x.answers or ()), log_p=h.log_p, entropy=h.entropy, ids=h.ids,
            prompt_tokens=h.prompt_tokens, extra=outcome.extra)
        records[x.id] = change(record) if change else record
    return records


if __name__ == "__main__":
    sys.exit(main())
