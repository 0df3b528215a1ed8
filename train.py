"""T, and the whole of TT-SI: Algorithm 1 over a benchmark, sample by sample or in batches.

    python train.py --bench nexusraven                              # the bundled demonstration, or the real job on a GPU
    python train.py --bench sealtool --model Qwen/Qwen2.5-1.5B-Instruct --seed 1
    python train.py --bench toolalpaca --model ~/models/qwen --adapt suffix --limit 20 --verbose
    python train.py --bench toolalpaca --sweep gate=all,score,random --sweep seed=0,1,2     # several runs, what they share computed once
    torchrun --nproc-per-node 4 train.py --bench apibank            # the samples shared among 4 processes, one GPU each
    python evaluate.py runs/*                                       # the table of several runs

A run can be stopped at any moment: the same command, with any number of processes, goes on where it was.
"""
import argparse
import copy
import datetime
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")      # torch's, on import where it is not installed: it is not needed

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import evaluate
from augment import Found, Pair, RemoteWriter, Writer, check_calls, local_writer, request_text, sample_texts, synthesize, with_request
from data import Sample, call_prompt, call_text
from data.calls import Call, calls_key, parse_calls
from lora import TARGETS, Params, adapters, keep_rows, load_adapter, merge_adapter, new_params, save_adapter, targeted
from model import ContextError, KVCache, PrefixCaches, Qwen2, Tokenizer, find_checkpoint, fingerprint, generate, load_model, pad, \
    seeded
from uncertainty import ORDERS, SCORES, Evidence, answer_parts, choose_scores, entropy_of, name_lengths, otsu, score_candidates, \
    softmax_difference, threshold_between

TINY = Path(data.__file__).parent / "tiny"
TINY_LR = 2e-3          # ours: five steps of 1e-4 hardly move a model of 2.4 million parameters
BATCH_TOKENS = 1 << 15  # of the prompts that are adapted to together on a GPU


def option(default, text: str, group: str, **more):
    """A field of Config with what its command-line flag needs to know."""
    return field(default=default, metadata={"help": text, "group": group, **more})


def number_or_auto(text: str) -> float | str:
    return text if text == "auto" else float(text)


USES = {"teacher": ("ttd",), "train_data": ("icl", "sft")}      # options that only these methods use, and need ...
WRITING, TRAINING = ("ttsi", "ttd", "tticl"), ("ttsi", "ttd", "sft")
ONLY_FOR = {            # ... and that only these methods look at
    "gate": (*WRITING, "vote", "again"), **dict.fromkeys(("pair", "filter", "pairs"), WRITING), "k": (*WRITING, "icl"),
    **dict.fromkeys(("rank", "alpha", "targets", "epochs", "lr", "warmup", "kl"), TRAINING), "adapt": ("ttsi", "ttd"),
    "train_limit": ("icl", "sft"), "train_batch": ("sft",), "teacher_model": ("ttd",), "teacher_apart": ("ttd",)}


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on. The paper's value is the default, except where the help says "ours"."""
    bench: str = option("nexusraven", "benchmark: one of " + ", ".join(data.PUBLISHED), "what to run", choices=tuple(data.PUBLISHED))
    data: str = option("", "the benchmark's file, or a folder that has it (default: $TTSI_DATA, the cache, a "
                       "download; with the tiny model: bundled samples)", "what to run")
    model: str = option("", "hub id, folder, or 'tiny', the bundled one (default: Qwen/Qwen2.5-1.5B-Instruct on a GPU, else tiny)",
                        "what to run")
    method: str = option("ttsi", "base: direct answers only; ttsi: adapt to the uncertain samples; ttd: to pairs that --teacher wrote; "
                         "without any training: tticl: the pairs as examples in the prompt; vote: the majority of sampled answers; "
                         "retry: sampled again until an answer fits the tools' schema; again: asked once more; and on every sample, from "
                         "--train-data: icl: K examples in the prompt; sft: an adapter trained once", "what to run",
                         choices=("base", "ttsi", "ttd", "tticl", "vote", "retry", "again", "icl", "sft"))
    teacher: str = option("", "for ttd, who writes the pairs: hub id or folder, such as a larger Qwen2.5; or the URL of an OpenAI-compatible "
                          "API, as https://host/v1, with its key in OPENAI_API_KEY", "what to run")
    teacher_model: str = option("", "the teacher's name there", "what to run")
    teacher_apart: bool = option(False, "the teacher is loaded only while it writes, for all samples at once, and the student waits in the CPU's "
                                 "memory; for a GPU that does not hold both", "what to run")
    adapter: str = option("", "an adapter in peft's format that is merged into the model before all else, such as one of sft", "what to run")
    train_data: str = option("", "for icl and sft: a file of labelled samples, none of which is a test sample", "what to run")
    train_limit: int = option(0, "only the first N of them (0: all)", "what to run")
    train_batch: int = option(8, "examples in a step of sft", "what to run")
    seed: int = option(0, "seeds every draw, together with the sample's id", "what to run")
    limit: int = option(0, "only the first N samples (0: all)", "what to run")
    tau: float | str = option(0.95, "uncertain where the softmax difference is below tau, in [0, 1] (with another --gate-score: "
                              "where the score is above tau); auto: chosen without labels (Otsu's rule)", "H, uncertainty",
                              type=number_or_auto)
    budget: float = option(0.0, "choose tau, without labels, so that this share of the samples is uncertain, in (0, 1]; "
                           "u = 1, as with a single tool, is never uncertain",
                           "H, uncertainty")
    gate: str = option("score", "which samples a method acts on: those that the score finds uncertain, or, as controls: all; certain, "
                       "only those that it is sure of; random, the same number drawn at random; oracle, those that the direct answer gets wrong (uses labels)",
                       "H, uncertainty", choices=("score", "all", "certain", "random", "oracle"))
    gate_score: str = option("margin", "the score that decides (1 - the softmax difference is 'margin')", "H, uncertainty",
                             choices=tuple(SCORES), metavar="NAME")
    scores: str = option("cheap", "the scores to record: cheap (no pass more), all, or names with commas", "H, uncertainty")
    k: int = option(1, "synthetic pairs for each uncertain sample", "G, synthetic pairs")
    pair: str = option("request", "joint (paper): request and call in one go; request (ours): the request, then the majority "
                       "of sampled calls that fit the schema", "G, synthetic pairs", choices=("joint", "request"))
    filter: str = option("schema", "a pair is kept if: none: it is there at all; schema: its calls fit the tools; consistent: more than "
                         "half of sampled answers to its request agree with it, too", "G, synthetic pairs", choices=("none", "schema", "consistent"))
    pairs: str = option("self", "self: written for the sample itself; or, as controls: unrelated: for another sample; gold: its own request "
                        "and gold calls (uses labels)", "G, synthetic pairs", choices=("self", "unrelated", "gold"))
    temperature: float = option(0.7, "of all sampling", "G, synthetic pairs")
    top_p: float = option(0.95, "nucleus of all sampling, in (0, 1]", "G, synthetic pairs")
    adapt: str = option("full", "full (paper): the adapter acts on every token; suffix (ours): only on those after the tools, "
                        "which is cheaper", "T, test-time fine-tuning", choices=("full", "suffix"))
    rank: int = option(8, "rank r of the LoRA adapters", "T, test-time fine-tuning")
    alpha: float = option(16.0, "LoRA's alpha: the adapter is scaled by alpha / r", "T, test-time fine-tuning")
    targets: str = option(",".join(TARGETS), "layers that get an adapter", "T, test-time fine-tuning")
    epochs: int = option(5, "passes over a sample's pairs", "T, test-time fine-tuning")
    lr: float = option(0.0, "peak learning rate of AdamW (default: 1e-4, the paper's; 2e-3 for the tiny model)",
                       "T, test-time fine-tuning")
    warmup: float = option(0.03, "share of the steps that warm up", "T, test-time fine-tuning")
    reset: str = option("sample", "sample: back to the base weights after each; never, as an ablation: one adapter learns on and on, and "
                        "answers every sample", "T, test-time fine-tuning", choices=("sample", "never"))
    kl: bool = option(False, "record KL(adapted || base) over the request's tokens, for two passes more", "T, test-time fine-tuning")
    samples: int = option(5, "answers sampled, at --temperature, for vote and retry, --vote, and the scores of sampled answers",
                          "answers and run folder")
    vote: bool = option(False, "sample --samples answers of whatever model answers a sample, adapted or not, for their majority and "
                        "pass@k in the tables", "answers and run folder")
    batch: int = option(0, "samples adapted together, each with its own adapter (0: 1 on a CPU, on a GPU as many as fit "
                        f"{BATCH_TOKENS} prompt tokens); changes results by rounding only", "answers and run folder")
    checkpointing: str = option("auto", "in training keep only each block's input and compute the rest again, for less memory: auto: on a GPU, "
                                "where it would not fit else", "answers and run folder", choices=("auto", "on", "off"))
    max_new_tokens: int = option(256, "longest answer, in tokens", "answers and run folder")
    out: str = option("", "run folder (default: runs/<bench>-<model>-<method>-s<seed>)", "answers and run folder")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...", "answers and run folder")
    dtype: str = option("auto", "of the base weights; auto: bfloat16 on a GPU, float32 on a CPU", "answers and run folder",
                        choices=("auto", "float32", "bfloat16"))
    pack: bool = option(True, "on a CPU hold large weights a second time, in the order in which products read them: less time for "
                        "more memory", "answers and run folder")
    offline: bool = option(False, "never download anything", "answers and run folder")
    verbose: bool = option(False, "tell each sample's story as it ends", "answers and run folder")
    overwrite: bool = option(False, "start anew in a run folder that exists", "answers and run folder")

    def __post_init__(self):
        choose_scores(self.scores)
        for name, methods in USES.items():
            flag, value = name.replace("_", "-"), getattr(self, name)
            if (self.method in methods) != bool(value):
                raise ValueError(f"--method {self.method} needs --{flag}" if not value else
                                 f"--{flag} {value}: of the methods only {' and '.join(methods)} use it, and --method is {self.method}")
        if self.method == "ttd" and self.pairs == "gold":
            raise ValueError("--pairs gold: nobody writes them, so there is no teacher; use --method ttsi")
        if self.teacher_apart and not (self.teacher and "://" not in self.teacher):
            raise ValueError("--teacher-apart: there is no --teacher whose weights are loaded here")
        if ("://" in self.teacher) != bool(self.teacher_model):
            raise ValueError("--teacher URL and --teacher-model NAME need each other")
        if self.vote and self.method not in ("base", "ttsi", "ttd", "sft"):
            raise ValueError(f"--vote: not with --method {self.method}, but with base, ttsi, ttd and sft")
        if self.reset == "never" and self.method not in ("ttsi", "ttd"):
            raise ValueError(f"--reset never: --method {self.method} trains no adapter that could be kept")
        if self.gate_score != "margin" and self.tau == Config.tau and not self.budget:
            raise ValueError(f"--gate-score {self.gate_score}: {self.tau} is the margin's tau; choose one in this score's own units, "
                             "or --tau auto, or a --budget")
        for name, holds, allowed in (
                ("tau", self.tau == "auto" or (0 <= self.tau <= 1 if self.gate_score == "margin" else not math.isnan(self.tau)),
                 "auto, or in [0, 1] for the margin"), ("budget", 0 <= self.budget <= 1 and (not self.budget or self.tau == Config.tau),
                 "in (0, 1], and not with --tau"), ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
                ("warmup", 0 <= self.warmup < 1, "in [0, 1)"), ("temperature", self.temperature >= 0, "0 or more"),
                ("lr", 0 <= self.lr < math.inf, "0 (the default) or more"), ("alpha", 0 < self.alpha < math.inf, "above 0"),
                ("limit", self.limit >= 0, "0 or more"), ("batch", self.batch >= 0, "0 or more"),
                ("train_limit", self.train_limit >= 0, "0 or more"),
                *((name, getattr(self, name) >= 1, "1 or more") for name in ("k", "rank", "epochs", "max_new_tokens", "samples", "train_batch"))):
            if not holds:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {allowed}")


