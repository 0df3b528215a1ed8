"""G, the self-augmentation of Algorithm 1: new pairs (request x', calls y') like a sample.

The writer, the model itself (TT-SI) or a teacher (TT-D), sees the sample's tools and request and
the direct answer, never the label. Five steps learn whatever a pair says, so what it says is
checked: it fits the tools' schema, it is new, and its values can be known from its request. Each
try that gave no pair has a reason. Read write_call_first first.
"""
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

from data import (Sample, call_json, call_prompt, call_text, request_text, system_message,
                  with_request)
from data.calls import Call, calls_key, check_call, kind_of, parse_calls, required_arguments
from model import Filling, Form, KVCache, Qwen2, Tokenizer, generate, seeded
from uncertainty import PrefixCaches, answer_start

# What is asked in the user turn, behind the tools, so that the tools' KV cache serves here, too.
ASK_PAIR = """Write two tool calls, and under each the request of a user that it answers. Both are \
calls of the same tool, but the second is about other names, places, numbers or dates."""
ASK_JOINT = """Write two requests that a user may make of these tools. Both need the same tool, \
but the second is about other names, places, numbers or dates, in other words.

Under the second, write the tool calls that answer it, each in this form:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
# ours: the assistant's turn is begun for it, with what is known of the sample as the first of two.
# Asked for "a request like this one", a small model repeats it; begun so, it writes a natural one.
PAIR_START = '1. {call}\n{request}\n2. '        # the direct answer's call; the request, quoted
JOINT_START = '1. "{request}"\n2. "'
TRIES = 3       # for each of the K pairs
MAX_REQUEST_TOKENS = 128
MAX_CALL_TOKENS = 192
RETRIES = 5     # further tries of a request to a server that is busy, broken or late
# By declared type, how a value begins, which characters close it, and how it ends; else a string.
# The blank before a number is the model's to write: its tokens may begin with one.
VALUES = {"array": (" [", "]", "]"), "object": (" {", "}", "}"), "integer": ("", ",}\n", ""),
          "number": ("", ",}\n", ""), "boolean": ("", ",}\n", ""), "string": (' "', '"', '"')}


@dataclass(frozen=True)
class Prompt:
    """What a writer is shown. A server, which cannot fill in a form, sees how that begins."""
    messages: list[dict]
    start: str = ""                     # how the assistant's turn begins; it is not returned
    form: Form = Form(("",), ())        # what follows, and is returned; without blanks it is free


# (prompts, limit in tokens, temperature, top_p, each prompt's seed) -> a text for each prompt; it
# begins with the form's first part
Writer = Callable[[Sequence[Prompt], int, float, float, Sequence[tuple]], list[str]]


@dataclass(frozen=True)
class Pair:
    """A synthetic training example: a request x' and the text of its calls y'."""
    request: str
    text: str
    read_back: bool = False     # a value that the request does not spell was read from it again


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

    def __call__(self, prompts, limit, temperature, top_p, keys) -> list[str]:
        caches, last, forms = [], [], []
        for prompt in prompts:
            head, rest = self.tokenizer.split_chat(prompt.messages)
            rest = rest + self.tokenizer.encode(prompt.start + prompt.form.parts[0])
            caches.append(self.prefixes.read(head, rest[:-1]))
            last.append(rest[-1:])
            forms.append(Filling(prompt.form, self.tokenizer) if prompt.form.closers else None)
        generators = [seeded(*key) for key in keys]
        written = generate(self.model, last, self.tokenizer.eos, limit, KVCache.stack(caches),
                           temperature, top_p, generators, forms)
        return [prompt.form.parts[0] + self.tokenizer.decode(row.ids)
                for prompt, row in zip(prompts, written)]


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

    def __call__(self, prompts, limit, temperature, top_p, keys) -> list[str]:
        from huggingface_hub import InferenceClient     # only here: it takes a second to import
        secret = os.environ.get("OPENAI_API_KEY", "").strip() or "none"     # not the hub's token
        client = InferenceClient(base_url=self.url, api_key=secret, timeout=self.timeout)
        jobs = []
        for prompt, key in zip(prompts, keys):
            *before, last = prompt.messages
            start = prompt.start + prompt.form.parts[0]
            if start:           # the API cannot begin the assistant's turn, so the user asks for it
                last = {**last, "content": f"{last['content']}\n\nThe answer begins like this. "
                                           f"Write what follows, and nothing else:\n{start}"}
            seed = seeded(*key).initial_seed() % 2 ** 31        # where the server heeds it
            body = dict(messages=[*before, last], model=self.model, seed=seed,
                        temperature=temperature, top_p=top_p)
            jobs.append((start, prompt.form.parts[0], body))
        with ThreadPool(8) as pool:
            return list(pool.imap(lambda job: self.ask(client, *job), jobs))

    def ask(self, client, start: str, first: str, request: dict) -> str:
        """`first`, and what is written after `start`, which is not repeated. A busy, broken or late
        server is asked again."""
        from huggingface_hub.errors import HTTPError    # the HTTP library's own; no OSError
        for wait in [0] + [self.wait * 2 ** i for i in range(RETRIES)]:
            time.sleep(wait)
            try:
                text = client.chat_completion(**request).choices[0].message.content or ""
                skipped = next(i for i in range(len(start) + 1) if text.startswith(start[i:]))
                return first + text[len(start) - skipped:]
            except (HTTPError, OSError, ValueError, TypeError, LookupError, AttributeError) as err:
                code = getattr(getattr(err, "response", None), "status_code", 0)
                problem = f"HTTP {code}" if code else type(err).__name__
            if 400 <= code < 500 and code not in (408, 409, 429):
                raise ConnectionError(f"--teacher {self.url}: {problem}; are the URL, "
                                      "--teacher-model and OPENAI_API_KEY right?")
        raise ConnectionError(f"--teacher {self.url}: no chat completion after {RETRIES + 1} tries "
                              f"({problem})")


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# ------------------------------------------------------------------------- what is of use as a pair

@dataclass
class Draft:
    """A pair as it was written for a sample, and why it is of no use ("": it is of use)."""
    sample: Sample
    written: list[str]                  # all texts: what it cost
    request: str
    text: str                           # of its calls
    reason: str = ""
    read_back: bool = False


def check_request(request: str, sample: Sample) -> str:
    """Why a written request is of no use, or ""."""
    plain, seed = "".join(filter(str.isalnum, request.casefold())), request_text(sample)
    if not plain:
        return "no request"
    if '{"' in request or "<tool_call>" in request:
        return "a call in place of a request"
    if plain in "".join(filter(str.isalnum, seed.casefold())):
        return "copy of the seed request"
    for name in [tool["name"] for tool in sample.tools]:
        is_word = re.fullmatch("[A-Z]?[a-z]+", name)        # `translate` may well be said
        if name in request and name not in seed and not is_word:
            return "the request names the tool"
    return ""


def check_text(text: str, sample: Sample) -> str:
    """Why the calls in a text do not fit the sample's tools, or ""."""
    calls = parse_calls(text).calls
    reasons = [check_call(call, sample.tools) for call in calls]
    return next(filter(None, reasons), "") if calls else "no call could be read"


