"""What to learn? Algorithm 1 with other lessons for a sample's adapter.

    python -m research.lessons --lesson unrelated --bench toolalpaca
    python -m research.lessons --filter consistent --measure-kl --k 4 --bench toolalpaca

--lesson gold, the sample's own request and its gold calls, uses labels: an upper bound. What is
like train.py is kept with train.py's lines. The answer stands in research/RESULTS.md, "What to
learn?".
"""
import json
import sys
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, repeat

if not __package__:
    print("Call it in the project's folder as: python -m research.lessons", file=sys.stderr)
    sys.exit(2)

import torch
import torch.nn.functional as F

import data
import train
from augment import (ASK_JOINT, JOINT_START, MAX_CALL_TOKENS, MAX_PAIR_TOKENS, MAX_REQUEST_TOKENS,
                     Found, Pair, Prompt, Try, Writer, check_request, synthesize, try_call_first,
                     try_joint)
from data import Sample, Task, call_prompt, request_text, with_request
from data.calls import Call, as_json, call_keys, call_text, check_call, parse_calls
from data.runs import Kept, Lines, digest, stage
from lora import Params, adapters
from model import Blank, Form, seeded
from research import benchmarks
from research.stream import Looked, Samples, adapt_with, pairs_as_lessons, written
from train import Adapted, Agent, Outcome, adapt, assess, learn, option

ASK_SHOWN = """Write two requests that a user may make of these tools, and under each the tool \
call that answers it. Both need the same tool, but the second is about other names, places, \
numbers or dates, in other words."""
SHOWN_START = '1. {request}\n{call}\n2. '
SHOWN_FORM = Form('"', (Blank('"', '"\n'), Blank("\n", "")))      # the request; the call, on a line
ASK_REQUEST = ASK_JOINT.partition("\n\n")[0]       # the requests without the calls
LABELS, AGREE = 5, 2    # sampled answers to a request; so many of them make a label
KL_TOKENS = 256         # the last of a request, over which the KL is taken


@dataclass(frozen=True)
class LessonConfig(train.Config):
    method: str = option("ttsi", train.RUN, "who writes the pairs", "ttsi", "ttd")
    lesson: str = option("self", "G", "whose pairs are learnt: the sample's own; unrelated: "
                         "another sample's; gold: its own request and gold calls (uses labels)",
                         "self", "unrelated", "gold")
    pair: str = option("call", "G", "as of train.py; request: a request first, then the majority "
                       "of sampled calls for it; shown: as joint, but the direct answer stands "
                       "under x; two: as call, for the two likeliest tools in turn (--k 2); words: "
                       "as call, for the tool whose text shares most words with x (benchmarks.py)",
                       "joint", "call", "request", "shown", "two", "words")
    filter: str = option("schema", "G", "a written pair is kept if: none: there is any answer; "
                         "schema (train.py's checks); consistent: more than half of sampled "
                         "answers agree with it, too", "none", "schema", "consistent")
    measure_kl: bool = option(False, "T", "record how far an adapter moves the model")
    uses_labels: bool = option(False, "G", "set by the program where a run reads labels")


# ---------------------------------------------------------- how pairs are written, which are kept

def answers(writer: Writer, tries: Sequence[Try], attempt: int, config) -> list[list[str]]:
    """For each try, LABELS sampled answers to its request, which are noted as written."""
    if not tries:
        return []
    prompts, keys = [], []
    for made in tries:
        prompts += [Prompt(call_prompt(with_request(made.sample, made.request)))] * LABELS
        keys += [(config.seed, made.sample.id, "label", attempt, i) for i in range(LABELS)]
    labels = iter(writer(prompts, MAX_CALL_TOKENS, config.temperature, config.top_p, keys))
    texts = [list(islice(labels, LABELS)) for _ in tries]
    for made, own in zip(tries, texts):
        made.written += own
    return texts


def meaning(text: str, sample: Sample) -> Hashable:
    """Equal for texts that call the same."""
    return frozenset(call_keys(parse_calls(text).calls, sample.tools).items())


def majority(texts: Sequence[str], sample: Sample) -> list[str]:
    """Of these texts those that call what most of them call."""
    alike = {}
    for text in texts:
        alike.setdefault(meaning(text, sample), []).append(text)
    return max(alike.values(), key=len, default=[])


def check_calls(calls: Sequence[Call], sample: Sample) -> str:
    """Why calls do not fit the sample's tools; "" if they do."""
    reasons = [check_call(call, sample.tools) for call in calls]
    return next(filter(None, reasons), "") if calls else "no call could be read"


