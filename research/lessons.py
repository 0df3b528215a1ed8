"""What to learn? Algorithm 1 with other lessons for a sample's adapter.

    python -m research.lessons --lesson unrelated --bench toolalpaca
    python -m research.lessons --filter consistent --measure-kl --k 4 --bench toolalpaca

--lesson self: pairs written for the sample (the paper's). unrelated: those written for another
sample, drawn by the seed. gold: the sample's own request and its gold calls, which uses labels: an
upper bound. --pair request: the request first, then its call by vote; two: call first, for the two
likeliest tools in turn. --filter says which written pairs are kept. --measure-kl records how far an
adapter moves the model, as KL(adapted || base). What is like train.py is kept with train.py's
lines. The answer stands in research/RESULTS.md, "What to learn?".
"""
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import augment
import data
import train
from augment import (ASK_JOINT, JOINT_START, MAX_CALL_TOKENS, MAX_REQUEST_TOKENS, WAYS, Draft,
                     Found, Pair, Prompt, Writer, asked, check_request, check_text, in_form_of,
                     synthesize, write_call_first, write_each)
from data import Sample, call_prompt, request_text, with_request
from data.calls import Call, calls_key, parse_calls
from lora import Params, adapters, new_params
from model import seeded
from research.stream import adapt_with, one_by_one
from train import Adapted, Agent, Assessed, Kept, Lesson, Outcome, Stage, option

ASK_REQUEST = ASK_JOINT.partition("\n\n")[0]       # the requests without the calls
LABELS, AGREE = 5, 2    # sampled answers to a request; so many of them make a label
KL_TOKENS = 256         # the last of a request, over which the KL is taken


@dataclass(frozen=True)
class LessonConfig(train.Config):
    """train.py's options, and those of the lessons."""
    lesson: str = option("self", "G", "whose pairs are learnt: the sample's own; unrelated: "
                         "another sample's; gold: its own request and gold calls (uses labels)",
                         "self", "unrelated", "gold")
    pair: str = option("call", "G", "as of train.py; request: a request first, then the majority "
                       "of sampled calls for it; two: as call, for the two likeliest tools in turn "
                       "(--k 2)", "joint", "call", "request", "two")
    filter: str = option("schema", "G", "a written pair is kept if: none: there is any answer; "
                         "schema (train.py's checks); consistent: more than half of sampled "
                         "answers agree with it, too", "none", "schema", "consistent")
    measure_kl: bool = option(False, "T", "record KL(adapted || base), for two passes more")
    uses_labels: bool = option(False, "G", "set by the program where a run reads labels")

    def __post_init__(self):
        super().__post_init__()
        if self.method == "base" or self.method == "ttd" and self.lesson == "gold":
            raise ValueError(f"--method {self.method}: it does not go with --lesson {self.lesson}; "
                             "use ttsi")


# ------------------------------------------------------------------------ --pair request and two

def answers(writer: Writer, drafts: Sequence[Draft], attempt: int, config) -> list[list[str]]:
    """For each draft, LABELS sampled answers to its request, which are noted as written."""
    if not drafts:
        return []
    prompts = [Prompt(call_prompt(with_request(d.sample, d.request))) for d in drafts]
    keys = [[(config.seed, d.sample.id, "label", attempt, i) for i in range(LABELS)]
            for d in drafts]
    texts = writer(prompts, MAX_CALL_TOKENS, config.temperature, config.top_p, keys)
    for draft, own in zip(drafts, texts):
        draft.written += own
    return texts


def meaning(text: str, sample: Sample) -> Hashable:
    """Equal for texts that call the same."""
    return calls_key(parse_calls(text).calls, sample.tools)


def majority(texts: Sequence[str], sample: Sample) -> tuple[str, int]:
    """The first text that calls what most of them call, and how many do; ("", 0) of none."""
    meanings = [meaning(text, sample) for text in texts]
    if not meanings:
        return "", 0
    most, votes = Counter(meanings).most_common(1)[0]
    return texts[meanings.index(most)], votes