@dataclass
class Record:
    """What happened to one sample: a line of records.jsonl. Verdicts are added after the method has finished."""
    id: str
    request: str = ""
    margin: float = math.nan                                    # u(x), the softmax difference
    uncertain: bool = False
    acted: bool = False                                         # whether the gate let the method act on it
    gate: str = "margin"                                        # the score that decided ...
    tau: float = math.nan                                       # ... and the threshold
    scores: dict[str, float] = field(default_factory=dict)      # uncertainty score -> value, higher = less sure
    candidates: dict[str, float] = field(default_factory=dict)  # tool name -> l_n, nats
    outcome: str = "certain"                                    # certain | direct | adapted | no pair | non-finite |
                                                                # out of memory | too long
    base: dict = field(default_factory=dict)                    # the direct answer: text, exact, reason, ...
    answer: dict = field(default_factory=dict)                  # the final one
    pairs: list = field(default_factory=list)
    rejected: list = field(default_factory=list)
    losses: list[float] = field(default_factory=list)           # of every training step
    norms: list[float] = field(default_factory=list)            # ... and the norm of its gradient, before clipping
    kl: float | None = None                                     # KL(adapted || base), nats a token of the request
    sampled: list = field(default_factory=list)                 # sampled answers: text, exact, reason, ...
    vote: dict = field(default_factory=dict)                    # the first of them that means what most mean
    gold: str = ""                                              # filled with the verdicts, for the reader
    reachable: bool = True                                      # whether the gold's tools are all on offer
    seconds: dict[str, float] = field(default_factory=dict)     # stage -> s
    tokens: dict[str, int] = field(default_factory=dict)        # stage -> tokens read (prefill, train) or written (the others)


@contextmanager
def stage(records: Sequence[Record], name: str) -> Iterator[None]:
    """Add the seconds spent inside, shared evenly, to each record's seconds[name]."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    for record in records:
        record.seconds[name] = round(record.seconds.get(name, 0.0) + (time.perf_counter() - start) / len(records), 4)


@dataclass(frozen=True)
class Agent:
    """The frozen model M with its tokenizer and the KV caches of the prefixes that it has read, and what some methods need."""
    model: Qwen2
    tokenizer: Tokenizer
    prefixes: PrefixCaches
    teacher: Writer | None = None                       # of ttd
    others: tuple[Sample, ...] = ()                     # the test samples, without answers: unrelated pairs are like one of them
    training: tuple[Sample, ...] = ()                   # of icl and sft, with answers
    adapter: Params = field(default_factory=dict)       # of sft, and the one that --reset never goes on with
    adapter_seconds: float = 0.0                        # what the training of sft took, as a sample's share


Example = tuple[list[int], list[int]]       # prompt ids, answer ids; the loss is on the answer's


def fine_tune(agent: Agent, examples: Sequence[Sequence[Example]], params: Params, config: Config,
              prefix: KVCache | None = None) -> tuple[list[list[float]], list[list[float]]]:
    """T: train the B adapters that are on the model, each on its own examples, as B independent problems in one pass:
    own loss, own gradient norm, own AdamW and schedule. Gives of each row each step's loss, nats a token, and gradient norm.

    prefix: what the rows' prompts continue, read with the base weights (--adapt suffix), or None (full). A row whose loss
    or gradient is not finite stops there, with a last loss of NaN; the others go on.
    """
    model, device = agent.model, agent.model.device
    tensors = [tensor for pair in params.values() for tensor in pair]                       # (B, ...) each
    means, squares = [torch.zeros_like(t) for t in tensors], [torch.zeros_like(t) for t in tensors]
    longest = max(len(prompt) + len(own) for row in examples for prompt, own in row)
    model.checkpointing = wants_checkpointing(model, len(examples) * longest, config.checkpointing)
    steps, losses, norms = [config.epochs * len(own) for own in examples], [[] for _ in examples], [[] for _ in examples]
    for step in range(max(steps)):
        going = [step < n and all(map(math.isfinite, own)) for n, own in zip(steps, losses)]
        if not any(going):
            break
        batch = [own[step % len(own)] for own in examples]
        ids, valid = pad([[*prompt, *answer[:-1]] for prompt, answer in batch], device)
        hidden = model(ids) if prefix is None else model(ids, prefix.fork(), valid)         # without one, nobody sees the padding
        loss = torch.stack([F.cross_entropy(model.logits(h[len(prompt) - 1:][:len(answer)]), torch.tensor(answer, device=device))
                            for h, (prompt, answer) in zip(hidden, batch)])                 # (B,)
        grads = torch.autograd.grad(loss.sum(), tensors)                                    # a row's adapter is in its own loss only
        norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()     # (B,)
        finite = (loss.isfinite() & norm.isfinite()).tolist()
        for own, sizes, value, size, ok, on in zip(losses, norms, loss.tolist(), norm.tolist(), finite, going):
            if on:
                own.append(value if ok else math.nan)
                sizes.append(size)
        # paper: AdamW, lr 1e-4, cosine, 3 % warm-up, batch 1.
        # ours: no weight decay, gradients clipped to norm 1.
        clip = (1 / (norm + 1e-6)).clamp(max=1)
        lr = torch.tensor([config.lr * schedule(min(step, n - 1), n, config.warmup) for n in steps], device=device)
        moves = torch.tensor([ok and on for ok, on in zip(finite, going)], device=device)
        with torch.no_grad():
            for tensor, grad, m, v in zip(tensors, grads, means, squares):
                grad, rate, on = grad * clip[:, None, None], lr[:, None, None], moves[:, None, None]
                m.lerp_(grad, 1 - 0.9)
                v.lerp_(grad.square(), 1 - 0.999)
                update = rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                tensor -= torch.where(on, update, 0)
    return losses, norms


def wants_checkpointing(model: Qwen2, tokens: int, wish: str) -> bool:
    """--checkpointing for a pass over so many tokens: auto is where a GPU has not the memory for what the pass keeps."""
    if wish == "auto":
        if model.device.type != "cuda":
            return False
        idle = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)     # of the allocator's own
        return kept_bytes(model, tokens) > 0.8 * (torch.cuda.mem_get_info(model.device)[0] + idle)
    return wish == "on"


def kept_bytes(model: Qwen2, tokens: int) -> int:
    """Upper estimate of what a pass with adapters on all layers keeps of so many tokens, without checkpointing: per token and
    block some 60 bytes for each of the D values of its width, and 16 for each of those inside the MLP."""
    c = model.config
    return tokens * c.num_hidden_layers * (60 * c.hidden_size + 16 * c.intermediate_size)


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate at a step (from 0): linear warm-up, then half a cosine down to 0."""
    # ours: the warm-up is rounded down. The usual scheduler rounds it up to a whole step of learning rate 0, which
    # of five steps would be one that does nothing.
    warm = int(warmup * steps)
    if step < warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def answer(agent: Agent, prompts: Sequence[list[int]], contexts: Sequence[Sequence[int]], config: Config, cache: KVCache | None = None,
           watch: Callable | None = None) -> list[tuple[dict, int]]:
    """Greedy decoding of the answers to prompts, which continue `cache`, by adapters where there are any; and their lengths.
    contexts: the prompts with what the cache holds, in tokens."""
    rows = generate(agent.model, prompts, agent.tokenizer.eos, config.max_new_tokens, cache, watch=watch, contexts=contexts,
                    keep=lambda places: keep_rows(agent.model, places))
    return [({"text": agent.tokenizer.decode(ids)}, len(ids)) for ids in rows]


