"""Other tasks than calling tools: what their files share.

    python -m research.tasks.choice                             # the bundled samples and model
    python -m research.tasks.choice --data FILE --model DIR --adapt suffix
    python -m research.tasks.choice --data FILE --model DIR --adapt suffix --control icl

A task's file holds what is asked, how a pair is written and checked, and when an answer is right;
its program is `program` below. Algorithm 1 is train.py's: another H (`assess_sampled`) where the
model chooses among its own answers, and --control for what TT-SI is compared with. The bundled
samples, thirty a task, were made for this project; they show that a task works, and not what TT-SI
achieves on it.
"""
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

import train
from augment import synthesize
from data import Sample, Task, request_text
from data.formats import MEND, read_items
from data.runs import (NON_FINITE, Kept, Lines, Record, code_digest, digest, read_run, run_folder,
                       stage)
from evaluate import summarise
from model import KVCache, generate, seeded
from research.stream import Samples, answer_with, pairs_as_lessons, written
from train import Adapted, Agent, Assessed, Outcome, adapt, assess, learn, option
from uncertainty import score_candidates, softmax_difference


@dataclass(frozen=True)
class TaskConfig(train.Config):
    control: str = option("", train.RUN, "all: adapt to every sample; other: to another sample's "
                          "pair; icl: show the pair in the prompt, and train nothing",
                          "all", "other", "icl")

    def __post_init__(self):
        super().__post_init__()
        if self.control and self.method == "base":
            raise ValueError(f"--control {self.control}: --method base adapts to nothing")


@dataclass(frozen=True)
class SampledConfig(TaskConfig):
    answers: int = option(5, "H", "sampled answers to choose from")

    def __post_init__(self):
        super().__post_init__()
        if self.answers < 2:
            raise ValueError(f"--answers {self.answers}: must be 2 or more")


# --- Reading samples ------------------------------------------------------------------------------

def read_samples(name: str, path: Path, read: Callable[[dict], list[Sample]]) -> list[Sample]:
    """The samples of a file of JSON or JSON Lines, in file order; sample i keeps its own id, or is
    named f"{name}-{i}". read: the samples of one item of the file, or a ValueError. ValueError
    (where the file is wrong, and how) or OSError."""
    found = []
    for i, item in enumerate(read_items(path)):
        try:
            if not isinstance(item, dict):
                raise ValueError("not a JSON object")
            found += read(item)
        except ValueError as error:
            raise ValueError(f"{path}, item {i}: {error}; {MEND}") from None
    named = [replace(x, id=x.id or f"{name}-{i}") for i, x in enumerate(found)]
    if len({x.id for x in named}) < len(named):
        print(f"{path}: ids are not unique: samples are named by their place")
        named = [replace(x, id=f"{name}-{i}") for i, x in enumerate(found)]
    return named


def text_in(item: dict, *keys: str) -> str:
    """The text under the first of these keys that an item has; ValueError if there is none."""
    for key in keys:
        if key in item:
            if not isinstance(item[key], str) or not item[key].strip():
                raise ValueError(f"{key!r} is not a text, or an empty one")
            return item[key].strip()
    raise ValueError(f"has no {' and no '.join(map(repr, keys))}")


def items_in(item: dict, key: str) -> list[dict]:
    """The list of objects under a key; ValueError if it is none."""
    items = item.get(key)
    if not isinstance(items, list) or not all(isinstance(each, dict) for each in items):
        raise ValueError(f"{key!r} is not a list of objects")
    return items


def texts_in(item: dict, key: str) -> tuple[str, ...]:
    """The list of texts under a key; ValueError if it is none, or empty."""
    texts = item.get(key)
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{key!r} is not a list of texts, or an empty one")
    return tuple(texts)


# --- What is asked, and what is written for a pair ------------------------------------------------

def ask_for(system: str, x: Sample, ask: str) -> list[dict]:
    """The messages that ask for an answer: a system text, and x's last turn with what is asked."""
    return [{"role": "system", "content": system},
            {"role": "user", "content": x.messages[-1]["content"] + ask}]


