"""G, the self-augmentation of Algorithm 1: new pairs (request x', calls y') like a sample.

The writer, the model itself (TT-SI) or a teacher (TT-D), sees the sample's tools and request and
the direct answer, never the label. A wrong pair would be learnt as well, so each is checked: it
fits the tools' schema, it is new, and its request determines its values. A try that gave no pair
stores its reason.
"""
from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.pool import ThreadPool
from threading import Event

from data import Sample, call_prompt, with_request
from data.calls import (Call, as_json, call_keys, call_start, call_text, check_call,
                        parse_calls, required_arguments, type_of, without_thinking)
from data.chat import Tokenizer
from data.runs import stage
from model import Blank, Form, Qwen2, generate, seeded
from uncertainty import PrefixCaches

# These texts go into the user turn, after the tools, so that the cached tools are used again.
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
MAX_PAIR_TOKENS = MAX_REQUEST_TOKENS + MAX_CALL_TOKENS
RETRIES = 5     # further tries of a request to a server that is busy, broken or late


@dataclass(frozen=True)
class Pair:
    """A synthetic training example: a request x' and the text of its calls y'."""
    request: str
    text: str
    read_back: bool = False     # greedy decoding of the request gave the call again


@dataclass(frozen=True)
class Rejected:
    """A try that gave no pair: what was written, and why it was not kept."""
    text: str
    reason: str


@dataclass
class Found:
    """A line of G: the results of the tries for one sample."""
    id: str
    failed: str = ""
    pairs: list[Pair] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)      # all generated texts
    seconds: float = 0.0

    @classmethod
    def from_json(cls, pairs: list[dict], rejected: list[dict], **fields) -> Found:
        """The line as it was kept."""
        return cls(pairs=[Pair(**each) for each in pairs],
                   rejected=[Rejected(**each) for each in rejected], **fields)


@stage("G", Found, "writer", "tries", "k", "pair", "temperature", "top_p", "seed")
def synthesize(agent, samples: Sequence[Sample], config, h: dict) -> list[Found]:
    """For each sample up to K pairs (x', y') and the tries that failed, at most TRIES * K in all.
    h: the lines of H by id."""
    found = {sample.id: Found(sample.id) for sample in samples}
    for attempt in range(TRIES * config.k):
        todo = [x for x in samples if len(found[x.id].pairs) < config.k]
        if not todo:
            break
        for made in agent.task.tries[config.pair](agent.writer, todo, h, attempt, config):
            line = found[made.sample.id]
            line.texts += made.written
            copied = any([made.request == p.request or made.text == p.text for p in line.pairs])
            if copied and not made.reason:
                made.reason = "copy of an earlier pair"
            problem = getattr(made.written[0], "problem", "")       # of a server: see Written
            if made.reason and problem:
                made.reason = f"{problem}: {made.reason}"
            if made.reason:
                line.rejected.append(Rejected(made.written[0], made.reason))
            else:
                line.pairs.append(Pair(made.request, made.text, made.read_back))
    return list(found.values())


@dataclass
class Try:
    """A try at a pair for a sample, and why it is rejected; "" if it is kept."""
    sample: Sample
    written: list[str]                  # all generated texts
    request: str
    text: str                           # the text of the calls
    reason: str = ""
    read_back: bool = False


# ------------------------------------------------------- --pair call: first y', then its request x'

