"""G, the self-augmentation of Algorithm 1: new pairs (request x', calls y') like a sample.

The writer, the model itself (TT-SI) or a teacher (TT-D), sees the sample's tools and request, never
its label. A pair is kept if it parses and fits the tools' schema; each other try has a reason.
"""
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

import torch

from data import Sample, call_prompt, request_text, system_message, with_request
from data.calls import check_call, calls_key, parse_calls
from model import KVCache, Qwen2, Tokenizer, generate, seeded
from uncertainty import PrefixCaches

# What is asked in the user turn, behind the tools, so that the tools' KV cache serves here, too.
ASK_REQUEST = ("Write two requests that a user may make of these tools. Both need the same tool, "
               "but the second is about other names, places, numbers or dates, in other words.")
ASK_PAIR = ASK_REQUEST + """

Under the second, write the tool calls that answer it, each in this form:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
# ours: the assistant's turn is begun for it with the seed request as the first of the two. Asked
# for "a new request like this one", a small model repeats it; begun so, it writes a natural one.
PAIR_START = '1. "{request}"\n2. "'
TRIES = 3       # for each of the K pairs
LABELS = 5      # sampled calls for a new request; the majority is its label (--pair request) ...
AGREE = 2       # ... if so many agree: one draw alone is often a slip, and five steps learn it
MAX_REQUEST_TOKENS = 128
MAX_CALL_TOKENS = 192
RETRIES = 5     # further tries of a request to a server that is busy, broken or late
Prompt = tuple[list[dict], str]         # the messages, and how the assistant's turn begins
# (prompts, limit in tokens, temperature, top_p, each prompt's seeds) -> a text for each seed
Writer = Callable[[Sequence[Prompt], int, float, float, Sequence[Sequence[tuple]]], list[list[str]]]


@dataclass(frozen=True)
class Pair:
    """A synthetic training example: a request x' and the text of its calls y'."""
    request: str
    # ours: the text is the model's own: training sharpens what it calls, not how it writes.
    text: str
    votes: int = 1          # how many of the sampled labels agreed


@dataclass(frozen=True)
class Rejected:
    """A try that gave no pair: what was written, and why it was not kept."""
    text: str
    reason: str


@dataclass
class Found:
    """A line of G: what came of the tries for one sample."""
    id: str
    pairs: list[Pair] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)      # all that was written: what it cost
    seconds: float = 0.0

    def __post_init__(self):
        self.pairs = [p if isinstance(p, Pair) else Pair(**p) for p in self.pairs]
        self.rejected = [r if isinstance(r, Rejected) else Rejected(**r) for r in self.rejected]


@dataclass(frozen=True)
class LocalWriter:
    """The model itself, or a teacher that is loaded beside it. All texts are one batch."""
    model: Qwen2
    tokenizer: Tokenizer
    prefixes: PrefixCaches

    def __call__(self, prompts, limit, temperature, top_p, keys) -> list[list[str]]:
        caches, last, generators = [], [], []
        for (messages, start), own in zip(prompts, keys):
            head, rest = self.tokenizer.split_chat(messages)
            rest = rest + self.tokenizer.encode(start)
            cache = self.prefixes.read(head)
            with torch.no_grad():
                self.model(torch.tensor([rest[:-1]], device=self.model.device), cache)
            caches += [cache] * len(own)                # a prompt is read once for all its texts
            last += [rest[-1:]] * len(own)
            generators += [seeded(*key) for key in own]
        written = iter(generate(self.model, last, self.tokenizer.eos, limit, KVCache.stack(caches),
                                temperature, top_p, generators))
        return [[self.tokenizer.decode(next(written).ids) for _ in own] for own in keys]


@dataclass(frozen=True)
class ServerWriter:
    """A teacher behind an OpenAI-compatible API, which limits a text itself. OPENAI_API_KEY goes to
    that host alone, over plain http to this machine only. ConnectionError if there is no reply."""
    url: str
    model: str
    wait: float = 1.0           # seconds before the second try; each further one doubles it
    timeout: float = 120.0

    def __post_init__(self):
        safe = r"(https?)://([\w.-]+|\[[0-9a-f:]+\])(:\d+)?(/[\w.~/-]*)?/v1/?"
        parts = re.fullmatch(safe, self.url)
        if not parts:           # the URL is not shown: it may hold a password
            raise ValueError("--teacher: a URL looks like https://host/v1: it ends in /v1, and has "
                             "no user name, no key and no query")
        local = parts[2] in ("localhost", "127.0.0.1", "[::1]")
        if parts[1] == "http" and not local and os.environ.get("OPENAI_API_KEY"):
            raise ValueError(f"--teacher {self.url}: OPENAI_API_KEY would travel unencrypted; use "
                             "https, or unset the key")

    def __call__(self, prompts, limit, temperature, top_p, keys) -> list[list[str]]:
        from huggingface_hub import InferenceClient     # only here: it takes a second to import
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"    # not the hub's own token
        client = InferenceClient(base_url=self.url, api_key=key, timeout=self.timeout)
        jobs = []
        for (messages, start), own in zip(prompts, keys):
            *before, last = messages
            if start:           # the API cannot begin the assistant's turn, so the user asks for it
                last = {**last, "content": f"{last['content']}\n\nThe answer begins like this. "
                                           f"Write what follows, and nothing else:\n{start}"}
            for draw in own:
                seed = seeded(*draw).initial_seed() % 2 ** 31       # where the server heeds it
                jobs.append((start, dict(messages=[*before, last], model=self.model, seed=seed,
                                         temperature=temperature, top_p=top_p)))
        with ThreadPool(8) as pool:
            texts = iter(list(pool.imap(lambda job: self.ask(client, *job), jobs)))
        return [[next(texts) for _ in own] for own in keys]

    def ask(self, client, start: str, request: dict) -> str:
        """One text, without what repeats `start`. A busy, broken or late server is asked again."""
        from huggingface_hub.errors import HTTPError    # the HTTP library's own; no OSError
        for wait in [0] + [self.wait * 2 ** i for i in range(RETRIES)]:
            time.sleep(wait)
            try:
                text = client.chat_completion(**request).choices[0].message.content or ""
                overlap = next(i for i in range(len(start) + 1) if text.startswith(start[i:]))
                return text[len(start) - overlap:]
            except (HTTPError, OSError, ValueError, TypeError, LookupError, AttributeError) as err:
                code = getattr(getattr(err, "response", None), "status_code", 0)
                problem = f"HTTP {code}" if code else type(err).__name__
            if 400 <= code < 500 and code not in (408, 409, 429):
                raise ConnectionError(f"--teacher {self.url}: {problem}; are the URL, "
                                      "--teacher-model and OPENAI_API_KEY right?")
        raise ConnectionError(f"--teacher {self.url}: no chat completion after {RETRIES + 1} tries "
                              f"({problem})")


@dataclass(frozen=True)
class Draft:
    """A request that was written for a sample, and what followed it."""
    sample: Sample
    request: str
    rest: str
    text: str                           # all of it


@dataclass(frozen=True)
class Label:
    """The answer to a draft's request, or why there is none."""
    text: str
    votes: int
    reason: str                         # "" if the answer is kept
    sampled: Sequence[str] = ()         # what it was chosen from


