"""What to learn? Algorithm 1 with other lessons for a sample's adapter.

    python -m research.lessons --lesson unrelated --bench toolalpaca
    python -m research.lessons --filter consistent --measure-kl --k 4 --bench toolalpaca

--lesson gold, the sample's own request and its gold calls, uses labels: an upper bound. What is
like train.py is kept with train.py's lines. The answer stands in research/RESULTS.md, "What to
learn?".
"""
import hashlib
import json
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F

import augment
import train
from augment import (ASK_JOINT, JOINT_START, MAX_CALL_TOKENS, MAX_REQUEST_TOKENS, WAYS, Draft,
                     Found, Pair, Prompt, Writer, asked, check_request, check_text, in_form_of,
                     quoted, synthesize, write_call_first, write_each)
from data import Sample, call_json, call_prompt, request_text, with_request
from data.calls import Call, calls_key, parse_calls
from lora import Params, adapters
from model import Form, seeded
from research import stream
from research.stream import Looked, adapt_with
from train import Adapted, Agent, Kept, Outcome, option

ASK_SHOWN = """Write two requests that a user may make of these tools, and under each the tool \
call that answers it. Both need the same tool, but the second is about other names, places, \
numbers or dates, in other words."""
SHOWN_START = '1. {request}\n{call}\n2. '
SHOWN_FORM = Form(('"', '"\n', ""), ('"', "\n"))      # the request; the call, on one line
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
                       "under x; two: as call, for the two likeliest tools in turn (--k 2)",
                       "joint", "call", "request", "shown", "two")
    filter: str = option("schema", "G", "a written pair is kept if: none: there is any answer; "
                         "schema (train.py's checks); consistent: more than half of sampled "
                         "answers agree with it, too", "none", "schema", "consistent")
    measure_kl: bool = option(False, "T", "record how far an adapter moves the model")
    uses_labels: bool = option(False, "G", "set by the program where a run reads labels")


# ---------------------------------------------------------- how pairs are written, which are kept

def answers(writer: Writer, drafts: Sequence[Draft], attempt: int, config) -> list[list[str]]:
    """For each draft, LABELS sampled answers to its request, which are noted as written."""
    if not drafts:
        return []
    prompts, keys = [], []
    for draft in drafts:
        prompts += [Prompt(call_prompt(with_request(draft.sample, draft.request)))] * LABELS
        keys += [(config.seed, draft.sample.id, "label", attempt, i) for i in range(LABELS)]
    written = iter(writer(prompts, MAX_CALL_TOKENS, config.temperature, config.top_p, keys))
    texts = [list(islice(written, LABELS)) for _ in drafts]
    for draft, own in zip(drafts, texts):
        draft.written += own
    return texts


def meaning(text: str, sample: Sample) -> Hashable:
    """Equal for texts that call the same."""
    return calls_key(parse_calls(text).calls, sample.tools)


def majority(texts: Sequence[str], sample: Sample) -> list[str]:
    """Of these texts those that call what most of them call."""
    alike = {}
    for text in texts:
        alike.setdefault(meaning(text, sample), []).append(text)
    return max(alike.values(), key=len, default=[])


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
        agreeing = majority(fitting, draft.sample)
        draft.text = agreeing[0] if agreeing else ""
        if len(agreeing) < AGREE:
            draft.reason = f"fewer than {AGREE} fitting calls agree"
    return drafts


def write_shown(writer: Writer, samples: Sequence[Sample], h: dict, attempt: int,
                config) -> list[Draft]:
    """As --pair joint, but the direct answer's first call stands under x: what is to be written is
    shown, where a small model does not follow what is said."""
    prompts, drafts = [], []
    for sample in samples:
        line, request = h[sample.id], quoted(request_text(sample))
        likeliest = max(line.candidates, key=line.candidates.get)
        shown = (*parse_calls(line.text).calls, Call(likeliest))[0]
        start = SHOWN_START.format(request=request, call=call_json(shown))
        prompts.append(Prompt(asked(sample, ASK_SHOWN), start, SHOWN_FORM))
    for sample, text in zip(samples, write_each(writer, samples, prompts, attempt, config)):
        request, _, call = text.partition("\n")
        own = in_form_of(h[sample.id].text, parse_calls(call).calls)
        draft = Draft(sample, [text], "", own, check_text(call, sample))
        drafts.append(draft)
        try:
            draft.request = " ".join(json.loads(request).split())
            draft.reason = check_request(draft.request, sample) or draft.reason
        except ValueError:
            draft.reason = "the request did not end"
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