def try_call_first(writer: Writer, samples: Sequence[Sample], h: dict, attempt: int,
                   config) -> list[Try]:
    """A call of the likeliest tool, and the request that it answers."""
    prompts, directs = [], []
    for x in samples:
        directs.append(parse_calls(h[x.id].text).calls)
        prompts.append(call_form(x, h[x.id], directs[-1]))
    keys = [(config.seed, x.id, "pair", attempt) for x in samples]
    texts = writer(prompts, MAX_PAIR_TOKENS, config.temperature, config.top_p, keys)
    tries = []
    for x, direct, text in zip(samples, directs, texts):
        call, _, request = text.partition("\n")
        try:                            # one line: a server may say more below
            request = " ".join(json.loads(request.strip().partition("\n")[0]).split())
        except (ValueError, AttributeError, RecursionError):
            request = None
        new = parse_calls(call).calls
        reason = fault(new, direct, request, x, h[x.id].request)
        # ours: a pair's calls have tags only where the model's own answer has. Training is to
        # sharpen what the model calls, not how it writes: tags that it never writes cost the five
        # steps, which learn neither them nor the call.
        tries.append(Try(x, [text], request or "", call_text(new, like=h[x.id].text), reason))
    return read_back(writer, tries, h, config)


# By declared type, how a value begins, which characters close it, and how it ends; else a string.
# The space before a number is the model's to write: its tokens may begin with one.
VALUES = {"array": (" [", "]", "]"), "object": (" {", "}", "}"),
          **dict.fromkeys(["integer", "number", "boolean"], ("", ",}\n", ""))}


def call_form(sample: Sample, line, direct: Sequence[Call]) -> Prompt:
    """The prompt for a pair of the tool that H finds likeliest: its keys are given, its values and
    the request are blanks. line: the sample's line of H; direct: the calls of its answer."""
    # paper: the pair is written in one go (--pair joint).
    # ours: the call first. If the request comes first, a small model often writes it for another
    # tool, and the call that it then writes seldom fits the schema.
    name = max(line.candidates, key=line.candidates.get)
    tool = next(tool for tool in sample.tools if tool["name"] == name)
    required = required_arguments(tool)
    shown = (*direct, Call(name))[0]            # of whatever tool the direct answer calls first
    before, gaps = f'{{"name": {as_json(name)}, "arguments": {{', []
    for key, schema in tool["parameters"].items():
        # ours: an optional argument is given where the direct answer has it and x spells it: else
        # the pair would teach to leave it out. Where x does not, the pair teaches just that.
        spoken = key in shown.arguments and stands_in(shown.arguments[key], line.request)
        if key in required or spoken:
            begin, closing, end = VALUES.get(type_of(schema)[0], (' "', '"', '"'))
            gaps.append((f"{before}{as_json(key)}:{begin}", closing))
            before = f"{end}, "
    gaps.append((before.removesuffix(", ") + '}}\n"', '"'))             # of the request
    fixed = [text for text, _ in gaps] + ['"']
    blanks = [Blank(closing, tail) for (_, closing), tail in zip(gaps, fixed[1:])]
    start = PAIR_START.format(call=as_json(asdict(shown)), request=as_json(line.request))
    chat = [call_prompt(sample)[0], {"role": "user", "content": ASK_PAIR}]
    return Prompt(chat, start, Form(fixed[0], tuple(blanks)))


def fault(new: Sequence[Call], direct: Sequence[Call], request: str | None, sample: Sample,
          asked: str) -> str:
    """Why written calls and their request are rejected; empty if they are kept. direct: the calls
    of the direct answer; asked: the sample's request."""
    reasons = [check_call(call, sample.tools) for call in new] or ["no call could be read"]
    if any(reasons):
        return next(filter(None, reasons))
    if request is None:
        return "the request did not end"
    if len(new) > 1:
        return "more than one call"
    if call_keys(new, sample.tools).keys() <= call_keys(direct, sample.tools).keys():
        return "the direct answer again"
    return check_request(request, sample, asked)


def check_request(request: str, sample: Sample, asked: str) -> str:
    """Why a written request is rejected; empty if it is kept. asked: the sample's request."""
    plain = "".join(filter(str.isalnum, request.casefold()))
    if not plain:
        return "no request"
    if '{"' in request or "<tool_call>" in request:
        return "a call in place of a request"
    if plain in "".join(filter(str.isalnum, asked.casefold())):
        return "copy of the seed request"
    for tool in sample.tools:
        name = tool["name"]
        is_word = re.fullmatch("[A-Z]?[a-z]+", name)        # `translate` is an ordinary word
        if name in request and name not in asked and not is_word:
            return "the request names the tool"
    return ""


