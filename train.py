"""T, and the whole of TT-SI: Algorithm 1 over a benchmark, one sample after another.

    python train.py --bench nexusraven                              # the bundled demonstration, or the real job on a GPU
    python train.py --bench sealtool --model Qwen/Qwen2.5-1.5B-Instruct --seed 1
    python train.py --bench toolalpaca --model ~/models/qwen --adapt suffix --limit 20 --verbose
    torchrun --nproc-per-node 4 train.py --bench apibank            # the samples shared among 4 processes, one GPU each
    python evaluate.py runs/*                                       # the table of several runs

A run can be stopped at any moment: the same command, with any number of processes, goes on where it was.
"""
import argparse
import datetime
import errno
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import evaluate
from augment import check_calls, request_text, sample_texts, synthesize, with_request
from data import Sample, call_prompt, call_text
from data.calls import calls_key, parse_calls
from lora import TARGETS, Params, adapters, keep_rows, new_params, targeted
from model import ContextError, KVCache, PrefixCaches, Qwen2, Tokenizer, find_checkpoint, fingerprint, generate, load_model, pad, seeded
from uncertainty import ORDERS, SCORES, Evidence, answer_parts, choose_scores, entropy_of, name_lengths, otsu, score_candidates, \
    softmax_difference, threshold_between

TINY = Path(data.__file__).parent / "tiny"
TINY_LR = 2e-3          # ours: five steps of 1e-4 hardly move a model of 2.4 million parameters
BATCH_TOKENS = 1 << 15  # of the prompts that are adapted to together on a GPU


def option(default, text: str, group: str, **more):
    """A field of Config with what its command-line flag needs to know."""
    return field(default=default, metadata={"help": text, "group": group, **more})


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
                         "retry: sampled again until an answer fits the tools' schema; again: asked once more", "what to run",
                         choices=("base", "ttsi", "ttd", "tticl", "vote", "retry", "again"))
    teacher: str = option("", "for ttd: hub id or folder of the model that writes the pairs, such as a larger Qwen2.5", "what to run")
    seed: int = option(0, "seeds every draw, together with the sample's id", "what to run")
    limit: int = option(0, "only the first N samples (0: all)", "what to run")
    tau: float | str = option(0.95, "uncertain where the softmax difference is below tau, in [0, 1] (with another --gate-score: "
                              "where the score is above tau); auto: chosen without labels (Otsu's rule)", "H, uncertainty",
                              type=lambda text: text if text == "auto" else float(text))
    budget: float = option(0.0, "choose tau, without labels, so that this share of the samples is uncertain, in (0, 1]; "
                           "u = 1, as with a single tool, is never uncertain",
                           "H, uncertainty")
    gate: str = option("score", "which samples a method acts on: those that the score finds uncertain, or, as controls: all, or certain, "
                       "only those that it is sure of", "H, uncertainty", choices=("score", "all", "certain"))
    gate_score: str = option("margin", "the score that decides (1 - the softmax difference is 'margin')", "H, uncertainty",
                             choices=tuple(SCORES), metavar="NAME")
    scores: str = option("cheap", "the scores to record: cheap (no pass more), all, or names with commas", "H, uncertainty")
    k: int = option(1, "synthetic pairs for each uncertain sample", "G, synthetic pairs")
    pair: str = option("request", "joint (paper): request and call in one go; request (ours): the request, then the majority "
                       "of sampled calls that fit the schema", "G, synthetic pairs", choices=("joint", "request"))
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
    samples: int = option(5, "answers sampled, at --temperature, for vote, for retry, and for the scores of sampled answers",
                          "answers and run folder")
    batch: int = option(0, "samples adapted together, each with its own adapter (0: 1 on a CPU, on a GPU as many as fit "
                        f"{BATCH_TOKENS} prompt tokens); changes results by rounding only", "answers and run folder")
    max_new_tokens: int = option(256, "longest answer, in tokens", "answers and run folder")
    out: str = option("", "run folder (default: runs/<bench>-<model>-<method>-s<seed>)", "answers and run folder")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...", "answers and run folder")
    dtype: str = option("auto", "of the base weights; auto: bfloat16 on a GPU, float32 on a CPU", "answers and run folder",
                        choices=("auto", "float32", "bfloat16"))
    offline: bool = option(False, "never download anything", "answers and run folder")
    verbose: bool = option(False, "tell each sample's story as it ends", "answers and run folder")
    overwrite: bool = option(False, "start anew in a run folder that exists", "answers and run folder")

    def __post_init__(self):
        choose_scores(self.scores)
        if (self.method == "ttd") != bool(self.teacher):
            raise ValueError("--method ttd needs --teacher, the model that writes the pairs" if self.method == "ttd" else
                             f"--teacher {self.teacher}: only --method ttd has a teacher")
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
                *((name, getattr(self, name) >= 1, "1 or more") for name in ("k", "rank", "epochs", "max_new_tokens", "samples"))):
            if not holds:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {allowed}")