def stands_in(value: object, request: str) -> bool:
    """Whether a request spells a value, each item of a list or object apart. It never spells
    "", null, a boolean or an empty list."""
    if isinstance(value, (list, dict)):
        items = list(value.values() if isinstance(value, dict) else value)
        return bool(items) and all(stands_in(item, request) for item in items)
    text = re.escape(str(value).strip())
    whole = rf"(?<!\w)(?<!\d[.,:]){text}(?!\w|[.,:]\d)"      # 5 is not in 15, nor in 5.7
    named = text and value is not None and not isinstance(value, bool)
    return bool(named and re.search(whole, request, re.I))


def in_form_of(text: str, calls: Sequence[Call]) -> str:
    """Calls with tags, unless `text`, the model's own, names a tool without them."""
    # ours: training is to sharpen what the model calls, not how it writes. Tags that it never
    # writes cost the five steps: it learns neither them nor the call.
    tags = "<tool_call>" in answer_start(text)
    return call_text(calls) if tags else "\n".join(map(call_json, calls))


def asked(sample: Sample, text: str) -> list[dict]:
    """The messages that show a sample's tools and ask for something to be written."""
    return [system_message(sample.tools), {"role": "user", "content": text}]


def write_each(writer: Writer, samples: Sequence[Sample], prompts: Sequence[Prompt], attempt: int,
               config, limit: int = MAX_REQUEST_TOKENS + MAX_CALL_TOKENS) -> list[str]:
    """One sampled text for each sample's prompt; what it draws depends on it and the attempt."""
    keys = [(config.seed, sample.id, "pair", attempt) for sample in samples]
    return writer(prompts, limit, config.temperature, config.top_p, keys)


# ----------------------------------------------------- --pair call: first y', then its request x'

def call_form(sample: Sample, line) -> Prompt:
    """The prompt for a pair of the tool that H finds likeliest: its keys are given, its values and
    the request are blanks. line: the sample's line of H."""
    # paper: the pair is written in one go (--pair joint).
    # ours: the call first. Request first, a small model's request is often for another tool, and
    # the call it then writes seldom fits the schema.
    name = max(line.candidates, key=line.candidates.get)
    tool = next(tool for tool in sample.tools if tool["name"] == name)
    direct = (*parse_calls(line.text).calls, Call(name))[0]
    request, required = request_text(sample), required_arguments(tool)
    parts, closers = [f'{{"name": {quoted(name)}, "arguments": {{'], []
    for key, schema in tool["parameters"].items():
        # ours: an optional argument is given where the direct answer has it and x spells it: else
        # the pair would teach to leave it out. Where x does not, the pair teaches just that.
        spoken = key in direct.arguments and stands_in(direct.arguments[key], request)
        if key in required or spoken:
            begin, closer, end = VALUES.get(kind_of(schema), VALUES["string"])
            parts[-1] += f'{", " if closers else ""}{quoted(key)}:{begin}'
            closers.append(closer)
            parts.append(end)
    parts[-1] += '}}\n"'
    form = Form((*parts, '"'), (*closers, '"'))
    start = PAIR_START.format(call=call_json(direct), request=quoted(request))
    return Prompt(asked(sample, ASK_PAIR), start, form)