def write(writer: Writer, samples: Sequence[Sample], h: dict, attempt: int, config) -> list[Draft]:
    """Drafts as --pair says; those that --filter keeps have no reason against them."""
    ways = {**WAYS, "request": write_request_first, "shown": write_shown, "two": write_of_two}
    drafts = ways[config.pair](writer, samples, h, attempt, config)
    if config.filter == "none":
        for draft in drafts:
            if draft.request and draft.text:
                draft.reason = ""
    if config.filter == "consistent":
        sound = [draft for draft in drafts if not draft.reason]
        for draft, texts in zip(sound, answers(writer, sound, attempt, config)):
            meanings = [meaning(text, draft.sample) for text in texts]
            if meanings.count(meaning(draft.text, draft.sample)) <= LABELS // 2:
                draft.reason = "most answers to it call something else"
    return drafts


# ------------------------------------------------------------------------------------ the program

def another(sample: Sample, everyone: Sequence[Sample], seed: int) -> Sample:
    """One of the other samples of the benchmark."""
    others = [other for other in everyone if other.id != sample.id]
    draw = torch.randint(len(others), (), generator=seeded(seed, sample.id, "unrelated"))
    return others[int(draw)]


@torch.no_grad()
def divergence(agent: Agent, sample: Sample, params: Params, config: train.Config) -> float:
    """KL(adapted || base) in nats: the mean over the last tokens of the sample's prompt."""
    ids = train.acted_on(agent, call_prompt(sample), config)
    cache = train.before_them(agent, [call_prompt(sample)], config)

    def log_p() -> torch.Tensor:
        hidden = agent.model(torch.tensor([ids], device=agent.model.device),
                             cache.fork() if cache else None)
        return agent.model.logits(hidden[0, -KL_TOKENS:]).log_softmax(-1)       # (tokens, V)
    base = log_p()
    with adapters(agent.model, params, config.alpha):
        adapted = log_p()
    return F.kl_div(base, adapted, log_target=True, reduction="batchmean").item()


def stages(config: LessonConfig) -> tuple[train.Stage, train.Stage]:
    """G and T of this configuration: the core's own where it does what the core does."""
    g, t, this = train.G, train.T, sys.modules[__name__]
    if config.lesson == "gold" or config.filter != "schema" or config.pair not in WAYS:
        g = replace(g, reads=(*g.reads, "filter", "labels"), code=(augment, this))
    if config.lesson != "self" or config.measure_kl:
        t = replace(t, line=Looked, reads=(*t.reads, "lesson", "measure_kl"),
                    code=(*t.code, this, stream))
    return g, replace(t, after=g)


def improve(agent: Agent, samples: Sequence[Sample], config: LessonConfig, kept: Kept,
            everyone: Sequence[Sample]) -> list[Outcome]:
    """Algorithm 1 with other lessons. everyone: all samples of the benchmark, with labels for
    --lesson gold alone."""
    g_stage, t_stage = stages(config)
    h = kept(train.H, samples, lambda xs: train.assess(agent, xs, config))
    unsure = [x for x in samples if h[x.id].margin < config.tau]
    about = {x.id: x for x in unsure}               # whom each one's pairs are written for
    if config.lesson == "unrelated":
        about = {x.id: another(x, everyone, config.seed) for x in unsure}
    if config.lesson == "gold":
        gold = {x.id: x.answers for x in everyone}
        def own(x): return Pair(request_text(x), in_form_of(h[x.id].text, gold[x.id]))
        g = kept(g_stage, unsure, lambda xs: [Found(x.id, [own(x)]) for x in xs])
        lessons = {x.id: [(call_prompt(x), pair.text) for pair in g[x.id].pairs] for x in unsure}
    else:
        subjects = list({y.id: y for y in about.values()}.values())     # two may draw the same
        h |= kept(train.H, subjects, lambda xs: train.assess(agent, xs, config))
        found = kept(g_stage, subjects, lambda xs: synthesize(agent.writer, xs, h, config, write))
        g = {x.id: found[about[x.id].id] for x in unsure}
        lessons = {x.id: train.lessons_of(about[x.id], g[x.id]) for x in unsure}

    def learn(xs: list[Sample]) -> list[Adapted]:
        def look(x, params): return {"kl": divergence(agent, x, params, config)}
        if not config.measure_kl:
            return train.adapt(agent, xs, [lessons[x.id] for x in xs], config)
        return [adapt_with(agent, x, lessons[x.id], config, look=look) for x in xs]
    t = kept(t_stage, [x for x in unsure if lessons[x.id]], learn)
    extra = {id: line.seen for id, line in t.items() if config.measure_kl}
    return [Outcome(h[x.id], g.get(x.id), t.get(x.id), extra.get(x.id, {})) for x in samples]


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    config = train.choose(train.parse_args(argv, LessonConfig, __doc__))
    config = replace(config, uses_labels=config.lesson == "gold")
    agent, everyone = train.set_up(replace(config, limit=0))
    samples = everyone[:config.limit or None]
    if not config.uses_labels:
        everyone = [sample.without_answers() for sample in everyone]
    agent.facts["labels"] = hashlib.sha256(repr(everyone).encode()).hexdigest()
    kept = Kept(config, agent.facts)
    return train.run(agent, samples, config, kept, partial(improve, everyone=everyone))


if __name__ == "__main__":
    sys.exit(main())