def assess(agent: Agent, samples: Sequence[Sample], config: Config) -> list[Record]:
    """H and the direct answer, for test samples without their answers: how sure is the model of each?"""
    model, tokenizer = agent.model, agent.tokenizer
    records, caches, last, contexts, evidence = [], [], [], [], []
    wanted = dict.fromkeys((*choose_scores(config.scores), config.gate_score))
    needs = {SCORES[name].needs for name in wanted}
    for sample in samples:
        record = Record(sample.id, request_text(sample), gate=config.gate_score)
        head, rest = tokenizer.split_chat(call_prompt(sample))          # head: system text and tools; rest: the request
        names = [tool["name"] for tool in sample.tools]
        with stage([record], "prefill"):                                # x_i is read once, with theta_0, for all that follows
            record.tokens["prefill"] = len(head) + len(rest)
            cache = agent.prefixes.read(head)
            with torch.no_grad():
                model(torch.tensor([rest[:-1]], device=model.device), cache)
        with stage([record], "score"):
            l = score_candidates(model, tokenizer, cache, rest[-1:], names)                   # l.2  l_n, (N,) nats
            record.candidates = dict(zip(names, l.tolist()))
            record.margin = softmax_difference(l)                                             # l.3  u(x_i)
        with stage([record], "scores"):                                 # what only the rivals of u look at
            orders = shuffled_orders(agent, sample, config, rest, l) if "orders" in needs else None
            meant = meanings(sample, sampled_answers(agent, [sample], config)[0]) if "samples" in needs else ()
        evidence.append(Evidence(sample.id, len(head) + len(rest), l, name_lengths(tokenizer, names), orders, meant))
        records.append(record)
        caches.append(cache)
        last.append(rest[-1:])
        contexts.append(head + rest)
    steps = [[] for _ in samples]                                       # of each row: (token, -log p, entropy) of each step

    def watch(rows: list[int], logits: torch.Tensor) -> None:
        log_p = logits.float().log_softmax(-1)
        best = log_p.max(-1)
        for row, *step in zip(rows, best.indices.tolist(), (-best.values).tolist(), entropy_of(log_p.exp()).tolist()):
            steps[row].append(step)
    with stage(records, "base"):                                        # always there, so that a run shows before and after
        answers = answer(agent, last, contexts, config, KVCache.stack(caches), watch)
    for record, known, taken, (record.base, record.tokens["base"]) in zip(records, evidence, steps, answers):
        ids, nll, entropies = zip(*taken)
        known = replace(known, nll=torch.tensor(nll), entropy=torch.tensor(entropies), parts=answer_parts(tokenizer, ids))
        record.scores = {name: SCORES[name].value(known) for name in wanted}
        record.answer = dict(record.base)
    return records


def shuffled_orders(agent: Agent, sample: Sample, config: Config, rest: list[int], l: torch.Tensor) -> torch.Tensor:
    """l_n under up to ORDERS different orders of the tools, the sample's own first; (M, N) nats. Lists of one length are
    shuffled alike, so equal ones share their caches."""
    orders, draw = [list(range(len(l)))], seeded(config.seed, "order", len(l))
    while len(orders) < min(ORDERS, math.factorial(len(l))):
        order = torch.randperm(len(l), generator=draw).tolist()
        orders += [order] * (order not in orders)
    rows = [l]
    for order in orders[1:]:
        tools = tuple(sample.tools[i] for i in order)
        cache = agent.prefixes.read(agent.tokenizer.split_chat(call_prompt(replace(sample, tools=tools)))[0])
        row = score_candidates(agent.model, agent.tokenizer, cache, rest, [tool["name"] for tool in tools])
        rows.append(row[torch.tensor(order).argsort()])
    return torch.stack(rows)


def decide(record: Record, config: Config) -> None:
    """The gate: whether u(x) < tau, or another score is above it; where that is not defined, nothing is sure. Which samples
    the gates random and oracle let through is known from all samples only (`look_ahead`). Of the others H alone is kept."""
    record.tau = config.tau
    record.uncertain = record.margin < config.tau if config.gate_score == "margin" else not record.scores[config.gate_score] <= config.tau
    record.outcome = "direct" if record.uncertain else "certain"
    if config.method in UNGATED or config.gate == "all":
        record.acted = True
    elif config.gate in ("score", "certain"):
        record.acted = record.uncertain == (config.gate == "score")
    if not record.acted:
        forget(record)


def forget(record: Record) -> None:
    """Keep of a record what H found out; another run, whose gate was another one, may have known more."""
    fresh = Record(record.id)
    for name in ("pairs", "rejected", "losses", "norms", "kl", "sampled", "vote"):
        setattr(record, name, getattr(fresh, name))
    record.answer = dict(record.base)
    record.seconds = {name: spent for name, spent in record.seconds.items() if name in H_STAGES}
    record.tokens = {name: count for name, count in record.tokens.items() if name in H_STAGES}


H_STAGES = ("prefill", "score", "scores", "base")


def self_improve(agent: Agent, samples: Sequence[Sample], config: Config, records: Sequence[Record] = ()) -> list[Record]:
    """Algorithm 1 for a batch of test samples (without their answers), each on its own: an outcome does not depend on the
    others. The base weights are the same bits before and after. records: what is known of the samples from `assess`, or
    from another run that shares the stages up to some point."""
    records = records or assess(agent, samples, config)                                       # l.2-3  H: u(x_i)
    for record in records:
        decide(record, config)                                                                # l.4  sure enough: answer as is
    todo = [(sample, record) for sample, record in zip(samples, records) if record.acted]
    if config.reset == "never":
        stream(agent, samples, records, config)
    elif config.method in RIVALS:
        if todo:
            RIVALS[config.method](agent, *zip(*todo), config)
    elif config.method != "base":
        write_pairs(agent, todo, config)                                                      # l.5  G: K new (x', y')
        adapt(agent, learners(todo), config)                                                  # l.6-9  T, the answer, the reset
    if config.vote:
        for sample, record in zip(samples, records):
            if not record.sampled:
                draw(agent, [sample], [record], config)                   # of the base model, which answers what was not adapted
    return records


def learners(todo: Iterable[tuple[Sample, Record]]) -> list[tuple[Sample, Record]]:
    """Those with a pair, without which the direct answer stands, whose answer is not known from another run."""
    return [(sample, record) for sample, record in todo if record.pairs and "answer" not in record.seconds]


def stream(agent: Agent, samples: Sequence[Sample], records: Sequence[Record], config: Config) -> None:
    """--reset never, an ablation: one adapter learns from sample to sample (a batch is of one), and answers all once it has begun."""
    todo = [(sample, record) for sample, record in zip(samples, records) if record.acted]
    write_pairs(agent, todo, config)
    if todo := learners(todo):
        agent.adapter.update(agent.adapter or new_adapters(agent, ["stream"], config))
        adapt(agent, todo, config, agent.adapter)
    elif agent.adapter:
        answer_adapted(agent, samples, records, agent.adapter, config)