def write_call_first(writer: Writer, samples: Sequence[Sample], h: dict, attempt: int,
                     config) -> list[Draft]:
    """A draft for each sample: a call of the likeliest tool, and the request that it answers."""
    prompts = [call_form(x, h[x.id]) for x in samples]
    drafts, unspoken = [], []
    for sample, text in zip(samples, write_each(writer, samples, prompts, attempt, config)):
        call, _, request = text.partition("\n")
        new, direct = parse_calls(call).calls, parse_calls(h[sample.id].text).calls
        draft = Draft(sample, [text], "", in_form_of(h[sample.id].text, new))
        drafts.append(draft)
        draft.reason = check_text(call, sample)
        try:
            draft.request = " ".join(json.loads(request).split())
        except (ValueError, AttributeError, RecursionError):
            draft.reason = draft.reason or "the request did not end"
        if draft.reason:
            continue
        draft.reason = check_request(draft.request, sample)
        if len(new) > 1:
            draft.reason = "more than one call"
        if calls_key(new, sample.tools) in [calls_key([call], sample.tools) for call in direct]:
            draft.reason = "the direct answer again"
        spoken = [stands_in(value, draft.request) for value in new[0].arguments.values()]
        if not draft.reason and not all(spoken):
            unspoken.append(draft)
    read_back(writer, unspoken, h, config)
    return drafts


def read_back(writer: Writer, drafts: Sequence[Draft], h: dict, config) -> None:
    """Reject the drafts whose call is not also the greedy one for their request, with the tool's
    name given: some value cannot be known from it. CN is not in "China", but is read from it."""
    if not drafts:
        return
    calls = [parse_calls(draft.text).calls for draft in drafts]
    prompts = []
    for draft, (call,) in zip(drafts, calls):
        begun = f'{answer_start(h[draft.sample.id].text)}{quoted(call.name)[1:]}, "arguments":'
        messages = call_prompt(with_request(draft.sample, draft.request))
        prompts.append(Prompt(messages, "", Form((begun,), ())))
    keys = [(config.seed, draft.sample.id, "read back") for draft in drafts]
    written = writer(prompts, MAX_CALL_TOKENS, 0.0, 1.0, keys)
    for draft, own, text in zip(drafts, calls, written):
        read, tools = parse_calls(text).calls[:1], draft.sample.tools
        draft.written.append(text)
        draft.read_back = calls_key(read, tools) == calls_key(own, tools)
        if not draft.read_back:
            draft.reason = "a value cannot be read from the request"


# ------------------------------------------------------------------ --pair joint: in one go, freely

def write_joint(writer: Writer, samples: Sequence[Sample], h: dict, attempt: int,
                config) -> list[Draft]:
    """A draft for each sample: a request and the calls that answer it, in one text (paper)."""
    prompts = [Prompt(asked(x, ASK_JOINT), JOINT_START.format(request=request_text(x)))
               for x in samples]
    drafts = []
    for sample, text in zip(samples, write_each(writer, samples, prompts, attempt, config)):
        line, _, rest = text.strip().partition("\n")
        request = line.strip().removesuffix('"').strip()
        reason = check_request(request, sample) or check_text(rest, sample)
        calls = in_form_of(h[sample.id].text, parse_calls(rest).calls)      # without prose behind
        drafts.append(Draft(sample, [text], request, calls, reason))
    return drafts


# ----------------------------------------------------------------------------------------------- G

WAYS = {"call": write_call_first, "joint": write_joint}


def synthesize(writer: Writer, samples: Sequence[Sample], h: dict, config,
               write: Callable | None = None) -> list[Found]:
    """For each sample up to K pairs (x', y') and the tries that failed, at most TRIES * K in all.
    h: the lines of H by id. write: gives the drafts of a try, in place of --pair's."""
    found = {sample.id: Found(sample.id) for sample in samples}
    write = write or WAYS[config.pair]
    for attempt in range(TRIES * config.k):
        todo = [x for x in samples if len(found[x.id].pairs) < config.k]
        if not todo:
            break
        for draft in write(writer, todo, h, attempt, config):
            own = found[draft.sample.id]
            own.texts += draft.written
            copied = any(draft.request == p.request or draft.text == p.text for p in own.pairs)
            if copied and not draft.reason:
                draft.reason = "copy of an earlier pair"
            if draft.reason:
                own.rejected.append(Rejected(draft.written[0], draft.reason))
            else:
                own.pairs.append(Pair(draft.request, draft.text, draft.read_back))
    return list(found.values())