FREE = ("limit", "batch", "out", "device", "offline", "verbose", "overwrite")     # may differ when a run goes on


@dataclass
class Record:
    """What happened to one sample: a line of records.jsonl. Verdicts are added after the method has finished."""
    id: str
    request: str = ""
    margin: float = math.nan                                    # u(x), the softmax difference
    uncertain: bool = False
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
    sampled: list = field(default_factory=list)                 # the sampled answers of vote and retry: text, exact, reason, ...
    gold: str = ""                                              # filled with the verdicts, for the reader
    reachable: bool = True                                      # whether the gold's tools are all on offer
    seconds: dict[str, float] = field(default_factory=dict)     # stage -> s
    tokens: dict[str, int] = field(default_factory=dict)        # stage -> tokens read (prefill, train) or written (base, answer)


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
    """The frozen model M with its tokenizer and the KV caches of the prefixes that it has read, and its teacher if it has one."""
    model: Qwen2
    tokenizer: Tokenizer
    prefixes: PrefixCaches
    teacher: "Agent | None" = None


Example = tuple[list[int], list[int]]       # prompt ids, answer ids; the loss is on the answer's


def fine_tune(agent: Agent, examples: Sequence[Sequence[Example]], params: Params, config: Config,
              prefix: KVCache | None = None) -> list[list[float]]:
    """T: train the B adapters that are on the model, each on its own examples, as B independent problems in one pass:
    own loss, own gradient norm, own AdamW and schedule. Gives the loss of each step of each row, nats a token.

    prefix: what the rows' prompts continue, read with the base weights (--adapt suffix), or None (full). A row whose loss
    or gradient is not finite stops there, with a last loss of NaN; the others go on.
    """
    model, device = agent.model, agent.model.device
    tensors = [tensor for pair in params.values() for tensor in pair]                       # (B, ...) each
    means, squares = [torch.zeros_like(t) for t in tensors], [torch.zeros_like(t) for t in tensors]
    steps, losses = [config.epochs * len(own) for own in examples], [[] for _ in examples]
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
        for own, value, ok, on in zip(losses, loss.tolist(), finite, going):
            own += [value if ok else math.nan] * on
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
    return losses


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate at a step (from 0): linear warm-up, then half a cosine down to 0."""
    # ours: the warm-up is rounded down. The usual scheduler rounds it up to a whole step of learning rate 0, which
    # of five steps would be one that does nothing.
    warm = int(warmup * steps)
    if step < warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def answer(agent: Agent, prompts: Sequence[list[int]], config: Config, cache: KVCache | None = None,
           watch: Callable | None = None) -> list[tuple[dict, int]]:
    """Greedy decoding of the answers to prompts, which continue `cache`, by adapters where there are any; and their lengths."""
    rows = generate(agent.model, prompts, agent.tokenizer.eos, config.max_new_tokens, cache, watch=watch,
                    keep=lambda places: keep_rows(agent.model, places))
    return [({"text": agent.tokenizer.decode(ids)}, len(ids)) for ids in rows]


def assess(agent: Agent, samples: Sequence[Sample], config: Config) -> list[Record]:
    """H and the direct answer, for test samples without their answers: how sure is the model of each?"""
    model, tokenizer = agent.model, agent.tokenizer
    records, caches, last, evidence = [], [], [], []
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
    steps = [[] for _ in samples]                                       # of each row: (token, -log p, entropy) of each step

    def watch(rows: list[int], logits: torch.Tensor) -> None:
        log_p = logits.float().log_softmax(-1)
        best = log_p.max(-1)
        for row, *step in zip(rows, best.indices.tolist(), (-best.values).tolist(), entropy_of(log_p.exp()).tolist()):
            steps[row].append(step)
    with stage(records, "base"):                                        # always there, so that a run shows before and after
        answers = answer(agent, last, config, KVCache.stack(caches), watch)
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
    """The gate: whether u(x) < tau, or another score is above it; where that is not defined, nothing is sure."""
    record.tau = config.tau
    record.uncertain = record.margin < config.tau if config.gate_score == "margin" else not record.scores[config.gate_score] <= config.tau
    record.outcome = "direct" if record.uncertain else "certain"


def self_improve(agent: Agent, samples: Sequence[Sample], config: Config, records: Sequence[Record] = ()) -> list[Record]:
    """Algorithm 1 for a batch of test samples (without their answers), each on its own: an outcome does not depend on the
    others. The base weights are the same bits before and after. records: what `assess` gave, where that is known."""
    model, tokenizer = agent.model, agent.tokenizer
    records = records or assess(agent, samples, config)                                       # l.2-3  H: u(x_i)
    for record in records:
        decide(record, config)                                                                # l.4  sure enough: answer as is
    todo = [(sample, record) for sample, record in zip(samples, records)
            if config.gate == "all" or record.uncertain == (config.gate == "score")]
    if not todo or config.method == "base":
        return records
    if config.method in RIVALS:
        RIVALS[config.method](agent, *zip(*todo), config)
        return records
    with stage([record for _, record in todo], "pairs"):                                      # l.5  G: K new (x', y')
        writer = agent.teacher or agent                                 #     TT-D: a stronger model writes them
        written = synthesize(writer.model, writer.tokenizer, writer.prefixes, [sample for sample, _ in todo], config.k, config.pair,
                             config.temperature, config.top_p, config.seed)
    for (_, record), (pairs, rejected) in zip(todo, written):
        record.pairs, record.rejected = [asdict(p) for p in pairs], [asdict(r) for r in rejected]
        record.outcome = "adapted" if pairs else "no pair"              #     nothing to learn from: the direct answer stands
    todo = [(sample, record, pairs) for (sample, record), (pairs, _) in zip(todo, written) if pairs]
    if not todo:
        return records
    samples, learners, _ = zip(*todo)
    heads, prompts = zip(*(tokenizer.split_chat(call_prompt(sample)) for sample in samples))
    examples = [[(tokenizer.split_chat(call_prompt(with_request(sample, pair.request)))[1],
                  [*tokenizer.encode(pair.text), tokenizer.im_end]) for pair in pairs] for sample, _, pairs in todo]
    if config.method == "tticl":                                        #     TT-ICL: nothing is trained
        in_context(agent, samples, learners, config)
        return records
    prefix = None
    if config.adapt == "full":                                          #     the adapter acts on the tools' text, too
        examples = [[(head + prompt, target) for prompt, target in own] for head, own in zip(heads, examples)]
        prompts = [head + prompt for head, prompt in zip(heads, prompts)]
    else:
        prefix = KVCache.stack([agent.prefixes.read(head) for head in heads])
    params = new_params(model, config.rank, [seeded(config.seed, s.id, "lora") for s in samples], config.targets.split(","))
    with adapters(model, params, config.alpha):                                               # l.6  theta' = theta_0 + BA
        with stage(learners, "train"):
            losses = fine_tune(agent, examples, params, config, prefix)                       # l.7  T
        with stage(learners, "answer"):
            answers = answer(agent, prompts, config, prefix)                                  # l.8  answer with theta_i*
    for record, own, record.losses, (text, length) in zip(learners, examples, losses, answers):
        record.tokens["train"] = config.epochs * sum(len(p) + len(a) for p, a in own)
        if math.isfinite(record.losses[-1]):
            record.answer, record.tokens["answer"] = text, length
        else:
            record.outcome = "non-finite"                               #     the direct answer stands
    return records                                                                            # l.9  the adapters are gone: theta_0


def in_context(agent: Agent, samples: Sequence[Sample], records: Sequence[Record], config: Config) -> None:
    """TT-ICL: the samples' pairs go into the prompt as turns before the request."""
    prompts = []
    for sample, record in zip(samples, records):
        system, *request = call_prompt(sample)
        examples = [turn for pair in record.pairs for turn in (call_prompt(with_request(sample, pair["request"]))[1],
                                                               {"role": "assistant", "content": pair["text"]})]
        prompts.append([system, *examples, *request])
    answer_again(agent, prompts, records, config)