def write_pairs(agent: Agent, todo: Sequence[tuple[Sample, Record]], config: Config) -> None:
    """G, into the records that have no pairs yet from another run."""
    if lacking := [(sample, record) for sample, record in todo if "pairs" not in record.seconds]:
        with stage([record for _, record in lacking], "pairs"):
            if config.pairs == "gold":
                written = [Found([Pair(request_text(sample), sample.answers, in_form_of(record.base["text"], sample.answers),
                                       fits=not check_calls(sample.answers, sample))]) for sample, record in lacking]
            else:                                                         # TT-D: a stronger model writes them
                writer = agent.teacher if config.teacher else local_writer(agent.model, agent.tokenizer, agent.prefixes)
                written = synthesize(writer, [subject(agent, sample, config) for sample, _ in lacking], config.k, config.pair,
                                     config.temperature, config.top_p, config.seed, config.filter)
        for (_, record), found in zip(lacking, written):
            record.pairs, record.rejected = list(map(asdict, found.pairs)), list(map(asdict, found.rejected))
            record.tokens["pairs"] = count_tokens(agent, found.texts)
    for _, record in todo:
        record.outcome = "adapted" if record.pairs else "no pair"


def count_tokens(agent: Agent, texts: Sequence[str]) -> int:
    return sum(len(agent.tokenizer.encode(text)) for text in texts)


def in_form_of(text: str, calls: tuple[Call, ...]) -> str:
    """Calls as a model writes them that wrote `text`."""
    # ours: gold calls are trained without the tags if the model writes none. Learning both, the tags and the calls, from one
    # pair, the 0.5B learnt neither: it went on with further calls.
    lines = call_text(calls).splitlines()
    return "\n".join(lines if "<tool_call>" in text else [line for line in lines if line not in ("<tool_call>", "</tool_call>")])


def subject(agent: Agent, sample: Sample, config: Config) -> Sample:
    """The sample that another's pairs are like: itself, or with --pairs unrelated one drawn from the others."""
    if config.pairs != "unrelated":
        return sample
    others = [other for other in agent.others if other.id != sample.id]
    return others[int(torch.randint(len(others), (), generator=seeded(config.seed, sample.id, "unrelated")))]


def adapt(agent: Agent, todo: Sequence[tuple[Sample, Record]], config: Config, kept: Params | None = None) -> None:
    """T, the answer and the reset (outside of `adapters` the model is theta_0), for samples with pairs, if any. kept: an adapter to go
    on with and to keep (--reset never)."""
    if not todo:
        return
    samples, records = zip(*todo)
    params = kept or new_adapters(agent, [s.id for s in samples], config)
    examples, prefix = zip(*[lessons(agent, sample, record, config) for sample, record in todo])
    with adapters(agent.model, params, config.alpha):                                         # l.6  theta' = theta_0 + BA
        with stage(records, "train"):
            losses, norms = fine_tune(agent, examples, params, config, KVCache.stack(prefix) if config.adapt == "suffix" else None)     # l.7  T
    for record, own, record.losses, record.norms in zip(records, examples, losses, norms):
        record.tokens["train"] = config.epochs * sum(len(p) + len(a) for p, a in own)
        if not math.isfinite(record.losses[-1]):
            record.outcome = "non-finite"                                                     #      the direct answer stands
    answer_adapted(agent, samples, records, params, config)                                   # l.8-9  answer with theta_i*; reset


def new_adapters(agent: Agent, names: Sequence[str], config: Config) -> Params:
    """A fresh adapter for each name, which seeds it."""
    return new_params(agent.model, config.rank, [seeded(config.seed, name, "lora") for name in names], config.targets.split(","))


def lessons(agent: Agent, sample: Sample, record: Record, config: Config) -> tuple[list[Example], KVCache | None]:
    """What a sample's pairs are as examples to train on, and with --adapt suffix the cache of the tools before them."""
    like = subject(agent, sample, config)
    examples = []
    for pair in record.pairs:
        new = sample if config.pairs == "gold" else with_request(like, pair["request"])
        head, rest = agent.tokenizer.split_chat(call_prompt(new))
        examples.append(((rest if config.adapt == "suffix" else head + rest), [*agent.tokenizer.encode(pair["text"]), agent.tokenizer.im_end]))
    return examples, agent.prefixes.read(head) if config.adapt == "suffix" else None


def answer_adapted(agent: Agent, samples: Sequence[Sample], records: Sequence[Record], params: Params, config: Config) -> None:
    """The greedy answers of the adapters (one for each sample, or one for all), what --vote samples from them, and --kl."""
    heads, rests = zip(*(agent.tokenizer.split_chat(call_prompt(sample)) for sample in samples))
    contexts, suffix = [head + rest for head, rest in zip(heads, rests)], config.adapt == "suffix"
    if not suffix:                                                        # the adapter acts on the tools' text, too
        heads, rests = [()] * len(heads), contexts
    cache = KVCache.stack([agent.prefixes.read(head) for head in heads]) if suffix else None        # read by theta_0, so out here
    with adapters(agent.model, params, config.alpha), stage(records, "answer"):
        answers = answer(agent, rests, contexts, config, cache)
    for i, (sample, record, (text, length)) in enumerate(zip(samples, records, answers)):
        if record.outcome == "non-finite":
            continue
        record.answer, record.tokens["answer"] = text, length
        row = {name: tuple(t[i:i + 1] if len(t) > 1 else t for t in pair) for name, pair in params.items()}
        if config.vote:
            if suffix:
                agent.prefixes.read(heads[i])                             # by theta_0, to be found in the cache below
            with adapters(agent.model, row, config.alpha):
                draw(agent, [sample], [record], config, [(heads[i], rests[i])])
        if config.kl:
            record.kl = divergence(agent, row, heads[i], rests[i], config)


@torch.no_grad()
def divergence(agent: Agent, params: Params, head: Sequence[int], rest: list[int], config: Config) -> float:
    """KL(adapted || base) in nats, the mean over the tokens of the prompt that the adapter acts on, the last 256 of them."""
    def log_p():
        hidden = agent.model(torch.tensor([rest], device=agent.model.device), agent.prefixes.read(head) if head else None)
        return agent.model.logits(hidden[0, -256:]).log_softmax(-1)
    base = log_p()
    with adapters(agent.model, params, config.alpha):
        adapted = log_p()
    return F.kl_div(base, adapted, log_target=True, reduction="batchmean").item()


# Without training: another prompt for a sample, as messages. What stands before the request is an example's request and calls.

def in_context(agent: Agent, sample: Sample, record: Record, config: Config) -> list[dict]:
    """TT-ICL: the sample's pairs as examples."""
    return with_examples(sample, [(with_request(sample, pair["request"]), pair["text"]) for pair in record.pairs])


def few_shot(agent: Agent, sample: Sample, record: Record, config: Config) -> list[dict]:
    """ICL: K examples of the training split, drawn for each sample. Their tools are not shown."""
    order = torch.randperm(len(agent.training), generator=seeded(config.seed, sample.id, "icl")).tolist()
    return with_examples(sample, [(shown, call_text(shown.answers)) for shown in (agent.training[i] for i in order[:config.k])])


def ask_again(agent: Agent, sample: Sample, record: Record, config: Config) -> list[dict]:
    """The cheapest second look: the direct answer is shown to the model, which is asked once more."""
    return [*call_prompt(sample), {"role": "assistant", "content": record.base["text"]}, {"role": "user", "content": ASK_AGAIN}]


def with_examples(sample: Sample, examples: Sequence[tuple[Sample, str]]) -> list[dict]:
    """The sample's prompt with examples, each a request and its answer's text, as turns before its own request."""
    system, *request = call_prompt(sample)
    return [system, *(turn for shown, text in examples for turn in (*call_prompt(shown)[1:], {"role": "assistant", "content": text})), *request]


def prompted(prompt: Callable[[Agent, Sample, Record, Config], list[dict]]) -> Callable:
    """The method that answers such prompts greedily, with the base model."""
    def method(agent: Agent, samples: Sequence[Sample], records: Sequence[Record], config: Config) -> None:
        heads, rests = zip(*(agent.tokenizer.split_chat(prompt(agent, *one, config)) for one in zip(samples, records)))
        with stage(records, "answer"):
            answers = answer(agent, rests, [head + rest for head, rest in zip(heads, rests)], config,
                             KVCache.stack([agent.prefixes.read(head) for head in heads]))
        for record, (record.answer, record.tokens["answer"]) in zip(records, answers):
            record.outcome = "adapted"
    return method


def tticl(agent: Agent, samples: Sequence[Sample], records: Sequence[Record], config: Config) -> None:
    """TT-ICL: G as in TT-SI; the pairs become examples in the prompt, and nothing is trained."""
    todo = list(zip(samples, records))
    write_pairs(agent, todo, config)
    if todo := learners(todo):
        prompted(in_context)(agent, *zip(*todo), config)