def check_request(request: str, seed: str) -> str:
    """Why a written request is of no use, or ""."""
    plain = "".join(filter(str.isalnum, request.casefold()))
    if not plain:
        return "no request"
    if '{"' in request or "<tool_call>" in request:
        return "a call in place of a request"
    copied = plain in "".join(filter(str.isalnum, seed.casefold()))
    return "copy of the seed request" if copied else ""


def check_text(text: str, sample: Sample) -> str:
    """Why the calls in a text do not fit the sample's tools, or ""."""
    calls = parse_calls(text).calls
    reasons = [check_call(call, sample.tools) for call in calls]
    return next(filter(None, reasons), "") if calls else "no call could be read"


def majority(texts: Sequence[str], sample: Sample, agree: int = AGREE) -> Label:
    """The first text that calls what most call of those that fit, if at least `agree` do."""
    reasons = [check_text(text, sample) for text in texts]
    fitting = [text for text, reason in zip(texts, reasons) if not reason]
    keys = [calls_key(parse_calls(text).calls, sample.tools) for text in fitting]
    most = max(keys, key=keys.count, default=None)              # the first among equals
    votes = keys.count(most)
    if votes >= agree:
        return Label(fitting[keys.index(most)], votes, "", texts)
    reasons = [reason for reason in reasons if reason] or [f"fewer than {agree} calls agree"]
    return Label("", votes, max(reasons, key=reasons.count), texts)