def ask_again(agent: Agent, samples: Sequence[Sample], records: Sequence[Record], config: Config) -> None:
    """The cheapest second look: the direct answer is shown to the model, which is asked once more."""
    prompts = [[*call_prompt(sample), {"role": "assistant", "content": record.base["text"]}, {"role": "user", "content": ASK_AGAIN}]
               for sample, record in zip(samples, records)]
    answer_again(agent, prompts, records, config)


def answer_again(agent: Agent, prompts: Sequence[list[dict]], records: Sequence[Record], config: Config) -> None:
    """Greedy answers of the base model to other prompts, as the records' final answers."""
    heads, rests = zip(*map(agent.tokenizer.split_chat, prompts))
    with stage(records, "answer"):
        answers = answer(agent, rests, config, KVCache.stack([agent.prefixes.read(head) for head in heads]))
    for record, (record.answer, record.tokens["answer"]) in zip(records, answers):
        record.outcome = "adapted"


def vote(agent: Agent, samples: Sequence[Sample], records: Sequence[Record], config: Config) -> None:
    """Self-consistency (Wang et al. 2023): the first of the sampled answers that mean what most of them mean."""
    for sample, record, texts in zip(samples, records, draw(agent, samples, records, config)):
        keys = meanings(sample, texts)
        record.answer = {"text": texts[keys.index(Counter(keys).most_common(1)[0][0])]}