def vote(agent: Agent, samples: Sequence[Sample], records: Sequence[Record], config: Config) -> None:
    """Self-consistency (Wang et al. 2023): the first of the sampled answers that mean what most of them mean."""
    draw(agent, samples, records, config)
    for record in records:
        record.answer, record.outcome = dict(record.vote), "adapted"


def retry(agent: Agent, samples: Sequence[Sample], records: Sequence[Record], config: Config) -> None:
    """The first answer that passes the check which pairs must pass: the direct one, then sampled ones; else the direct one."""
    def fits(sample, text): return not check_calls(parse_calls(text).calls, sample)
    todo = [(sample, record) for sample, record in zip(samples, records) if not fits(sample, record.base["text"])]
    if todo:
        samples, records = zip(*todo)
        for sample, record, texts in zip(samples, records, draw(agent, samples, records, config)):
            record.answer = {"text": next((text for text in texts if fits(sample, text)), record.base["text"])}
            record.outcome = "adapted"


def draw(agent: Agent, samples: Sequence[Sample], records: Sequence[Record], config: Config,
         prompts: Sequence[tuple[Sequence[int], list[int]]] = ()) -> list[list[str]]:
    """`sampled_answers`, which the records keep, with the majority."""
    with stage(records, "sampled"):
        drawn = sampled_answers(agent, samples, config, prompts)
    for sample, record, texts in zip(samples, records, drawn):
        keys = meanings(sample, texts)
        record.sampled, record.vote = [{"text": text} for text in texts], {"text": texts[keys.index(Counter(keys).most_common(1)[0][0])]}
        record.tokens["sampled"] = count_tokens(agent, texts)
    return drawn


def sampled_answers(agent: Agent, samples: Sequence[Sample], config: Config,
                    prompts: Sequence[tuple[Sequence[int], list[int]]] = ()) -> list[list[str]]:
    """--samples answers for each sample, (B, N) texts. prompts: (head, rest) of each, where they are not the usual ones."""
    prompts = prompts or [agent.tokenizer.split_chat(call_prompt(s)) for s in samples]
    return sample_texts(agent.model, agent.tokenizer, agent.prefixes, prompts, config.max_new_tokens, config.temperature, config.top_p,
                        [[(config.seed, s.id, "sample", i) for i in range(config.samples)] for s in samples])


def meanings(sample: Sample, texts: Sequence[str]) -> list[tuple]:
    """What answers mean: equal for the same calls under `exact`."""
    return [calls_key(parse_calls(text).calls, sample.tools) for text in texts]


ASK_AGAIN = ("You were not sure of this answer. Think again from the start, and answer with nothing but the tool calls that the "
             "request needs.")


def with_sft(agent: Agent, samples: Sequence[Sample], records: Sequence[Record], config: Config) -> None:
    """SFT: the answers of the one adapter that `supervised` has trained."""
    for record in records:
        record.outcome, record.seconds["train"] = "adapted", round(agent.adapter_seconds, 4)
    answer_adapted(agent, samples, records, agent.adapter, replace(config, adapt="full"))     # which is how it was trained


def supervised(agent: Agent, config: Config) -> tuple[Params, dict]:
    """One adapter trained on the training split: AdamW, --epochs passes of shuffled batches of --train-batch, the mean loss over
    the answers' tokens, and the schedule and clipping of `fine_tune`. Also its seconds, and each step's loss and gradient norm."""
    start, told = time.perf_counter(), {"seconds": 0.0, "losses": [], "norms": []}
    model, tokenizer = agent.model, agent.tokenizer
    examples = [(tokenizer.chat(call_prompt(s)), [*tokenizer.encode(call_text(s.answers)), tokenizer.im_end]) for s in agent.training]
    params = new_adapters(agent, ["sft"], config)
    longest = max(len(prompt) + len(own) for prompt, own in examples)
    model.checkpointing = wants_checkpointing(model, config.train_batch * longest, config.checkpointing)
    shuffled = []
    for epoch in range(config.epochs):
        order = torch.randperm(len(examples), generator=seeded(config.seed, "sft", epoch)).tolist()
        shuffled += [order[i:i + config.train_batch] for i in range(0, len(order), config.train_batch)]
    with adapters(model, params, config.alpha) as tensors, tqdm(total=len(shuffled), unit="step", desc="sft", dynamic_ncols=True) as bar:
        optimizer = torch.optim.AdamW(tensors, weight_decay=0.0)
        for step, batch in enumerate(shuffled):
            rows = [examples[i] for i in batch]
            ids, _ = pad([[*prompt, *own[:-1]] for prompt, own in rows], model.device)        # padding is behind: nobody sees it
            read = torch.cat([h[len(prompt) - 1:][:len(own)] for h, (prompt, own) in zip(model(ids), rows)])
            loss = F.cross_entropy(model.logits(read), torch.tensor([token for _, own in rows for token in own], device=model.device))
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(tensors, 1.0)
            if not (loss.isfinite() and norm.isfinite()):
                raise ValueError(f"sft: the loss is not finite at step {step + 1}; lower --lr ({config.lr:g})")
            optimizer.param_groups[0]["lr"] = config.lr * schedule(step, len(shuffled), config.warmup)
            optimizer.step()
            bar.update()
            told["losses"].append(loss.item())
            told["norms"].append(norm.item())
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    return {name: tuple(t.detach() for t in pair) for name, pair in params.items()}, told | {"seconds": time.perf_counter() - start}


RIVALS = {"tticl": tticl, "vote": vote, "retry": retry, "again": prompted(ask_again), "icl": prompted(few_shot), "sft": with_sft}
UNGATED = ("icl", "sft", "retry")       # every sample's, whatever the gate: two learn from a training split, one has a gate of its own


def in_halves(work: Callable[[Sequence[Sample]], list[Record]], samples: Sequence[Sample],
              alone: Callable[[Sample, str], Record] | None = None) -> list[Record]:
    """The work on a batch, in halves where the memory or the model's context does not hold it. alone: what to do for a sample that
    fails by itself, told why; without it the error goes on."""
    try:
        return work(samples)
    except (torch.OutOfMemoryError, ContextError) as error:
        if len(samples) == 1 and not alone:
            raise
        why = "too long" if isinstance(error, ContextError) else "out of memory"
    if len(samples) == 1:                               # what the failed pass held is free by now
        return [alone(samples[0], why)]
    half = len(samples) // 2
    return in_halves(work, samples[:half], alone) + in_halves(work, samples[half:], alone)


def improve_or_keep(agent: Agent, samples: Sequence[Sample], config: Config, known: Mapping[str, dict]) -> list[Record]:
    """`self_improve`, with smaller batches where need be; a sample that cannot be adapted alone keeps its direct answer."""
    def records_of(part): return [Record(**copy.deepcopy(known[s.id])) for s in part] if all(s.id in known for s in part) else []

    def keep(sample, why):
        record, = records_of([sample]) or assess(agent, [sample], config)
        decide(record, config)
        forget(record)
        record.outcome = why
        return record
    return in_halves(lambda part: self_improve(agent, part, config, records_of(part)), samples, keep)


def reads(config: Config) -> tuple[tuple, tuple, tuple]:
    """The options that H, G and T read, each: where they agree, two runs of one model and data find the same."""
    drawn = (config.seed, config.temperature, config.top_p)
    needs = {SCORES[name].needs for name in (*choose_scores(config.scores), config.gate_score)} - {""}
    return ((config.scores, config.gate_score, config.max_new_tokens, *((*drawn, config.samples) if needs else ())),
            (*drawn, config.k, config.pair, config.filter, config.pairs, config.teacher, config.teacher_model),
            (config.method, config.adapt, config.rank, config.alpha, config.targets, config.epochs, config.lr, config.warmup, config.kl,
             config.vote and config.samples, config.reset))


def recall(line: dict, then: Config, now: Config) -> dict | None:
    """What a record of the run `then` knows for the run `now`, as a record without verdicts: nothing, H, H and G, or all."""
    (h, g, t), (h_now, g_now, t_now) = reads(then), reads(now)
    if h != h_now:
        return None
    writes = ("ttsi", "ttd", "tticl")
    wrote = g == g_now and then.method in writes and now.method in writes and then.reset == "sample" and "pairs" in line["seconds"]
    learnt = wrote and t == t_now and line["outcome"] == "adapted"
    record = asdict(Record(line["id"])) | {name: line[name] for name in ("request", "margin", "gate", "scores", "candidates")}
    def text(part): return {"text": part["text"]} if part else {}
    record |= {"base": text(line["base"]), "answer": text(line["answer" if learnt else "base"])}
    record |= {name: line[name] for name in ("pairs", "rejected") if wrote}
    if learnt:
        record |= {name: line[name] for name in ("losses", "norms", "kl")}
        record |= {"vote": text(line["vote"]), "sampled": list(map(text, line["sampled"]))}
    stages = (*H_STAGES, *["pairs"] * wrote, *["train", "answer", "sampled"] * learnt)
    for name in ("seconds", "tokens"):
        record[name] = {stage: value for stage, value in line[name].items() if stage in stages}
    return record


