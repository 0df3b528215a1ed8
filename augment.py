"""G, the self-augmentation of Algorithm 1: the model writes new pairs (request x', calls y') like an uncertain sample.

It sees the sample's tools and request, never its label. A pair is kept only if it parses and fits the tools' schema;
each that is not kept has a reason. A kept pair is what the sample's adapter is trained on.
"""
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

import torch

from data import Sample, call_prompt, system_message
from data.calls import Call, calls_key, check_call, parse_calls
from model import KVCache, PrefixCaches, Qwen2, Tokenizer, generate, seeded

# What is asked in the user turn, behind the tools, so that the tools' KV cache serves here as well.
ASK_REQUEST = ("Write two requests that a user may make of these tools. Both need the same tool, but the second is about other "
               "names, places, numbers or dates, in other words.")
ASK_PAIR = ASK_REQUEST + ("""

Under the second, write the tool calls that answer it, each in this form:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>""")
# ours: the assistant's turn is begun for it with the seed request as the first of the two. Asked for "a new request like
# this one", a small model repeats it word for word; begun like this, it goes on with a natural second.
PAIR_START = '1. "{request}"\n2. "'

TRIES = 3               # for each of the K pairs
LABELS = 5              # sampled calls for a new request, of which the majority is its label (--pair request) ...
AGREE = 2               # ... if at least so many agree: one draw alone is often a slip, and a slip is learnt in five steps
MAX_REQUEST_TOKENS = 128
MAX_CALL_TOKENS = 192


@dataclass(frozen=True)
class Pair:
    """A synthetic training example: a request and the answer to it, as calls and as the text that is trained on."""
    request: str
    calls: tuple[Call, ...]
    # ours: the text is the model's own, so that training sharpens what it calls and does not change how it writes it
    # (a model that leaves out the tags, trained to write them, goes on with further calls).
    text: str
    votes: int = 1                      # how many of the sampled labels agreed
    fits: bool = True                   # whether its calls fit the tools' schema


@dataclass(frozen=True)
class Rejected:
    """A try that gave no pair: what was written, and why it was not kept."""
    text: str
    reason: str


def request_text(sample: Sample) -> str:
    """The sample's request on one line; a dialogue as its turns, with who says what."""
    spoken = [m for m in sample.messages if m["role"] in ("user", "assistant") and m["content"]]
    if len(spoken) <= 1:
        return " ".join((spoken or sample.messages)[-1]["content"].split())
    return " ".join(f"{m['role'].capitalize()}: {' '.join(m['content'].split())}" for m in spoken)


def pair_prompt(sample: Sample, mode: str = "request") -> list[dict]:
    """The messages that ask for a new request (mode "request") or for a request and its calls ("joint")."""
    return [system_message(sample.tools), {"role": "user", "content": ASK_REQUEST if mode == "request" else ASK_PAIR}]


def with_request(sample: Sample, request: str) -> Sample:
    """The new sample x': the same tools, and one turn of the user."""
    return Sample(sample.id, ({"role": "user", "content": request},), sample.tools)


def check_request(request: str, seed: str) -> str:
    """Why a written request is of no use, or ""."""
    def plain(text): return "".join(c for c in text.casefold() if c.isalnum())
    if not plain(request):
        return "no request"
    if '{"' in request or "<tool_call>" in request:
        return "a call in place of a request"
    return "copy of the seed request" if plain(request) in plain(seed) else ""


def check_calls(calls: Sequence[Call], sample: Sample) -> str:
    """Why calls do not fit the sample's tools, or ""."""
    if not calls:
        return "no call could be read"
    return next((reason for call in calls if (reason := check_call(call, sample.tools))), "")