def retry(agent: Agent, samples: Sequence[Sample], records: Sequence[Record], config: Config) -> None:
    """The first answer that passes the check which pairs must pass: the direct one, then sampled ones; else the direct one."""
    def fits(sample, text): return not check_calls(parse_calls(text).calls, sample)
    todo = [(sample, record) for sample, record in zip(samples, records) if not fits(sample, record.base["text"])]
    if todo:
        samples, records = zip(*todo)
        for sample, record, texts in zip(samples, records, draw(agent, samples, records, config)):
            record.answer = {"text": next((text for text in texts if fits(sample, text)), record.base["text"])}


def draw(agent: Agent, samples: Sequence[Sample], records: Sequence[Record], config: Config) -> list[list[str]]:
    """`sampled_answers`, which the records keep."""
    with stage(records, "answer"):
        drawn = sampled_answers(agent, samples, config)
    for record, texts in zip(records, drawn):
        record.sampled, record.outcome = [{"text": text} for text in texts], "adapted"
    return drawn


def sampled_answers(agent: Agent, samples: Sequence[Sample], config: Config) -> list[list[str]]:
    """--samples answers of the base model for each sample, (B, N) texts."""
    return sample_texts(agent.model, agent.tokenizer, agent.prefixes, [agent.tokenizer.split_chat(call_prompt(s)) for s in samples],
                        config.max_new_tokens, config.temperature, config.top_p,
                        [[(config.seed, s.id, "sample", i) for i in range(config.samples)] for s in samples])