# --------------------------------------------------------------------------------------------------- the run folder

def write_json(path: Path, value) -> None:
    """Write a file whole or not at all: to a temporary name, synced, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def facts(model: Qwen2, samples: Sequence[Sample]) -> dict[str, str]:
    """What a run's numbers depend on besides its configuration: digests of data, weights and code, and versions."""
    root = Path(__file__).parent
    code = b"".join(path.read_bytes() for path in sorted((*root.glob("*.py"), *root.glob("data/*.py"))))
    return {"data": evaluate.digest(samples), "weights": fingerprint(model), "code": hashlib.sha256(code).hexdigest(),
            "torch": torch.__version__, "python": sys.version.split()[0]}


def clear(folder: Path) -> None:
    """--overwrite: delete what a run has written into its folder. facts.json, which tells that it is one, goes last."""
    if (folder / "facts.json").is_file():
        for old in (folder / "adapter", *folder.glob("stream-*")):
            shutil.rmtree(old, ignore_errors=True)
        for old in (*evaluate.record_files(folder), *folder.glob("assessed-*.jsonl"),
                    *(folder / f"{name}.json" for name in ("sft", "config", "summary", "facts"))):
            old.unlink(missing_ok=True)


def open_run(folder: Path, config: Config, now: dict[str, str]) -> None:
    """Make the run folder, or go on in it. ValueError if it holds a run of another configuration, data or weights.

    What a kill may have left is mended: a torn last line is cut off, and records of other ranks move to records.jsonl.
    """
    if not (folder / "config.json").is_file() and evaluate.record_files(folder):
        raise ValueError(f"{folder} holds records but no config.json: choose another --out, or delete the folder")
    free = [name for name in evaluate.FREE if name != "limit" or not needs_all(config)]     # else the gate depends on which samples there are
    if (folder / "config.json").is_file():
        before = evaluate.read_json(folder / "config.json")
        other = [f"{name} is {before.get(name)!r} there, {value!r} now" for name, value in asdict(config).items()
                 if name not in free and before.get(name) != value]
        then = evaluate.read_json(folder / "facts.json", evaluate.FACTS) if (folder / "facts.json").is_file() else now
        other += [f"the {name} changed" for name in ("data", "weights", *USES) if then.get(name) != now.get(name)]
        if other:
            raise ValueError(f"{folder} holds a run of another configuration ({'; '.join(other)}): choose another --out, "
                             "or start it anew with --overwrite")
        for name in ("code", "torch", "python"):
            if (last := then[name].split()[-1]) != now[name]:
                print(f"{folder}: the run was begun with {name} {last:.12}, it goes on with {now[name]:.12}")
                now = {**now, name: f"{then[name]} {now[name]}"}        # all that had a part in it
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", asdict(config))
    write_json(folder / "facts.json", {"config": evaluate.digest_file(folder / "config.json"), **now})
    append(folder / "records.jsonl", b"")
    for path in (*evaluate.record_files(folder), *folder.glob("assessed-*.jsonl")):
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):                       # the process was killed in the middle of its last write
            print(f"{path}: the last line is torn and is cut off; that sample is computed again")
            os.truncate(path, whole)
    merge(folder)


def merge(folder: Path) -> None:
    """Move the records of further ranks into records.jsonl. What a kill leaves twice is read once, by its id."""
    for path in folder.glob("records-*.jsonl"):
        append(folder / "records.jsonl", path.read_bytes())
        path.unlink()


def append(path: Path, content: bytes) -> None:
    """Add to a file in one write, flushed and synced: a kill loses at most this one."""
    try:
        with open(path, "ab", buffering=0) as file:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); what is finished is kept, and once that is mended "
                      "the same command goes on") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into the run folder at the same time; the lock dies with this process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is running there; wait for it, or choose another --out") from None
        yield


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """This process's rank and how many there are: (0, 1), or what torchrun says."""
    if not dist.is_torchelastic_launched():
        yield 0, 1
        return
    # Gloo on GPUs, too: no tensor travels, the ranks only wait for one another, the first for as long as a run takes.
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def wait_for_all(world: int) -> None:
    """Wait until every rank is here; KeyboardInterrupt if one has ended before."""
    try:
        if world > 1:
            dist.barrier()
    except RuntimeError as error:
        raise KeyboardInterrupt from error


def needs_all(config: Config) -> bool:
    """Whether the gate can be told only when H has seen all samples."""
    return config.tau == "auto" or config.budget > 0 or config.gate in ("random", "oracle") or config.teacher_apart


def look_ahead(agent: Agent, samples: Sequence[Sample], config: Config, folder: Path, rank: int, world: int,
               known: dict[str, dict]) -> Config:
    """H over all samples, then tau (--budget, --tau auto) and whom --gate random and oracle let through. Gives the config with
    that tau and puts the records so far into `known`; assessed-<rank>.jsonl keeps them, so nothing of H is computed twice."""
    def assessed():         # of one sample's lines the last one, but rather one with pairs (--teacher-apart)
        lines = [line for path in sorted(folder.glob("assessed-*.jsonl")) for line in map(json.loads, path.open())]
        return {line["id"]: line for line in sorted(lines, key=lambda line: "pairs" in line["seconds"])}
    done = known | assessed()
    share = [sample for sample in samples if sample.id not in done][rank::world]
    wait_for_all(world)                                 # all have read what is there before anyone adds to it
    with tqdm(total=len(share), unit="sample", desc="H", dynamic_ncols=True, disable=rank > 0) as bar:
        for batch in batches(agent, share, config):
            found = in_halves(lambda part: assess(agent, part, config), [sample.without_answers() for sample in batch])
            append(folder / f"assessed-{rank}.jsonl", b"".join((json.dumps(asdict(record)) + "\n").encode() for record in found))
            bar.update(len(batch))
    wait_for_all(world)
    known.update(assessed())
    if config.tau == "auto" or config.budget:
        values = [known[sample.id]["scores"][config.gate_score] for sample in samples]
        threshold = threshold_between(values, round(config.budget * len(values))) if config.budget else otsu(values)
        config = replace(config, tau=min(1.0, max(0.0, 1 - threshold)) if config.gate_score == "margin" else threshold, budget=0.0)
    records = {sample.id: Record(**known[sample.id]) for sample in samples}
    for record in records.values():
        decide(record, config)
    through = {id for id, record in records.items() if record.acted}
    if config.gate == "random":
        order = sorted(records, key=lambda id: seeded(config.seed, id, "gate").initial_seed())
        through = set(order[:sum(record.uncertain for record in records.values())])
    elif config.gate == "oracle":                       # uses labels
        through = {sample.id for sample in samples if not evaluate.exact_match(records[sample.id].base["text"], sample).exact}
    for id in records:
        known[id]["acted"] = id in through
    return config


def teach_apart(agent: Agent, share: Sequence[Sample], config: Config, folder: Path, rank: int, known: dict[str, dict]) -> None:
    """--teacher-apart: the teacher's pairs for this rank's samples that need some, into `known` and into assessed-<rank>.jsonl."""
    records = {sample.id: Record(**known[sample.id]) for sample in share}
    for record in records.values():
        decide(record, config)
    todo = [sample for sample in share if records[sample.id].acted and "pairs" not in records[sample.id].seconds]
    if not todo:
        return
    device, parts = agent.model.device, list(batches(agent, todo, config))
    agent.prefixes.caches.clear()
    agent.model.to("cpu")
    teaching = replace(agent, teacher=load_teacher(config, device)[0])

    def write(part):
        write_pairs(teaching, [(sample.without_answers(), records[sample.id]) for sample in part], config)
        return [records[sample.id] for sample in part]

    def no_pair(sample, why):
        record = records[sample.id]
        record.seconds["pairs"], record.rejected = 0.0, [{"text": "", "reason": why}]
        return record
    with tqdm(total=len(todo), unit="sample", desc="teacher", dynamic_ncols=True, disable=rank > 0) as bar:
        for batch in parts:
            found = in_halves(write, batch, no_pair)
            known.update({record.id: asdict(record) for record in found})
            append(folder / f"assessed-{rank}.jsonl", b"".join((json.dumps(asdict(record)) + "\n").encode() for record in found))
            bar.update(len(batch))
    del teaching                                        # its memory is for the student
    agent.model.to(device)