def stands_in(value: object, request: str) -> bool:
    """Whether a request spells a value. Items of lists and objects are checked one by one. Empty
    values, null and booleans never count as spelled."""
    if isinstance(value, (list, dict)):
        items = list(value.values() if isinstance(value, dict) else value)
        return bool(items) and all([stands_in(item, request) for item in items])
    text = re.escape(str(value).strip())
    whole = rf"(?<!\w)(?<!\d[.,:]){text}(?!\w|[.,:]\d)"      # 5 is not in 15, nor in 5.7
    named = text and value is not None and not isinstance(value, bool)
    return bool(named and re.search(whole, request, re.I))


def read_back(writer: Writer, tries: Sequence[Try], h: dict, config) -> Sequence[Try]:
    """The tries, now rejected where the request does not determine a value. A value that it does
    not spell may be implied (CN by "China"): so the model, given the request and the first tool's
    name alone, must write the same calls greedily."""
    unspoken, prompts, keys = [], [], []
    for made in [made for made in tries if not made.reason]:
        calls = parse_calls(made.text).calls
        values = [value for call in calls for value in call.arguments.values()]
        if not all([stands_in(value, made.request) for value in values]):
            name, start = as_json(calls[0].name), call_start(h[made.sample.id].text)
            messages = call_prompt(with_request(made.sample, made.request))
            prompts.append(Prompt(messages, "", Form(f'{start}{name[1:]}, "arguments":')))
            keys.append((config.seed, made.sample.id, "read back"))
            unspoken.append((made, calls))
    texts = writer(prompts, MAX_CALL_TOKENS, 0.0, 1.0, keys) if prompts else []
    for (made, calls), text in zip(unspoken, texts):
        read, tools = parse_calls(text).calls[:len(calls)], made.sample.tools
        made.written.append(text)
        made.read_back = call_keys(read, tools) == call_keys(calls, tools)
        if not made.read_back:
            made.reason = "a value cannot be read from the request"
    return tries


# ------------------------------------------------------------------ --pair joint: in one go, freely

def try_joint(writer: Writer, samples: Sequence[Sample], h: dict, attempt: int,
              config) -> list[Try]:
    """A request and the calls that answer it, in one text (paper)."""
    prompts = [Prompt([call_prompt(x)[0], {"role": "user", "content": ASK_JOINT}],
                      JOINT_START.format(request=h[x.id].request)) for x in samples]
    keys = [(config.seed, x.id, "pair", attempt) for x in samples]
    texts = writer(prompts, MAX_PAIR_TOKENS, config.temperature, config.top_p, keys)
    tries = []
    for x, text in zip(samples, texts):
        line, _, rest = without_thinking(text).strip().partition("\n")
        request, calls = line.strip().removesuffix('"').strip(), parse_calls(rest).calls
        faults = [check_request(request, x, h[x.id].request),
                  *[check_call(call, x.tools) for call in calls]]
        reason = next(filter(None, faults), "" if calls else "no call could be read")
        new = call_text(calls, like=h[x.id].text)               # without text after it
        tries.append(Try(x, [text], request, new, reason))
    return read_back(writer, tries, h, config)


# -------------------------------------------------------------------------------------- who writes

@dataclass(frozen=True)
class Prompt:
    """What a writer is shown. A server cannot fill in a form; it gets only the beginning."""
    messages: list[dict]
    start: str = ""             # how the assistant's turn begins; it is not returned
    form: Form = Form()         # what follows, and is returned; without blanks it is free