def valid(texts: Sequence[str], sample: Sample) -> list[str]:
    """Of these texts those whose calls fit the sample's tools."""
    return [text for text in texts if not check_calls(parse_calls(text).calls, sample)]


def try_request_first(writer: Writer, samples: Samples, h: dict, attempt: int, config) -> list[Try]:
    """A new request, and what at least AGREE of LABELS answers to it call that fit the tools."""
    starts = [JOINT_START.format(request=h[x.id].request) for x in samples]
    texts, tries = written(writer, samples, ASK_REQUEST, starts, repeat(Form()),
                           MAX_REQUEST_TOKENS, attempt, config), []
    for x, text in zip(samples, texts):
        request = text.strip().partition("\n")[0].strip().removesuffix('"').strip()
        tries.append(Try(x, [text], request, "", check_request(request, x, h[x.id].request)))
    sound = [made for made in tries if not made.reason]
    for made, texts in zip(sound, answers(writer, sound, attempt, config)):
        agreeing = majority(valid(texts, made.sample), made.sample)
        made.text = agreeing[0] if agreeing else ""
        if len(agreeing) < AGREE:
            made.reason = f"fewer than {AGREE} fitting calls agree"
    return tries


def try_shown(writer: Writer, samples: Samples, h: dict, attempt: int, config) -> list[Try]:
    """As --pair joint, but the direct answer's first call stands under x: what is to be written is
    shown, where a small model does not follow what is said."""
    starts, tries = [], []
    for line in [h[x.id] for x in samples]:
        likeliest = Call(max(line.candidates, key=line.candidates.get))
        call = as_json(asdict((*parse_calls(line.text).calls, likeliest)[0]))
        starts.append(SHOWN_START.format(request=as_json(line.request), call=call))
    texts = written(writer, samples, ASK_SHOWN, starts, repeat(SHOWN_FORM), MAX_PAIR_TOKENS,
                    attempt, config)
    for x, text in zip(samples, texts):
        request, _, call = text.partition("\n")
        calls = parse_calls(call).calls
        made = Try(x, [text], "", call_text(calls, like=h[x.id].text), check_calls(calls, x))
        tries.append(made)
        try:
            made.request = " ".join(json.loads(request).split())
            made.reason = check_request(made.request, x, h[x.id].request) or made.reason
        except ValueError:
            made.reason = "the request did not end"
    return tries


def try_two(writer: Writer, samples: Samples, h: dict, attempt: int, config) -> list[Try]:
    """As --pair call, but in turn for the likeliest and the second likeliest tool."""
    turned = {}
    for x in samples:
        l = h[x.id].candidates
        name = sorted(l, key=l.get, reverse=True)[:2][attempt % min(2, len(l))]
        turned[x.id] = replace(h[x.id], candidates={name: l[name]})
    return try_call_first(writer, samples, turned, attempt, config)


def try_words(writer: Writer, samples: Samples, h: dict, attempt: int, config) -> list[Try]:
    """As --pair call, but for the tool that shares most words with the request, of those that the
    dialogue has not called."""
    turned = {}
    for x in samples:
        (call,) = benchmarks.fresh(x)
        turned[x.id] = replace(h[x.id], candidates={call.name: 0.0})
    return try_call_first(writer, samples, turned, attempt, config)


PAIRS = {"call": try_call_first, "joint": try_joint, "request": try_request_first,
         "shown": try_shown, "two": try_two, "words": try_words}


def try_unchecked(writer: Writer, samples: Samples, h: dict, attempt: int, config) -> list[Try]:
    """As --pair says, but there is no reason against a request with any calls."""
    tries = PAIRS[config.pair](writer, samples, h, attempt, config)
    for made in tries:
        if made.request and made.text:
            made.reason = ""
    return tries


def try_consistent(writer: Writer, samples: Samples, h: dict, attempt: int, config) -> list[Try]:
    """As --pair says, and most sampled answers to the request call the same."""
    tries = PAIRS[config.pair](writer, samples, h, attempt, config)
    sound = [made for made in tries if not made.reason]
    for made, texts in zip(sound, answers(writer, sound, attempt, config)):
        meanings = [meaning(text, made.sample) for text in texts]
        if meanings.count(meaning(made.text, made.sample)) <= LABELS // 2:
            made.reason = "most answers to it call something else"
    return tries


FILTERS = {"none": try_unchecked, "consistent": try_consistent}


def task_of(config: LessonConfig) -> Task:
    """Calling tools, where pairs are written and kept as the options say. The code of the tries is
    in the key of G: so it is the core's own task where the core does the same."""
    if config.filter in FILTERS:
        return replace(train.CALLING, tries={config.pair: FILTERS[config.filter]})
    if config.pair in train.CALLING.tries:
        return train.CALLING
    return replace(train.CALLING, tries={config.pair: PAIRS[config.pair]})