def write_request_first(writer: Writer, samples: Sequence[Sample], h: dict, attempt: int,
                        config) -> list[Draft]:
    """A draft for each sample: a new request, and what at least AGREE of LABELS answers to it call
    that fit the tools."""
    prompts = [Prompt(asked(x, ASK_REQUEST), JOINT_START.format(request=request_text(x)))
               for x in samples]
    drafts = []
    written = write_each(writer, samples, prompts, attempt, config, MAX_REQUEST_TOKENS)
    for sample, text in zip(samples, written):
        request = text.strip().partition("\n")[0].strip().removesuffix('"').strip()
        drafts.append(Draft(sample, [text], request, "", check_request(request, sample)))
    sound = [draft for draft in drafts if not draft.reason]
    for draft, texts in zip(sound, answers(writer, sound, attempt, config)):
        fitting = [text for text in texts if not check_text(text, draft.sample)]
        draft.text, votes = majority(fitting, draft.sample)
        draft.reason = "" if votes >= AGREE else f"fewer than {AGREE} fitting calls agree"
    return drafts


def write_of_two(writer: Writer, samples: Sequence[Sample], h: dict, attempt: int,
                 config) -> list[Draft]:
    """As --pair call, but in turn for the likeliest and the second likeliest tool."""
    turned = {}
    for sample in samples:
        l = h[sample.id].candidates
        name = sorted(l, key=l.get, reverse=True)[:2][attempt % min(2, len(l))]
        turned[sample.id] = replace(h[sample.id], candidates={name: l[name]})
    return write_call_first(writer, samples, turned, attempt, config)


# --------------------------------------------------------------------------------------- --filter

def unfiltered(write: Callable, *args) -> list[Draft]:
    """Drafts of which all are kept that have a request and an answer."""
    drafts = write(*args)
    for draft in drafts:
        if draft.request and draft.text:
            draft.reason = ""
    return drafts


def consistent(write: Callable, writer: Writer, samples: Sequence[Sample], h: dict, attempt: int,
               config) -> list[Draft]:
    """Drafts of which those are kept that more than half of LABELS sampled answers agree with."""
    drafts = write(writer, samples, h, attempt, config)
    sound = [draft for draft in drafts if not draft.reason]
    for draft, texts in zip(sound, answers(writer, sound, attempt, config)):
        most, votes = majority(texts, draft.sample)
        same = meaning(draft.text, draft.sample) == meaning(most, draft.sample)
        if votes <= LABELS // 2 or not same:
            draft.reason = "most answers to it call something else"
    return drafts


FILTERS = {"none": unfiltered, "schema": None, "consistent": consistent}


def way_of(config: LessonConfig) -> Callable:
    """What gives the drafts of a try."""
    write = {**WAYS, "request": write_request_first, "two": write_of_two}[config.pair]
    return partial(FILTERS[config.filter], write) if FILTERS[config.filter] else write


# -------------------------------------------------------------------- --lesson: unrelated and gold

def another(sample: Sample, everyone: Sequence[Sample], seed: int) -> Sample:
    """One of the other samples of the benchmark."""
    others = [other for other in everyone if other.id != sample.id]
    draw = torch.randint(len(others), (), generator=seeded(seed, sample.id, "unrelated"))
    return others[int(draw)]


def gold_pair(sample: Sample, line: Assessed, calls: Sequence[Call]) -> Found:
    """The sample's own request with its gold calls, as a line of G."""
    return Found(sample.id, [Pair(request_text(sample), in_form_of(line.text, calls))])


# -------------------------------------------------------------------------------- --measure-kl

@dataclass
class Measured(Adapted):
    """A line of T with what the adapter has changed."""
    kl: float = 0.0                     # KL(adapted || base), nats a token of the request


@torch.no_grad()
def divergence(agent: Agent, sample: Sample, params: Params, config: train.Config) -> float:
    """KL(adapted || base) in nats: the mean over the last tokens of the sample's prompt."""
    (ids,), cache = train.begin(agent, [call_prompt(sample)], config)

    def log_p() -> torch.Tensor:
        hidden = agent.model(torch.tensor([ids], device=agent.model.device),
                             cache.fork() if cache else None)
        return agent.model.logits(hidden[0, -KL_TOKENS:]).log_softmax(-1)       # (tokens, V)
    base = log_p()
    with adapters(agent.model, params, config.alpha):
        adapted = log_p()
    return F.kl_div(base, adapted, log_target=True, reduction="batchmean").item()