@dataclass(frozen=True)
class LocalWriter:
    """The model itself, or a teacher that is loaded beside it. All texts are one batch.

    A writer takes prompts, a limit in tokens, temperature, top_p and a key to draw by for each
    prompt; it returns a text for each, which begins with the start of the prompt's form."""
    model: Qwen2
    tokenizer: Tokenizer
    prefixes: PrefixCaches

    def __call__(self, prompts, limit, temperature, top_p, keys) -> list[str]:
        chats = []
        for prompt in prompts:
            begun = {"role": "assistant", "content": prompt.start + prompt.form.start}
            chats.append([*prompt.messages, begun])
        caches, last = self.prefixes.split(self.tokenizer, chats, "answer")
        forms = [prompt.form for prompt in prompts]
        written = generate(self.model, self.tokenizer, last, limit, caches, temperature, top_p,
                           keys, forms)
        return [prompt.form.start + row.text for prompt, row in zip(prompts, written)]


@dataclass(frozen=True)
class ServerWriter:
    """A teacher behind an OpenAI-compatible API. OPENAI_API_KEY goes to that host alone, over plain
    http to this machine only. ConnectionError if there is no reply. options: what is sent otherwise
    than usual, as "temperature=none,max_completion_tokens=320"; none leaves a field out."""
    url: str
    model: str
    wait: float = 1.0           # seconds before the second try; each further one doubles it
    timeout: float = 120.0
    options: str = ""

    def __post_init__(self):
        safe = r"(https?)://([\w.-]+|\[[0-9a-f:]+\])(:\d+)?(/[\w.~/-]*)?"
        parts = re.fullmatch(safe, self.url)
        if not parts:           # the URL is not shown: it may hold a password
            raise ValueError("--teacher: a URL looks like https://host/v1, with no user name, no "
                             "key and no query")
        local = parts[2] in ("localhost", "127.0.0.1", "[::1]")
        if parts[1] == "http" and not local and os.environ.get("OPENAI_API_KEY"):
            raise ValueError(f"--teacher {self.url}: OPENAI_API_KEY would travel unencrypted; use "
                             "https, or unset the key")
        self.changed({})

    def changed(self, body: dict) -> dict:
        """A request's body with the options; ValueError for one that is none."""
        body = {**body, "extra_body": {}}
        for option in filter(None, self.options.split(",")):
            name, _, value = option.partition("=")
            if not re.fullmatch(r"\w+=.+", option):
                raise ValueError(f"--teacher-option {option}: must be NAME=VALUE or NAME=none")
            body.pop(name, None)
            try:
                value = json.loads(value)               # a number, for instance; else a text
            except ValueError:
                pass
            if value != "none":
                body["extra_body"][name] = value
        return body

    def __call__(self, prompts, limit, temperature, top_p, keys) -> list[str]:
        from huggingface_hub import InferenceClient     # only here: it takes a second to import
        secret = os.environ.get("OPENAI_API_KEY", "").strip() or "none"     # never the hub's token
        base = self.url.rstrip("/")                     # the library adds /v1/... to a bare host
        if base.count("/") > 2 and not base.endswith("/chat/completions"):
            base += "/chat/completions"
        client = InferenceClient(base_url=base, api_key=secret, timeout=self.timeout)
        texts, ended = [], Event()
        with ThreadPool(8) as pool:
            for prompt, key in zip(prompts, keys):
                *before, last = prompt.messages
                start = prompt.start + prompt.form.start
                if start:       # the API cannot begin the assistant's turn, so the user asks for it
                    last = {**last, "content": f"{last['content']}\n\nThe answer begins like this. "
                                               f"Write what follows, and nothing else:\n{start}"}
                body = self.changed(dict(messages=[*before, last], model=self.model,
                                         max_tokens=limit, temperature=temperature, top_p=top_p))
                asked = client, start, prompt.form.start, body, key, ended
                texts.append(pool.apply_async(self.ask, asked))
            return [text.get() for text in texts]

    def ask(self, client, start: str, first: str, body: dict, key: tuple, ended: Event) -> str:
        """What a server writes for one prompt, without the start if it repeats that. A busy, broken
        or late server is asked again, after a failure of its own (HTTP 500) with another seed; a
        refusal becomes an empty text with a problem. ended: set when asking is of no use."""
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # HTTPError: no OSError
        seed = seeded(*key).initial_seed() % 2 ** 31    # if the server uses it
        for attempt in range(RETRIES + 1):
            time.sleep(self.wait * 2 ** (attempt - 1) if attempt else 0)
            if ended.is_set():                          # by another prompt of the batch
                return ""
            try:
                choice = client.chat_completion(**body, seed=seed).choices[0]
                written = Written(first + reply(choice.message, start, first))
                if choice.finish_reason == "length":
                    limit = body.get("max_tokens")      # None: an option left it out
                    written.problem = f"cut at {limit} tokens" if limit else "cut at the limit"
                return written
            except OfflineModeIsEnabled as error:
                ended.set()
                raise ConnectionError(f"--teacher {self.url}: HF_HUB_OFFLINE is set, and lets "
                                      "nothing pass; unset it") from error
            except (HTTPError, OSError, ValueError, TypeError, LookupError, AttributeError) as err:
                response = getattr(err, "response", None)
                code = getattr(response, "status_code", 0)
                problem = f"HTTP {code}" if code else type(err).__name__
            if code == 500:
                seed = seeded(*key, "again", attempt).initial_seed() % 2 ** 31
            if code in (400, 413, 422):
                refused = Written(first)
                refused.problem = f"refused by the server, {problem} {refusal(response)}".strip()
                return refused
            if 400 <= code < 500 and code not in (408, 409, 429):
                break
        ended.set()
        why = f"no chat completion after {RETRIES + 1} tries ({problem} {refusal(response)})"
        if 400 <= code < 500:
            why = f"{problem}; are the URL, --teacher-model and OPENAI_API_KEY right?"
        raise ConnectionError(f"--teacher {self.url}: {why.replace(' )', ')')}")