def is_copy(text: str, of: str) -> bool:
    """Whether a text says nothing, or nothing but what stands in another one."""
    plain, there = ["".join(filter(str.isalnum, each.casefold())) for each in (text, of)]
    return plain in there


# --- H where the model chooses among its own answers ----------------------------------------------

def no_actions(sample: Sample) -> list[str]:
    """In a SampledTask `weigh` gives the actions."""
    return []


def at_start(text: str) -> str:
    """Where an answer is its action: it names it from the beginning."""
    return ""


@dataclass(frozen=True)
class SampledTask(Task):
    """A task whose actions are answers that the model samples."""
    # (agent, cache, last, direct answer, sampled answers) -> {action: l_n, nats}
    weigh: Callable[..., dict[str, float]]

    def __post_init__(self):
        super().__post_init__()
        self.code["asks"] += code_digest(self.weigh)


def likelihoods(agent: Agent, cache: KVCache, last: Sequence[int],
                texts: Sequence[str]) -> dict[str, float]:
    """l_n = log P(text, end of the turn | x) in nats of each of some texts, those that are equal
    once; an empty one is left out, unless there is no other."""
    distinct = list(dict.fromkeys(filter(None, texts)))
    if len(distinct) < 2:                                   # one action: u = 1, whatever its l
        return dict.fromkeys(distinct or [""], 0.0)
    l = score_candidates(agent.model, agent.tokenizer, cache, last, distinct, "", "")
    return dict(zip(distinct, l.tolist()))


@dataclass
class Drawn(Assessed):
    """A line of H whose candidates are answers of the model's own."""
    drawn: list[str] = field(default_factory=list)          # the sampled answers


@stage("H", Drawn, *assess.stage.reads, "answers", "temperature", "top_p", "seed")
def assess_sampled(agent: Agent, samples: Samples, config: SampledConfig) -> list[Drawn]:
    """H and the direct answers of a batch: how sure is theta_0 among the answers that it samples?
    An answer is drawn by the seed, the sample's id and its number."""
    model, tokenizer, k, lines = agent.model, agent.tokenizer, config.answers, []
    chats = [agent.task.prompt(x) for x in samples]
    caches, last = agent.prefixes.split(tokenizer, chats, "answer")     # x is read once
    answers = generate(model, tokenizer, last, config.max_new_tokens, caches)
    keys = [(config.seed, x.id, "answer", i) for x in samples for i in range(k)]
    rows = generate(model, tokenizer, [end for end in last for _ in range(k)],
                    config.max_new_tokens, [cache for cache in caches for _ in range(k)],
                    config.temperature, config.top_p, keys)
    for i, (x, answer) in enumerate(zip(samples, answers)):
        drawn = [row.text.strip() for row in rows[i * k:(i + 1) * k]]
        l = agent.task.weigh(agent, caches[i], last[i], answer.text.strip(), drawn)
        u = softmax_difference(torch.tensor([*l.values()]))
        line = Drawn(x.id, "", request_text(x), l, u, caches[i].length + 1, answer.text,
                     answer.ids, answer.log_p, answer.entropy, drawn=drawn)
        if not all(map(math.isfinite, [u, *l.values(), *answer.log_p, *answer.entropy])):
            line = replace(line, failed=NON_FINITE, candidates={}, margin=1.0, log_p=[], entropy=[])
        lines.append(line)
    return lines


# --- Algorithm 1, and what it is compared with ----------------------------------------------------

@stage("other", Adapted, *adapt.stage.reads, adapters=True)
def learn_of_others(agent: Agent, samples: Samples, config: TaskConfig, g: Lines,
                    others: Lines) -> list[Adapted]:
    """T with the pairs of another sample each."""
    lessons = [pairs_as_lessons(others[x.id], g[others[x.id].id]) for x in samples]
    return learn(agent, samples, lessons, config)