def majority(texts: Sequence[str], sample: Sample, agree: int = AGREE) -> tuple[str, int, Counter]:
    """The first text that gives the calls which most give, among those that fit the schema, the votes for it, and why the
    others fell out; "" where fewer than `agree` agree."""
    votes, first, reasons = Counter(), {}, Counter()
    for text in texts:
        calls = parse_calls(text).calls
        if reason := check_calls(calls, sample):
            reasons[reason] += 1
            continue
        key = calls_key(calls, sample.tools)
        votes[key] += 1
        first.setdefault(key, text)
    key, count = votes.most_common(1)[0] if votes else (None, 0)        # the first seen among equals
    if count < agree:
        return "", count, reasons or Counter({f"fewer than {agree} calls agree": 1})
    return first[key], count, reasons


# --------------------------------------------------------------------------------------------------------- who writes

# A writer: for each prompt, which is messages and how the assistant's turn begins, one text for each of its keys (seeds), of
# at most so many tokens: writer(prompts, limit, temperature, top_p, keys).
Writer = Callable[[Sequence[tuple[list[dict], str]], int, float, float, Sequence[Sequence[tuple]]], list[list[str]]]


def sample_texts(model: Qwen2, tokenizer: Tokenizer, prefixes: PrefixCaches, prompts: Sequence[tuple[list[int], list[int]]],
                 limit: int, temperature: float, top_p: float, keys: Sequence[Sequence[tuple]]) -> list[list[str]]:
    """For each prompt (head, rest) one sampled text for each of its keys, all in one batch; a prompt is read once."""
    caches, last, generators = [], [], []
    for (head, rest), own in zip(prompts, keys):
        cache = prefixes.read(head) if head else model.new_cache()
        with torch.no_grad():
            model(torch.tensor([rest[:-1]], device=model.device), cache)
        caches += [cache] * len(own)
        last += [rest[-1:]] * len(own)
        generators += [seeded(*key) for key in own]
    contexts = [[*head, *rest] for (head, rest), own in zip(prompts, keys) for _ in own]
    texts = iter(generate(model, last, tokenizer.eos, limit, KVCache.stack(caches), temperature, top_p, generators, contexts=contexts))
    return [[tokenizer.decode(next(texts)) for _ in own] for own in keys]


def local_writer(model: Qwen2, tokenizer: Tokenizer, prefixes: PrefixCaches) -> Writer:
    """The model itself, or a teacher that is loaded beside it."""
    def write(prompts, limit, temperature, top_p, keys):
        ids = [(head, rest + tokenizer.encode(start)) for messages, start in prompts for head, rest in [tokenizer.split_chat(messages)]]
        return sample_texts(model, tokenizer, prefixes, ids, limit, temperature, top_p, keys)
    return write


TIMEOUT, RETRIES, WAIT = 120.0, 5, 1.0      # seconds for one reply; further tries; seconds before the first, doubled each time