# ---------------------------------------------------------------------------- what is learnt of it

def subject(sample: Sample, config: LessonConfig, everyone: Lines) -> Sample:
    """For whom the pairs are written that a sample's adapter learns: itself, or another sample."""
    if config.lesson != "unrelated":
        return sample
    others = [other for other in everyone.values() if other.id != sample.id]
    draw = torch.randint(len(others), (), generator=seeded(config.seed, sample.id, "unrelated"))
    return others[int(draw)]


@stage("gold", Found, "everyone")
def gold_pair(agent: Agent, samples: Samples, config: LessonConfig, h: Lines,
              everyone: Lines) -> list[Found]:
    """In place of G: each sample's own request and its label, in the form of its direct answer."""
    texts = [call_text(everyone[x.id].answers, like=h[x.id].text) for x in samples]
    return [Found(x.id, pairs=[Pair(request_text(x), text)]) for x, text in zip(samples, texts)]


@stage("lessons", Looked, *adapt.stage.reads, "lesson", "measure_kl", "everyone", adapters=True)
def learn_others(agent: Agent, samples: Samples, config: LessonConfig, g: Lines,
                 everyone: Lines) -> list[Adapted]:
    """T with other lessons; with the KL, for the first sample alone."""
    lessons = []
    for x in samples:
        other = subject(x, config, everyone)
        own = pairs_as_lessons(other, g[other.id])
        # of gold, the whole dialogue is learnt
        lessons.append([(x, text) for _, text in own] if config.lesson == "gold" else own)
    if config.measure_kl:
        return [adapt_with(agent, samples[0], lessons[0], config, look=divergence)]
    return learn(agent, samples, lessons, config)


@torch.no_grad()
def divergence(agent: Agent, sample: Sample, params: Params, config: train.Config) -> dict:
    """KL(adapted || base) in nats: the mean over the last tokens of the sample's prompt."""
    chats, log_p = [call_prompt(sample)], []
    for own in ({}, params):
        caches, prompts = agent.prefixes.split(agent.tokenizer, chats, config.adapt)
        with adapters(agent.model, own, config.alpha):
            hidden = agent.model(prompts, caches[0] if caches else None)[0, -KL_TOKENS:]
        log_p.append(agent.model.lm_head(hidden).float().log_softmax(-1))       # (tokens, vocab)
    base, adapted = log_p
    return {"kl": F.kl_div(base, adapted, log_target=True, reduction="batchmean").item()}


# ------------------------------------------------------------------------------------ the program

def improve(samples: Samples, config: LessonConfig, kept: Kept, everyone: Lines) -> list[Outcome]:
    """Algorithm 1 with other lessons. everyone: all samples of the benchmark by id, with labels for
    --lesson gold alone."""
    h = kept(assess, samples)
    unsure = [x for x in samples if h[x.id].margin < config.tau]
    about = {x.id: subject(x, config, everyone) for x in unsure}
    if config.lesson == "gold":
        g = kept(gold_pair, unsure, h, everyone)
    else:
        others = list({y.id: y for y in about.values()}.values())       # two may draw the same
        theirs = kept(assess, others)
        g = kept(synthesize, [y for y in others if not theirs[y.id].failed], theirs)
    found = {x.id: g.get(about[x.id].id) for x in unsure}
    able = [x for x in unsure if found[x.id] and found[x.id].pairs]
    if config.lesson == "self" and not config.measure_kl:
        t = kept(adapt, able, g, h)
    else:
        t = kept(learn_others, able, g, everyone)
    extra = {id: line.seen for id, line in t.items() if config.measure_kl}
    return [Outcome(h[x.id], found.get(x.id), t.get(x.id), extra.get(x.id, {})) for x in samples]


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.fill_in(train.parse_args(argv, LessonConfig, __doc__))
    config = replace(config, uses_labels=config.lesson == "gold")
    agent, samples = train.set_up(config, task_of(config))
    everyone = data.load(config.bench, config.data, config.offline)
    if config.tools == "shuffled":
        everyone = [data.shuffled(x, config.seed) for x in everyone]
    if config.lesson == "unrelated" and len(everyone) < 2:
        raise ValueError(f"--lesson unrelated: {config.data} has no other sample")
    if not config.uses_labels:
        everyone = [replace(x, answers=()) for x in everyone]
    agent.facts["everyone"] = digest(everyone)
    everyone = Lines({x.id: x for x in everyone})
    return train.run(agent, samples, config, partial(improve, everyone=everyone))


if __name__ == "__main__":
    sys.exit(main())