def reply(message: object, start: str, first: str) -> str:
    """What a server's message says after `start`: without thinking, a code fence or a remark around
    what was asked for. Some servers move tool calls out of the text: these are put back, before the
    text where a call was to come `first`."""
    text, calls = without_thinking(message.content or "").lstrip("\n"), []
    for moved in message.tool_calls or []:
        arguments = moved.function.arguments
        calls.append(Call(moved.function.name,
                          json.loads(arguments) if isinstance(arguments, str) else arguments))
    if calls and first:
        text = "\n".join([*[as_json(asdict(call)) for call in calls], text.strip()])
    elif calls:
        text = f"{text}\n{call_text(calls)}"
    fenced = re.search(r"```[\w-]*\n(.*?)(\n?```|\Z)", text, re.S)
    text = fenced[1] if fenced else text
    begun = start.rpartition("\n")[2]
    if begun and begun in text:                         # it repeats the line that it was to end
        return text[text.index(begun) + len(begun):]
    if first and '{"name"' in text:
        text = text[text.index('{"name"'):]
    skipped = next(i for i in range(len(start) + 1) if text.startswith(start[i:]))
    return text[len(start) - skipped:]


class Written(str):
    """A server's text, and its problem: it was cut, or the server refused to write it."""
    problem = ""


def refusal(response: object) -> str:
    """The reason in a server's refusal, cut to a line and without the key."""
    body = getattr(response, "text", "")
    try:
        error = json.loads(body)
        error = error.get("error", error) if isinstance(error, dict) else error
        body = error.get("message", body) if isinstance(error, dict) else error
    except (ValueError, TypeError, RecursionError):
        pass
    secret = os.environ.get("OPENAI_API_KEY", "").strip()
    body = str(body).replace(secret, "...") if secret else str(body)     # before the line is cut
    return " ".join(body.replace(":", ",").split())[:100]


Writer = LocalWriter | ServerWriter     # by its name here their code is in the key of G