@dataclass(frozen=True)
class RemoteWriter:
    """A teacher behind an OpenAI-compatible API, POST <url>/chat/completions; ValueError for an address that is not safe.

    The key is read from OPENAI_API_KEY at each request, and goes nowhere else: over plain http only to this machine, not on
    after a redirect, into no message and no file. How long a reply may be is left to the server.
    """
    url: str
    model: str

    def __post_init__(self):
        try:
            parts = urllib.parse.urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0        # .port raises for what is none
        except ValueError:
            sound = False
        if not sound or any(mark in self.url for mark in "@?#"):
            raise ValueError("--teacher: a URL is to look like https://host/v1, without a user name, a key or a query in it")
        if not api_key().isprintable() or not api_key().isascii():
            raise ValueError("OPENAI_API_KEY holds characters that no key has")
        if parts.scheme == "http" and api_key() and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise ValueError(f"--teacher {self.url}: OPENAI_API_KEY would travel unencrypted; use https, or unset the key")

    def __call__(self, prompts, limit, temperature, top_p, keys) -> list[list[str]]:
        jobs = [(messages, start, key) for (messages, start), own in zip(prompts, keys) for key in own]
        with ThreadPool(8) as pool:                     # its threads are daemons: who interrupts a run need not wait for replies
            texts = iter(pool.map(lambda job: self.ask(*job, temperature, top_p), jobs, chunksize=1))
        return [[next(texts) for _ in own] for own in keys]

    def ask(self, messages: list[dict], start: str, key: tuple, temperature: float, top_p: float) -> str:
        """One reply. The seed makes it repeatable where the server heeds it."""
        *before, last = messages
        if start:                                       # the API cannot begin the assistant's turn, so the user asks for it
            last = {**last, "content": f"{last['content']}\n\nThe answer begins like this. Write what follows, and nothing else:\n{start}"}
        body = {"model": self.model, "messages": [*before, last], "seed": seeded(*key).initial_seed() % 2 ** 31}
        # what is 1, the API's own default, is left out: some models take no temperature
        body |= {name: value for name, value in (("temperature", temperature), ("top_p", top_p)) if value != 1}
        reply = self.post(json.dumps(body).encode())
        try:
            text = reply["choices"][0]["message"]["content"] or ""
            return next((text[len(start) - i:] for i in range(len(start)) if text.startswith(start[i:])), text)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ConnectionError(f"--teacher {self.url}: the reply is none of /chat/completions ({str(reply)[:80]})") from None

    def post(self, body: bytes) -> dict:
        """The reply's JSON; ConnectionError after RETRIES further tries of what may pass (busy, broken or late servers)."""
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, {"Content-Type": "application/json"})
        if api_key():
            request.add_unredirected_header("Authorization", f"Bearer {api_key()}")
        # no proxy for plain http: that is for this machine alone
        opener = urllib.request.build_opener(NoRedirect, *([urllib.request.ProxyHandler({})] * self.url.startswith("http:")))
        for attempt in range(RETRIES + 1):
            wait = WAIT * 2 ** attempt
            try:
                with opener.open(request, timeout=TIMEOUT) as response:
                    content = response.read()
                try:
                    return json.loads(content)
                except ValueError:
                    problem = "what came is no JSON"
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    hint = {401: "; is OPENAI_API_KEY set and right?", 403: "; is OPENAI_API_KEY set and right?",
                            404: "; is the URL right (.../v1) and --teacher-model known there?"}.get(error.code, "")
                    raise ConnectionError(f"--teacher {self.url}: {problem}{hint}") from None
                if (error.headers.get("Retry-After") or "").isdigit():
                    wait = min(60, max(wait, int(error.headers["Retry-After"])))
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < RETRIES:
                time.sleep(wait)
        raise ConnectionError(f"--teacher {self.url}: no reply after {RETRIES + 1} tries ({problem}); what is finished is kept, and the same "
                              "command goes on")