def run(agent: Agent, samples: Sequence[Sample], config: Config, folder: Path, rank: int = 0, world: int = 1,
        known: dict[str, dict] | None = None) -> None:
    """Algorithm 1 over this rank's share of the samples that have no record yet, a line each in its own file. known: what other
    runs have found out (`recall`)."""
    records, known = {record["id"]: record for record in evaluate.read_records(folder)}, {} if known is None else known
    path = folder / ("records.jsonl" if rank == 0 else f"records-{rank}.jsonl")
    share = [sample for sample in samples if sample.id not in records][rank::world]
    agent = with_adapter(agent, config, folder, len(records), len(samples), rank, world)
    config = look_ahead(agent, samples, config, folder, rank, world, known) if needs_all(config) else config
    if config.teacher_apart:
        teach_apart(agent, share, config, folder, rank, known)
    wait_for_all(world)                                 # all have read what is there before anyone adds to it
    tally = Counter()
    def count(record): tally.update(base=record["base"]["exact"], now=record["answer"]["exact"], adapted=record["outcome"] == "adapted")
    for record in records.values():
        count(record)
    with tqdm(initial=len(records), total=len(records) + len(share), unit="sample", dynamic_ncols=True, disable=rank > 0) as bar:
        for batch in batches(agent, share, config):
            lines, seen = [], [sample if config.pairs == "gold" else sample.without_answers() for sample in batch]
            for sample, record in zip(batch, improve_or_keep(agent, seen, config, known)):
                for part in filter(None, (record.base, record.answer, record.vote, *record.sampled)):
                    part.update(asdict(evaluate.exact_match(part["text"], sample)))
                record.gold, record.reachable = call_text(sample.answers), evaluate.reachable(sample)
                records[sample.id] = asdict(record)
                count(records[sample.id])
                lines.append((json.dumps(records[sample.id]) + "\n").encode())
                if config.verbose:
                    bar.write(evaluate.story(records[sample.id]) + "\n")
            if config.reset == "never" and agent.adapter:
                save_adapter(folder / f"stream-{len(records)}", agent.adapter, config.alpha)
            append(path, b"".join(lines))
            if config.reset == "never":                 # by now the records say that the newer one is right
                shutil.rmtree(folder / f"stream-{len(records) - 1}", ignore_errors=True)
            bar.update(len(batch))
            bar.set_postfix_str(", ".join(f"{name} {right / len(records):.0%}" for name, right in tally.items()))


def with_adapter(agent: Agent, config: Config, folder: Path, count: int, n: int, rank: int, world: int) -> Agent:
    """The agent with the adapter that it has before its next sample, the first of n after `count`: that of sft, trained now if the
    run folder does not have it yet, or with --reset never what the samples so far have taught."""
    agent = replace(agent, training=agent.training[:config.train_limit or None])
    if config.method == "sft":
        if rank == 0 and not (folder / "adapter" / "adapter_config.json").is_file():
            params, told = supervised(agent, config)
            write_json(folder / "sft.json", told)
            save_adapter(folder / "adapter", params, config.alpha, base_model=config.model)
        wait_for_all(world)
        return replace(agent, adapter=load_adapter(folder / "adapter", agent.model)[0], adapter_seconds=evaluate.read_json(folder / "sft.json")["seconds"] / n)
    if config.reset == "never" and world > 1:
        raise ValueError("--reset never: one adapter learns from sample to sample, so there can be but one process")
    kept = folder / f"stream-{count}"
    if config.reset == "never" and not kept.is_dir() and any(record["losses"] for record in evaluate.read_records(folder)):
        raise ValueError(f"{folder}: what its samples have taught is not there ({kept.name}): start anew with --overwrite")
    if config.reset == "never" and kept.is_dir():
        params = load_adapter(kept, agent.model)[0]
        return replace(agent, adapter={name: tuple(t.requires_grad_() for t in pair) for name, pair in params.items()})
    return replace(agent, adapter={})


def batches(agent: Agent, samples: Sequence[Sample], config: Config) -> Iterator[list[Sample]]:
    """The samples in batches of --batch; by default one by one on a CPU, and as many as BATCH_TOKENS hold on a GPU."""
    if size := 1 if config.reset == "never" else config.batch or int(agent.model.device.type == "cpu"):
        yield from (list(samples[i:i + size]) for i in range(0, len(samples), size))
        return
    batch, longest = [], 0
    for sample in samples:
        length = len(agent.tokenizer.chat(call_prompt(sample)))
        if batch and max(longest, length) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch, longest = [], 0
        batch, longest = [*batch, sample], max(longest, length)
    if batch:
        yield batch


# ------------------------------------------------------------------------------------------------- the command line

def parse_args(argv: Sequence[str] | None) -> list[tuple[Config, str]]:
    """The command line as a Config, one flag a field, grouped by the phases of Algorithm 1; with --sweep as many as that asks for.
    Each with the name of its part of the sweep, "" without one."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for f in fields(Config):
        if f.metadata["group"] not in groups:
            groups[f.metadata["group"]] = parser.add_argument_group(f.metadata["group"])
        group = groups[f.metadata["group"]]
        text = (f.metadata["help"] + ("" if f.default in ("", False, 0.0) else f" (default: {f.default})")).replace("%", "%%")
        flag = "--" + f.name.replace("_", "-")
        if isinstance(f.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            choices = f.metadata.get("choices")
            group.add_argument(flag, type=f.metadata.get("type", type(f.default)), default=f.default, choices=choices, help=text,
                               metavar=f.metadata.get("metavar", None if choices else f.name.upper()))
    parser.add_argument("--sweep", action="append", default=[], metavar="NAME=V,V,...", help="a run for each value of an option, one after "
                        "another, each in a folder of its own; what they share is computed once. Given again: each with each. Values of "
                        "targets are parted by ';'. Options: " + ", ".join(name.replace("_", "-") for name in SWEEPABLE))
    given = vars(parser.parse_args(argv))
    swept = [read_sweep(text) for text in given.pop("sweep")]
    if twice := [name for name, _ in swept if [other for other, _ in swept].count(name) > 1]:
        raise ValueError(f"--sweep {twice[0]}: given twice; write all its values behind one")
    configs = []
    for values in product(*(values for _, values in swept)):
        changed = {name: value for (name, _), value in zip(swept, values)}
        options = given | changed
        unused = {name: methods for name, methods in (USES | ONLY_FOR).items()
                  if options["method"] not in methods and options[name] != getattr(Config, name)}
        if swept:                                       # of several methods, each is given what it looks at
            options |= {name: getattr(Config, name) for name in unused}
        elif unused:
            name, methods = next(iter(unused.items()))
            raise ValueError(f"--{name.replace('_', '-')}: --method {options['method']} does not look at it; what does: {', '.join(methods)}")
        config = Config(**options)
        if config not in [other for other, _ in configs]:           # as base with another k
            configs.append((config, "+".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in changed.items())))
    if idle := [flag for flag in USES if given[flag] and not any(getattr(config, flag) for config, _ in configs)]:
        raise ValueError(f"--{idle[0].replace('_', '-')}: no run of the sweep uses it")
    return configs


SWEEPABLE = ("method", "seed", "tau", "budget", "gate", "gate_score", "k", "pair", "filter", "pairs", "temperature", "adapt", "rank", "alpha",
             "targets", "epochs", "lr", "reset", "samples", "train_limit")


def read_sweep(text: str) -> tuple[str, list]:
    """("tau", [0.35, 0.95]) of "tau=0.35,0.95"; ValueError if it is none."""
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in SWEEPABLE or not values:
        raise ValueError(f"--sweep {text}: write NAME=VALUE,VALUE,... with NAME one of {', '.join(SWEEPABLE)}")
    f, = (f for f in fields(Config) if f.name == name)
    try:
        values = [f.metadata.get("type", type(f.default))(value.strip()) for value in values.split(";" if name == "targets" else ",")]
    except ValueError:
        raise ValueError(f"--sweep {text}: a value of {name} is to be a {type(f.default).__name__}") from None
    if wrong := [value for value in values if f.metadata.get("choices") and value not in f.metadata["choices"]]:
        raise ValueError(f"--sweep {text}: {name} is one of {', '.join(f.metadata['choices'])}, not {wrong[0]}")
    return name, list(dict.fromkeys(values))


def choose(config: Config, part: str = "") -> tuple[Config, str]:
    """Fill in what the user left open, and a line that says what was chosen, why, and the flag that changes it. part: of a sweep."""
    cuda = torch.cuda.is_available()
    device = (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu") if config.device == "auto" else config.device
    if config.model:
        model, why = config.model, "as --model says"
    elif device.startswith("cuda"):
        model, why = "Qwen/Qwen2.5-1.5B-Instruct", "there is a CUDA device; --model changes it"
    else:
        model, why = "tiny", f"{'--device ' + device if cuda else 'no CUDA device was found'}; --model changes it"
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if config.dtype == "auto" else config.dtype
    source = "bundled" if model == "tiny" and not config.data else config.data
    name = "the bundled tiny model" if model == "tiny" else model
    samples = "bundled samples (this project's own, not the benchmark; --data FILE runs the real one)" if source == "bundled" \
        else "the real samples" + (f" in {source}" if source else "")
    out = config.out or f"runs/{config.bench}-{Path(model).name}-" + ("sweep" if part else f"{config.method}-s{config.seed}")
    chosen = {**asdict(config), "model": model, "device": device, "dtype": dtype, "data": source, "out": str(Path(out, part)),
              "lr": config.lr or (TINY_LR if model == "tiny" else 1e-4)}
    return Config(**chosen), f"{config.bench}: {name} ({why}) on {samples}; {device}, {dtype}"


def set_up(configs: Sequence[Config]) -> tuple[Agent, list[Sample], dict[str, str]]:
    """Load samples, tokenizer and model, and their facts; ValueError, FileNotFoundError or ConnectionError in one sentence.
    configs: of one sweep, so they agree in all that is loaded."""
    config = configs[0]
    everything = evaluate.samples_of(asdict(config))
    samples = everything[:config.limit or None]
    folder = TINY if config.model == "tiny" else find_checkpoint(config.model, config.offline)
    if config.model == "tiny":
        torch.set_num_threads(1)                        # on matrices this small, more threads only get in the way
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {config.device}: not usable here ({str(error).splitlines()[0]})") from error
    tokenizer = Tokenizer(folder)
    model = load_model(folder, device, getattr(torch, config.dtype))
    for each in configs:
        targeted(model, each.targets.split(","))        # a target that names no layer is found now, not at the first adapter
    room = model.config.max_position_embeddings - config.max_new_tokens
    for sample in samples:
        if (length := len(tokenizer.chat(call_prompt(sample)))) > room:
            raise ValueError(f"{sample.id}: its prompt of {length} tokens and an answer of {config.max_new_tokens} exceed the "
                             f"model's context of {model.config.max_position_embeddings}: lower --max-new-tokens, or leave it out")
    if config.adapter:
        merge_adapter(model, *load_adapter(Path(config.adapter), model))
    pack(model, config)
    found, agent = facts(model, everything), Agent(model, tokenizer, PrefixCaches(model), others=tuple(s.without_answers() for s in everything))
    if len(everything) < 2 and any(each.pairs == "unrelated" for each in configs):
        raise ValueError("--pairs unrelated: there is no other sample")
    if teaching := [each for each in configs if each.teacher]:
        if teaching[0].teacher_apart:
            found["teacher"] = teaching[0].teacher
        else:
            writer, found["teacher"] = load_teacher(teaching[0], device)
            agent = replace(agent, teacher=writer)
    if path := max(each.train_data for each in configs):
        agent = replace(agent, training=tuple(data.load(config.bench, path)))
        found["train_data"] = evaluate.digest(agent.training)
        def said(sample): return "".join(c for m in sample.messages for c in m["content"].casefold() if c.isalnum())
        if shared := set(map(said, agent.training)) & set(map(said, everything)):
            raise ValueError(f"--train-data {path}: {len(shared)} of its requests are test samples")
    return agent, samples, found


def pack(model: Qwen2, config: Config) -> None:
    """--pack, where it is of use: a small model's time goes into calls, not into products."""
    if config.pack and model.device.type == "cpu" and model.config.hidden_size > 512 and torch.backends.mkldnn.is_available():
        model.pack()