@stage("icl", Adapted)
def answer_after_pairs(agent: Agent, samples: Samples, config: TaskConfig,
                       g: Lines) -> list[Adapted]:
    """TT-ICL, the paper's variant without training: each sample's pairs as turns before its own."""
    chats = []
    for x in samples:
        (system, *asked), turns = agent.task.prompt(x), []
        for shown, text in pairs_as_lessons(x, g[x.id]):
            turns += [*agent.task.prompt(shown)[1:], {"role": "assistant", "content": text}]
        chats.append([system, *turns, *asked])
    return answer_with(agent, samples, {}, replace(config, adapt="suffix"), chats)


def improve(samples: Samples, config: TaskConfig, kept: Kept, others: Lines) -> list[Outcome]:
    """Algorithm 1 with the task's H, and with --control. others: for each id another sample."""
    ask = assess_sampled if isinstance(kept.agent.task, SampledTask) else assess
    h = kept(ask, samples)
    if config.method == "base":
        return [Outcome(h[x.id]) for x in samples]
    there = [x for x in samples if not h[x.id].failed]
    unsure = [x for x in there if config.control == "all" or h[x.id].margin < config.tau]
    if config.control != "other":
        g = kept(synthesize, unsure, h)
        able = [x for x in unsure if g[x.id].pairs]
        icl = config.control == "icl"
        t = kept(answer_after_pairs, able, g) if icl else kept(adapt, able, g, h)
        return [Outcome(h[x.id], g.get(x.id), t.get(x.id)) for x in samples]
    theirs = list({others[x.id].id: others[x.id] for x in unsure}.values())    # two may be the same
    h_of = kept(ask, theirs)
    g = kept(synthesize, [y for y in theirs if not h_of[y.id].failed], h_of)
    found = {x.id: g.get(others[x.id].id) for x in unsure}
    t = kept(learn_of_others, [x for x in unsure if found[x.id] and found[x.id].pairs], g, others)
    return [Outcome(h[x.id], found.get(x.id), t.get(x.id)) for x in samples]


def other_samples(samples: Samples, config: TaskConfig) -> Lines:
    """For each sample, by id, another of the run's samples, drawn by the seed and the id; all
    without labels. One sample alone has no other: itself."""
    unlabelled, others = [replace(x, answers=()) for x in samples], Lines()
    for i, x in enumerate(unlabelled):
        rest = unlabelled[:i] + unlabelled[i + 1:] or [x]
        draw = torch.randint(len(rest), (), generator=seeded(config.seed, x.id, "other"))
        others[x.id] = rest[int(draw)]
    others.key = {"others": digest(others)}
    return others


# --- The program ----------------------------------------------------------------------------------

def program(argv: Sequence[str] | None, name: str, task: Task, read: Callable, config: type,
            text: str, change: Callable[[Record], Record] | None = None, right: str = "",
            load: Callable = read_samples) -> int:
    """The program of a task; gives its exit code. read: as of `read_samples`, or as of `load` in
    its place; config: a subclass of TaskConfig; change: maps a record to the one that is written;
    right: what `exact` means, if it is not plain. Beside train.py's table it prints the means of
    the task's own measures."""
    config = train.parse_args(argv, config, text)
    if config.bench:
        raise ValueError(f"--bench {config.bench}: a task's samples are given with --data FILE")
    if config.pair not in task.tries:
        raise ValueError(f"--pair {config.pair}: this task has only {', '.join(task.tries)}")
    config = train.fill_in(replace(config, bench=name))
    config = replace(config, data=config.data or "bundled")
    bundled = Path(__file__).parent / "samples" / f"{name}.json"
    path = bundled if config.data == "bundled" else Path(config.data).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; --data takes a file of samples, or \"bundled\"")
    agent, samples = train.set_up(config, task, load(name, path, read))
    others = other_samples(samples, config)
    code = train.run(agent, samples, config, partial(improve, others=others), change)
    folder = Path(run_folder(config, agent.facts))
    if (folder / "summary.json").is_file():             # not while other processes are at work
        summary = summarise(read_run(folder).records)
        for measure in [key[5:] for key in summary if key.startswith("base_")]:
            if measure != "accuracy":
                base, after = summary[f"base_{measure}"], summary[f"answer_{measure}"]
                print(f"{measure}: base {100 * base:.1f}, after {100 * after:.1f}")
        if right:
            print(right)
    return code