def meanings(sample: Sample, texts: Sequence[str]) -> list[tuple]:
    """What answers mean: equal for the same calls under `exact`."""
    return [calls_key(parse_calls(text).calls, sample.tools) for text in texts]


ASK_AGAIN = ("You were not sure of this answer. Think again from the start, and answer with nothing but the tool calls that the "
             "request needs.")
RIVALS = {"vote": vote, "retry": retry, "again": ask_again}


def in_halves(work: Callable[[Sequence[Sample]], list[Record]], samples: Sequence[Sample]) -> list[Record]:
    """The work on a batch, in halves where the memory or the model's context does not hold it."""
    try:
        return work(samples)
    except (torch.OutOfMemoryError, ContextError):
        if len(samples) == 1:
            raise
    half = len(samples) // 2                            # what the failed pass held is free by now
    return in_halves(work, samples[:half]) + in_halves(work, samples[half:])


def improve_or_keep(agent: Agent, samples: Sequence[Sample], config: Config, known: dict[str, dict]) -> list[Record]:
    """`self_improve`, with smaller batches where need be; a sample that cannot be adapted alone keeps its direct answer."""
    def records_of(part): return [Record(**known[sample.id]) for sample in part if sample.id in known]

    def work(part):
        try:
            return self_improve(agent, part, config, records_of(part))
        except (torch.OutOfMemoryError, ContextError) as error:
            if len(part) > 1:
                raise
            why = "too long" if isinstance(error, ContextError) else "out of memory"
        record, = records_of(part) or assess(agent, part, config)
        decide(record, config)
        record.outcome = why
        return [record]
    return in_halves(work, samples)


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


def open_run(folder: Path, config: Config, now: dict[str, str]) -> None:
    """Make the run folder, or go on in it. ValueError if it holds a run of another configuration, data or weights.

    What a kill may have left is mended: a torn last line is cut off, and records of other ranks move to records.jsonl.
    """
    if config.overwrite and (folder / "facts.json").is_file():
        for old in (*(folder / f"{name}.json" for name in ("config", "facts", "summary")), *evaluate.record_files(folder),
                    *folder.glob("assessed-*.jsonl")):
            old.unlink(missing_ok=True)
    free = FREE[1:] if config.budget or config.tau == "auto" else FREE         # there, tau depends on which samples there are
    if (folder / "config.json").is_file():
        before = evaluate.read_json(folder / "config.json")
        other = [f"{name} is {before.get(name)!r} there, {value!r} now" for name, value in asdict(config).items()
                 if name not in free and before.get(name) != value]
        then = evaluate.read_json(folder / "facts.json") if (folder / "facts.json").is_file() else now
        other += [f"the {name} changed" for name in ("data", "weights", "teacher") if then.get(name) != now.get(name)]
        if other:
            raise ValueError(f"{folder} holds a run of another configuration ({'; '.join(other)}): choose another --out, "
                             "or start it anew with --overwrite")
        for name in ("code", "torch", "python"):
            if then[name] != now[name]:
                print(f"{folder}: the run was begun with {name} {then[name]:.12}, it goes on with {now[name]:.12}")
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