def load_teacher(config: Config, device: torch.device) -> tuple[Writer, str]:
    """Who writes the pairs of TT-D, and what tells it from another: the digest of its weights, or its address and name."""
    if config.teacher_model:
        return RemoteWriter(config.teacher, config.teacher_model), f"{config.teacher} {config.teacher_model}"
    folder = TINY if config.teacher == "tiny" else find_checkpoint(config.teacher, config.offline, "--teacher")
    model = load_model(folder, device, getattr(torch, config.dtype))
    pack(model, config)
    return local_writer(model, Tokenizer(folder), PrefixCaches(model)), fingerprint(model)


def work(configs: Sequence[Config], sweep: bool, rank: int, world: int) -> int:
    """One process's part of the program: the runs one after another, and for rank 0 the tables; its exit code."""
    agent, samples, now = set_up(configs)
    def stop(*_): raise KeyboardInterrupt
    for number in (signal.SIGINT, signal.SIGTERM):      # also where a shell's background job ignores SIGINT
        signal.signal(number, stop)
    if rank == 0 and configs[0].overwrite:
        for config in configs:
            with locked(Path(config.out)):
                clear(Path(config.out))
    for config in configs:
        # what lies beside is used, too, but not by a sweep that starts anew
        beside = [Path(each.out) for each in configs] if config.overwrite else Path(config.out).parent.glob("*")
        if code := one_run(agent, samples, now, config, list(beside) if sweep else [], rank, world):
            return code
    if rank == 0:
        print(evaluate.report(evaluate.read_runs([Path(config.out) for config in configs]), brief=len(configs) == 1))
        print(closing_line(evaluate.read_records(Path(config.out)), Path(config.out)))
    return 0


def known_from(folders: Sequence[Path], now: dict[str, str], config: Config) -> dict[str, dict]:
    """The most that is known of each sample from those of the runs that have ended, of the same samples, weights and code:
    what a sweep has computed, now or before."""
    known: dict[str, dict] = {}
    for folder in sorted(folders):
        facts = evaluate.read_json(folder / "facts.json") if (folder / "facts.json").is_file() else {}
        if "weights_after" not in facts or any(facts.get(key, now.get(key)) != now.get(key) for key in ("data", "weights", "code", "torch", "teacher")):
            continue
        then = Config(**evaluate.read_json(folder / "config.json"))
        for line in evaluate.read_records(folder):
            record = recall(line, then, config)
            if record and len(record["seconds"]) > len(known.get(line["id"], {"seconds": ()})["seconds"]):
                known[line["id"]] = record
    return known


def one_run(agent: Agent, samples: list[Sample], now: dict[str, str], config: Config, beside: Sequence[Path], rank: int, world: int) -> int:
    """A run in its folder, from where it was, with what others beside it know; its exit code."""
    folder = Path(config.out)
    with locked(folder) if rank == 0 else nullcontext():
        if rank == 0:
            open_run(folder, config, {key: value for key, value in now.items() if key not in USES or getattr(config, key)})
            if done := len(evaluate.read_records(folder)):
                print(f"{folder}: going on after {done} finished samples (--overwrite starts anew)")
        interrupted = False
        try:
            wait_for_all(world)
            run(agent, samples, config, folder, rank, world, known_from([other for other in beside if other != folder], now, config))
            if fingerprint(agent.model) != now["weights"]:
                raise ValueError("the base weights have changed during the run: its records are not to be trusted")
            wait_for_all(world)
        except KeyboardInterrupt:
            interrupted = True
        if rank > 0:
            return 130 if interrupted else 0
        if not interrupted:                             # else another rank may still be at its last record
            merge(folder)
            write_json(folder / "facts.json", {**evaluate.read_json(folder / "facts.json"), "weights_after": now["weights"]})
        records = evaluate.read_records(folder)
        if not interrupted and (lacking := {sample.id for sample in samples} - {record["id"] for record in records}):
            raise ValueError(f"{folder}: {len(lacking)} samples have no record; the same command computes them")
        if records:
            write_json(folder / "summary.json", evaluate.summarise(records))
        if interrupted:
            print(evaluate.report(evaluate.read_runs([folder]), brief=True) if records else "")
            print(f"Interrupted after {len(records)} of {len(samples)} samples: the same command goes on from here"
                  + (" (without --overwrite)." if config.overwrite else "."))
            return 130
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code: 0, 1 out of memory, 2 for a mistake of the user's, 130 when interrupted."""
    try:
        parts = parse_args(argv)
        configs, lines = zip(*(choose(*part) for part in parts))
        with ranks() as (rank, world):
            if rank == 0:
                print(lines[0], flush=True)
            return work(configs, bool(parts[0][1]), rank, world)
    except KeyboardInterrupt:                           # before the first run began; `one_run` tells of later ones
        return 130
    except (ValueError, OSError) as error:              # FileNotFoundError and ConnectionError are OSErrors
        print(f"train.py: error: {evaluate.printable(str(error))}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:             # not while adapting, which can be left out
        print(f"train.py: error: {str(error).splitlines()[0]} What is finished is kept: the same command goes on, "
              "for instance with --dtype bfloat16 or on another device", file=sys.stderr)
        return 1


def closing_line(records: list[dict], folder: Path) -> str:
    """What to try next."""
    changed = next((r for r in records if r["base"]["exact"] != r["answer"]["exact"]), None) or \
        next((r for r in records if r["outcome"] == "adapted"), records[0])
    return f"Next: python evaluate.py {folder} --sample {changed['id']}    tells that sample's story."


if __name__ == "__main__":
    sys.exit(main())