def label_drafts(writer: Writer, drafts: Sequence[Draft], attempt: int, config) -> list[Label]:
    """joint: what was written with the request. request: what most of LABELS answers to it call."""
    if config.pair == "joint":
        return [Label(d.rest, 1, check_text(d.rest, d.sample)) for d in drafts]
    texts = sample_labels(writer, drafts, attempt, config)
    return [majority(own, draft.sample) for own, draft in zip(texts, drafts)]


def sample_labels(writer: Writer, drafts: Sequence[Draft], attempt: int, config,
                  count: int = LABELS) -> list[list[str]]:
    """For each draft, `count` sampled answers to its request."""
    prompts = [(call_prompt(with_request(d.sample, d.request)), "") for d in drafts]
    keys = [[(config.seed, d.sample.id, "label", attempt, i) for i in range(count)] for d in drafts]
    return writer(prompts, MAX_CALL_TOKENS, config.temperature, config.top_p, keys)


def write_drafts(writer: Writer, todo: Sequence[tuple[Sample, Found]], attempt: int,
                 config) -> list[Draft]:
    """A new request for each sample; those of no use are put into its Found as rejected."""
    ask, limit = ASK_REQUEST, MAX_REQUEST_TOKENS
    if config.pair == "joint":
        ask, limit = ASK_PAIR, MAX_REQUEST_TOKENS + MAX_CALL_TOKENS
    prompts = [([system_message(sample.tools), {"role": "user", "content": ask}],
                PAIR_START.format(request=request_text(sample))) for sample, _ in todo]
    keys = [[(config.seed, sample.id, "pair", attempt)] for sample, _ in todo]
    written = writer(prompts, limit, config.temperature, config.top_p, keys)
    drafts = []
    for (sample, found), (text,) in zip(todo, written):
        found.texts.append(text)
        line, _, rest = text.strip().partition("\n")
        request = line.strip().removesuffix('"').strip()
        reason = check_request(request, request_text(sample))
        if request in [pair.request for pair in found.pairs]:
            reason = "copy of an earlier pair"
        if reason:
            found.rejected.append(Rejected(text, reason))
        else:
            drafts.append(Draft(sample, request, rest.strip(), text))
    return drafts


def synthesize(writer: Writer, samples: list[Sample], config, label=label_drafts) -> list[Found]:
    """For each sample up to K pairs (x', y') and the tries that failed, at most TRIES a pair."""
    found = {sample.id: Found(sample.id) for sample in samples}
    for attempt in range(TRIES * config.k):
        todo = [(x, found[x.id]) for x in samples if len(found[x.id].pairs) < config.k]
        drafts = write_drafts(writer, todo, attempt, config) if todo else []
        answers = label(writer, drafts, attempt, config) if drafts else []
        for draft, answer in zip(drafts, answers):
            own = found[draft.sample.id]
            own.texts += answer.sampled
            if answer.reason:
                text = "\n".join([draft.text, *answer.sampled[:1]])
                own.rejected.append(Rejected(text, answer.reason))
            else:
                own.pairs.append(Pair(draft.request, answer.text.strip(), answer.votes))
    return list(found.values())
