"""G, the self-augmentation of Algorithm 1: the model writes new pairs (request x', calls y') like an uncertain sample.

It sees the sample's tools and request, never its label. A pair is kept only if it parses and fits the tools' schema;
each that is not kept has a reason. A kept pair is what the sample's adapter is trained on.
"""
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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


def majority(texts: Sequence[str], sample: Sample) -> tuple[str, int, Counter]:
    """The first text that gives the calls which most give, among those that fit the schema, the votes for it, and why the
    others fell out; "" where fewer than AGREE agree."""
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
    if count < AGREE:
        return "", count, reasons or Counter({"no two calls agree": 1})
    return first[key], count, reasons


def sample_texts(model: Qwen2, tokenizer: Tokenizer, prefixes: PrefixCaches, prompts: Sequence[tuple[list[int], list[int]]],
                 limit: int, temperature: float, top_p: float, keys: Sequence[Sequence[tuple]]) -> list[list[str]]:
    """For each prompt (head, rest) one sampled text for each of its keys, all in one batch; a prompt is read once."""
    caches, last, generators = [], [], []
    for (head, rest), own in zip(prompts, keys):
        cache = prefixes.read(head)
        with torch.no_grad():
            model(torch.tensor([rest[:-1]], device=model.device), cache)
        caches += [cache] * len(own)
        last += [rest[-1:]] * len(own)
        generators += [seeded(*key) for key in own]
    texts = iter(generate(model, last, tokenizer.eos, limit, KVCache.stack(caches), temperature, top_p, generators))
    return [[tokenizer.decode(next(texts)) for _ in own] for own in keys]


def synthesize(model: Qwen2, tokenizer: Tokenizer, prefixes: PrefixCaches, samples: Sequence[Sample], k: int = 1,
               mode: str = "request", temperature: float = 0.7, top_p: float = 0.95,
               seed: int = 0) -> list[tuple[list[Pair], list[Rejected]]]:
    """For each sample up to k pairs (x', y') written by the model itself, and the tries that failed; at most TRIES tries a pair.

    mode "joint" (the paper's way) writes request and calls in one go. mode "request" writes the request, then samples
    its calls LABELS times and keeps the majority of those that pass the schema check.
    """
    found: list[tuple[list[Pair], list[Rejected]]] = [([], []) for _ in samples]
    seeds, asks = [request_text(sample) for sample in samples], []
    for sample, seed_request in zip(samples, seeds):
        head, ask = tokenizer.split_chat(pair_prompt(sample, mode))
        asks.append((head, ask + tokenizer.encode(PAIR_START.format(request=seed_request))))
    def write(prompts, limit, keys): return sample_texts(model, tokenizer, prefixes, prompts, limit, temperature, top_p, keys)
    for attempt in range(TRIES * k):
        todo = [i for i, (pairs, _) in enumerate(found) if len(pairs) < k]
        if not todo:
            break
        limit = MAX_REQUEST_TOKENS + (MAX_CALL_TOKENS if mode == "joint" else 0)
        written = [texts[0] for texts in write([asks[i] for i in todo], limit, [[(seed, samples[i].id, "pair", attempt)] for i in todo])]
        drafts = []                                     # (sample, request, what follows it, all that was written)
        for i, text in zip(todo, written):
            line, _, rest = text.strip().partition("\n")
            request = line.strip().removesuffix('"').strip()
            reason = check_request(request, seeds[i])
            if not reason and any(request == pair.request for pair in found[i][0]):
                reason = "copy of an earlier pair"
            if reason:
                found[i][1].append(Rejected(text, reason))
            else:
                drafts.append((i, request, rest.strip(), text))
        labels = [[]] * len(drafts)
        if mode == "request" and drafts:
            prompts = [tokenizer.split_chat(call_prompt(with_request(samples[i], request))) for i, request, _, _ in drafts]
            labels = write(prompts, MAX_CALL_TOKENS, [[(seed, samples[i].id, "label", attempt, j) for j in range(LABELS)]
                                                      for i, _, _, _ in drafts])
        for (i, request, text, whole), texts in zip(drafts, labels):
            if mode == "joint":
                votes, reason = 1, check_calls(parse_calls(text).calls, samples[i])
            else:
                text, votes, reasons = majority(texts, samples[i])
                reason = "" if text else reasons.most_common(1)[0][0]
                whole += "\n" + texts[0]
            if reason:
                found[i][1].append(Rejected(whole, reason))
            else:
                found[i][0].append(Pair(request, parse_calls(text).calls, text.strip(), votes))
    return found