def choose_tau(agent: Agent, samples: Sequence[Sample], config: Config, folder: Path, rank: int,
               world: int) -> tuple[Config, dict[str, dict]]:
    """For --budget and --tau auto: H over all samples, then tau from its scores. Gives the config with that tau, and the
    record of each sample so far; they are kept in assessed-<rank>.jsonl, so that nothing of H is computed twice."""
    def assessed(): return {line["id"]: line for path in sorted(folder.glob("assessed-*.jsonl")) for line in map(json.loads, path.open())}
    if config.tau != "auto" and not config.budget:
        return config, {}
    done = assessed()
    share = [sample for sample in samples if sample.id not in done][rank::world]
    wait_for_all(world)                                 # all have read what is there before anyone adds to it
    with tqdm(total=len(share), unit="sample", desc="tau", dynamic_ncols=True, disable=rank > 0) as bar:
        for batch in batches(agent, share, config):
            found = in_halves(lambda part: assess(agent, part, config), [sample.without_answers() for sample in batch])
            lines = [asdict(record) for record in found]
            append(folder / f"assessed-{rank}.jsonl", b"".join((json.dumps(line) + "\n").encode() for line in lines))
            bar.update(len(batch))
    wait_for_all(world)
    records = assessed()
    values = [records[sample.id]["scores"][config.gate_score] for sample in samples]
    threshold = threshold_between(values, round(config.budget * len(values))) if config.budget else otsu(values)
    tau = min(1.0, max(0.0, 1 - threshold)) if config.gate_score == "margin" else threshold
    return replace(config, tau=tau, budget=0.0), records


def run(agent: Agent, samples: Sequence[Sample], config: Config, folder: Path, rank: int = 0, world: int = 1) -> None:
    """Algorithm 1 over this rank's share of the samples that have no record yet, a line each in its own file."""
    records = {record["id"]: record for record in evaluate.read_records(folder)}
    path = folder / ("records.jsonl" if rank == 0 else f"records-{rank}.jsonl")
    share = [sample for sample in samples if sample.id not in records][rank::world]
    config, assessed = choose_tau(agent, samples, config, folder, rank, world)
    wait_for_all(world)                                 # all have read what is there before anyone adds to it
    with tqdm(initial=len(records), total=len(records) + len(share), unit="sample", dynamic_ncols=True, disable=rank > 0) as bar:
        for batch in batches(agent, share, config):
            lines = []
            for sample, record in zip(batch, improve_or_keep(agent, [sample.without_answers() for sample in batch], config, assessed)):
                for part in (record.base, record.answer, *record.sampled):
                    part.update(asdict(evaluate.exact_match(part["text"], sample)))
                record.gold, record.reachable = call_text(sample.answers), evaluate.reachable(sample)
                records[sample.id] = asdict(record)
                lines.append((json.dumps(records[sample.id]) + "\n").encode())
                if config.verbose:
                    bar.write(evaluate.story(records[sample.id]) + "\n")
            append(path, b"".join(lines))
            bar.update(len(batch))
            now = evaluate.summarise(list(records.values()))
            bar.set_postfix_str(f"base {now['base_accuracy']:.1%} now {now['accuracy']:.1%} adapted {now['adapted'] / now['n']:.0%}")


def batches(agent: Agent, samples: Sequence[Sample], config: Config) -> Iterator[list[Sample]]:
    """The samples in batches of --batch; by default one by one on a CPU, and as many as BATCH_TOKENS hold on a GPU."""
    if size := config.batch or int(agent.model.device.type == "cpu"):
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