def api_key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key and the prompts are for the host that the user named."""

    def redirect_request(self, *_):
        return None


# ------------------------------------------------------------------------------------------------------------- pairs

@dataclass
class Found:
    """What came of the tries for one sample."""
    pairs: list[Pair] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)      # all that was written, which is what it cost


def synthesize(writer: Writer, samples: Sequence[Sample], k: int = 1, mode: str = "request", temperature: float = 0.7, top_p: float = 0.95,
               seed: int = 0, filter: str = "schema") -> list[Found]:
    """For each sample up to k pairs (x', y'), and the tries that failed; at most TRIES tries a pair.

    mode "joint" (the paper's way): request and call in one go. "request": the request, then LABELS samples of its calls, of
    which the majority is kept. filter: "none" keeps what was written; "schema" what fits the tools; "consistent" only what
    more than half of LABELS sampled answers to the request agree with, too.
    """
    found = [Found() for _ in samples]
    limit, labels = MAX_REQUEST_TOKENS + (MAX_CALL_TOKENS if mode == "joint" else 0), LABELS if filter != "none" else 1
    for attempt in range(TRIES * k):
        todo = [(sample, own) for sample, own in zip(samples, found) if len(own.pairs) < k]
        if not todo:
            break
        written = writer([(pair_prompt(sample, mode), PAIR_START.format(request=request_text(sample))) for sample, _ in todo],
                         limit, temperature, top_p, [[(seed, sample.id, "pair", attempt)] for sample, _ in todo])
        drafts = []                                     # (sample, what it has so far, request, what follows it, all that was written)
        for (sample, own), (text,) in zip(todo, written):
            own.texts.append(text)
            line, _, rest = text.strip().partition("\n")
            request = line.strip().removesuffix('"').strip()
            reason = check_request(request, request_text(sample) if filter != "none" else "")
            if not reason and any(request == pair.request for pair in own.pairs):
                reason = "copy of an earlier pair"
            if reason:
                own.rejected.append(Rejected(text, reason))
            else:
                drafts.append((sample, own, request, rest.strip(), text))
        answers = [[] for _ in drafts]
        if drafts and (mode == "request" or filter == "consistent"):
            answers = writer([(call_prompt(with_request(sample, request)), "") for sample, _, request, _, _ in drafts], MAX_CALL_TOKENS,
                             temperature, top_p, [[(seed, sample.id, "label", attempt, j) for j in range(labels)] for sample, *_ in drafts])
        for (sample, own, request, rest, text), sampled in zip(drafts, answers):
            own.texts += sampled
            answer, votes, reason = label(sample, rest, sampled, mode, filter)
            if reason:
                own.rejected.append(Rejected("\n".join([text, *sampled[:1]]), reason))
            else:
                calls = parse_calls(answer).calls
                own.pairs.append(Pair(request, calls, answer.strip(), votes, not check_calls(calls, sample)))
    return found


def label(sample: Sample, written: str, texts: Sequence[str], mode: str, filter: str) -> tuple[str, int, str]:
    """The answer of a pair as text, the votes for it, and why it is not kept or "". written: what followed the request;
    texts: the sampled answers to it, if any."""
    if filter == "none":
        text = (texts or [written])[0]
        return text, 1, "" if text.strip() else "no call could be read"
    text, votes, reasons = majority(texts, sample, LABELS // 2 + 1 if filter == "consistent" else AGREE) if texts else (written, 1, {})
    if not text:
        return "", votes, reasons.most_common(1)[0][0] if reasons else "no call could be read"
    def key(text): return calls_key(parse_calls(text).calls, sample.tools)
    if mode == "joint" and key(text) != key(written):
        return "", votes, "the majority calls something else"
    text = written if mode == "joint" else text
    return text, votes, check_calls(parse_calls(text).calls, sample)


# ------------------------------------------------------------------------------------------ what the pairs are like

def rouge_l(text: str, other: str) -> float:
    """ROUGE-L, in [0, 1]: F1 of the longest common subsequence of words (Lin 2004)."""
    a, b = text.casefold().split(), other.casefold().split()
    row = [0] * (len(b) + 1)                            # row[j]: the longest of what was read of a, and b[:j]
    for word in a:
        before = row
        row = [0]
        for j, against in enumerate(b):
            row.append(before[j] + 1 if word == against else max(before[j + 1], row[j]))
    return 2 * row[-1] / (len(a) + len(b)) if a or b else 1.0


def distinct_2(texts: Iterable[str]) -> float:
    """The share of word pairs, over all texts, that are different ones (Li et al. 2016); NaN without any."""
    pairs = [pair for text in texts for words in [text.casefold().split()] for pair in zip(words, words[1:])]
    return len(set(pairs)) / len(pairs) if pairs else float("nan")


def argument_values(calls: Iterable[dict]) -> list[str]:
    """The scalar values of calls' arguments, also those inside lists and objects, as text."""
    def scalars(value):
        if isinstance(value, (dict, list)):
            return [text for item in (value.values() if isinstance(value, dict) else value) for text in scalars(item)]
        return [str(value)]
    return [text for call in calls for text in scalars(call["arguments"])]