def adapt_and_measure(agent: Agent, sample: Sample, lessons: Sequence[Lesson],
                      config: train.Config) -> Measured:
    """T for one sample, with the divergence."""
    params = new_params(agent.model, config.rank, [seeded(config.seed, sample.id, "lora")])
    line = adapt_with(agent, sample, lessons, params, config)
    kl = divergence(agent, sample, params, config) if line.finite else 0.0
    return Measured(**vars(line), kl=kl)


# ------------------------------------------------------------------------------------ the program

GOLD = Stage("G", Found, ("labels",), (in_form_of, gold_pair), train.H)


def stages(config: LessonConfig) -> tuple[Stage, Stage]:
    """G and T of this configuration: the core's own where it does what the core does."""
    g, t = train.G, train.T
    if config.lesson == "gold":
        g = GOLD
    elif config.filter != "schema" or config.pair in ("request", "two"):
        g = replace(g, reads=(*g.reads, "filter"), code=(augment, sys.modules[__name__]))
    if config.lesson != "self":
        t = replace(t, reads=(*t.reads, "seed"), code=(*t.code, another))
    if config.measure_kl:
        t = replace(t, line=Measured, code=(*t.code, adapt_with, divergence, adapt_and_measure))
    return g, replace(t, after=g)


def improve(agent: Agent, samples: Sequence[Sample], config: LessonConfig, kept: Kept,
            everyone: Sequence[Sample], gold: dict[str, Sequence[Call]]) -> list[Outcome]:
    """Algorithm 1 with other lessons. everyone: all samples of the benchmark, without labels. gold:
    the labels by id, of --lesson gold alone."""
    g_stage, t_stage = stages(config)
    h = kept(train.H, samples, lambda xs: train.assess(agent, xs, config))
    unsure = [x for x in samples if h[x.id].margin < config.tau]
    about = {x.id: x for x in unsure}               # whom each one's pairs are written for
    if config.lesson == "unrelated":
        about = {x.id: another(x, everyone, config.seed) for x in unsure}
    if config.lesson == "gold":
        g = kept(g_stage, unsure, lambda xs: [gold_pair(x, h[x.id], gold[x.id]) for x in xs])
        lessons = {x.id: [(call_prompt(x), p.text) for p in g[x.id].pairs] for x in unsure}
    else:
        subjects = list({y.id: y for y in about.values()}.values())     # two may draw the same
        h |= kept(train.H, subjects, lambda xs: train.assess(agent, xs, config))
        written = kept(g_stage, subjects,
                       lambda xs: synthesize(agent.writer, xs, h, config, way_of(config)))
        g = {x.id: written[about[x.id].id] for x in unsure}
        lessons = {x.id: train.lessons_of(about[x.id], g[x.id]) for x in unsure}

    def learn(xs: list[Sample]) -> list[Adapted]:
        if config.measure_kl:
            return one_by_one(xs, lambda x: adapt_and_measure(agent, x, lessons[x.id], config))
        return train.adapt(agent, xs, [lessons[x.id] for x in xs], config)
    t = kept(t_stage, [x for x in unsure if lessons[x.id]], learn)
    extra = {x.id: {"kl": t[x.id].kl} for x in unsure
             if config.measure_kl and x.id in t and t[x.id].finite}
    return [Outcome(h[x.id], g.get(x.id), t.get(x.id), extra.get(x.id, {})) for x in samples]


def benchmark(config: train.Config) -> list[Sample]:
    """All samples of the benchmark, those beyond --limit too."""
    bundled = config.data == "bundled"
    return data.load(config.bench, "" if bundled else config.data, config.offline, bundled)


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.choose(train.parse_args(argv, LessonConfig, __doc__))
    config = replace(config, uses_labels=config.lesson == "gold")
    agent, samples = train.set_up(config)
    labelled, gold = benchmark(config), {}
    everyone = [sample.without_answers() for sample in labelled]
    if config.lesson == "unrelated" and len(everyone) < 2:
        raise ValueError("--lesson unrelated: there is no other sample")
    if config.lesson == "gold":
        gold = {sample.id: sample.answers for sample in labelled}
        agent.facts["labels"] = hashlib.sha256(repr(gold).encode()).hexdigest()
    kept = Kept(config, agent.facts)
    return train.run(agent, samples, config, kept, partial(improve, everyone=everyone, gold=gold))


if __name__ == "__main__":
    sys.exit(main())