def parse_args(argv: Sequence[str] | None) -> Config:
    """The command line as a Config: one flag a field, grouped by the phases of Algorithm 1."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for f in fields(Config):
        group = groups.setdefault(f.metadata["group"], None) or parser.add_argument_group(f.metadata["group"])
        groups[f.metadata["group"]] = group
        text = f.metadata["help"] + ("" if f.default in ("", False, 0.0) else f" (default: {f.default})").replace("%", "%%")
        flag = "--" + f.name.replace("_", "-")
        if isinstance(f.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            choices = f.metadata.get("choices")
            group.add_argument(flag, type=f.metadata.get("type", type(f.default)), default=f.default, choices=choices, help=text,
                               metavar=f.metadata.get("metavar", None if choices else f.name.upper()))
    return Config(**vars(parser.parse_args(argv)))


def choose(config: Config) -> tuple[Config, str]:
    """Fill in what the user left open, and a line that says what was chosen, why, and the flag that changes it."""
    cuda = torch.cuda.is_available()
    device = (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu") if config.device == "auto" else config.device
    if config.model:
        model, why = config.model, "as --model says"
    elif cuda:
        model, why = "Qwen/Qwen2.5-1.5B-Instruct", "there is a CUDA device; --model changes it"
    else:
        model, why = "tiny", "no CUDA device was found; --model changes it"
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if config.dtype == "auto" else config.dtype
    source = "bundled" if model == "tiny" and not config.data else config.data
    name = "the bundled tiny model" if model == "tiny" else model
    samples = "bundled samples (this project's own, not the benchmark; --data FILE runs the real one)" if source == "bundled" \
        else "the real samples" + (f" in {source}" if source else "")
    out = config.out or f"runs/{config.bench}-{Path(model).name}-{config.method}-s{config.seed}"
    chosen = {**asdict(config), "model": model, "device": device, "dtype": dtype, "data": source, "out": out,
              "lr": config.lr or (TINY_LR if model == "tiny" else 1e-4)}
    return Config(**chosen), f"{config.bench}: {name} ({why}) on {samples}; {device}, {dtype}"


def set_up(config: Config) -> tuple[Agent, list[Sample], dict[str, str]]:
    """Load samples, tokenizer and model, and their facts; ValueError, FileNotFoundError or ConnectionError in one sentence."""
    bundled = config.data == "bundled"
    everything = data.load(config.bench, None if bundled else config.data or None, offline=config.offline, bundled=bundled)
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
    targeted(model, config.targets.split(","))          # a target that names no layer is found now, not at the first adapter
    room = model.config.max_position_embeddings - config.max_new_tokens
    for sample in samples:
        if (length := len(tokenizer.chat(call_prompt(sample)))) > room:
            raise ValueError(f"{sample.id}: its prompt of {length} tokens and an answer of {config.max_new_tokens} exceed the "
                             f"model's context of {model.config.max_position_embeddings}: lower --max-new-tokens, or leave it out")
    found = facts(model, everything)
    if not config.teacher:
        return Agent(model, tokenizer, PrefixCaches(model)), samples, found
    folder = TINY if config.teacher == "tiny" else find_checkpoint(config.teacher, config.offline, "--teacher")
    teacher = load_model(folder, device, getattr(torch, config.dtype))
    return Agent(model, tokenizer, PrefixCaches(model), Agent(teacher, Tokenizer(folder), PrefixCaches(teacher))), samples, \
        {**found, "teacher": fingerprint(teacher)}


def work(config: Config, rank: int, world: int) -> int:
    """One process's part of the program, and for rank 0 the table at the end; its exit code."""
    folder = Path(config.out)
    agent, samples, now = set_up(config)
    with locked(folder) if rank == 0 else nullcontext():
        if rank == 0:
            open_run(folder, config, now)
            if done := len(evaluate.read_records(folder)):
                print(f"{folder}: going on after {done} finished samples (--overwrite starts anew)")
        def stop(*_): raise KeyboardInterrupt
        for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's background job ignores SIGINT
            signal.signal(number, stop)
        interrupted = False
        try:
            wait_for_all(world)
            run(agent, samples, config, folder, rank, world)
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
            print(evaluate.table([folder]))
        if interrupted:
            print(f"Interrupted after {len(records)} of {len(samples)} samples: the same command goes on from here"
                  + (" (without --overwrite)." if config.overwrite else "."))
            return 130
        print(closing_line(records, folder))
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code: 0, 1 out of memory, 2 for a mistake of the user's, 130 when interrupted."""
    try:
        config, line = choose(parse_args(argv))
        with ranks() as (rank, world):
            if rank == 0:
                print(line, flush=True)
            return work(config, rank, world)
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
