"""Solve a word problem of arithmetic in a few steps.

    python -m research.tasks.arithmetic                     # bundled samples and model
    python -m research.tasks.arithmetic --data FILE --model DIR --adapt suffix

H chooses among the final numbers of --answers sampled answers: p_n is a number's share of them
(self-consistency, Wang et al. 2023), l_n its logarithm. A pair is a new problem with a worked
answer, kept where more than half of --answers sampled answers to the new problem end in one number.
An answer is right if its last number is the gold's, as GSM8K (Cobbe et al. 2021) is usually scored:
"$18.00", "18." and "#### 18" are 18, of "1/2" it is 2. FILE: {"question", "answer"} a line.
"""
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import train
from augment import Prompt, Try
from data import Sample, with_request
from data.runs import Verdict
from model import Blank, Form
from research.stream import Samples
from research.tasks import (SampledConfig, SampledTask, ask_for, at_start, is_copy, no_actions,
                            program, text_in, written)

SYSTEM = "You solve word problems."
ASK = '\n\nThink in a few short steps. End with a line "Answer:" and the number.'
ASK_PAIR = """Write two word problems that are solved by arithmetic. Both are of the same kind, \
but the second is about other people, things and numbers."""
FORM = Form("", (Blank("\n", "\n"),))
LIMIT = 128             # of a problem, in tokens
WHOLE = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+"
NUMBER = re.compile(rf"(?:(?<![\w)])-)?\$?(?:(?:{WHOLE})(?:\.[0-9]+)?|\.[0-9]+)")
NONE = "no number"


@dataclass(frozen=True)
class ArithmeticConfig(SampledConfig):
    max_new_tokens: int = train.option(160, train.HOW, "longest answer, in tokens")


def read(item: dict) -> list[Sample]:
    """A sample of an item, in either form; ValueError says what is wrong with it."""
    number = item.get("answer")
    number = str(number) if isinstance(number, (int, float)) else text_in(item, "answer")
    if final_number(number) == NONE:
        raise ValueError(f"the answer {number!r:.40} has no number")
    messages = ({"role": "user", "content": text_in(item, "question")},)
    return [Sample(str(item.get("id", "")), messages, (), (final_number(number),))]


def final_number(text: str) -> str:
    """The last number of a text, in one spelling: `final_number("so $1,234.50.") -> "1234.5"`."""
    found = NUMBER.findall(text.replace("\u2212", "-"))
    if not found:
        return NONE
    number = re.sub("[$,]", "", found[-1])
    sign, whole, part = re.fullmatch(r"(-?)0*([0-9]*)(?:\.([0-9]*?)0*)?", number).groups()
    plain = (whole or "0") + (f".{part}" if part else "")
    return plain if plain == "0" else sign + plain


def prompt(x: Sample) -> list[dict]:
    """The messages that ask for a worked answer."""
    return ask_for(SYSTEM, x, ASK)


def weigh(agent, cache, last, direct: str, drawn: Sequence[str]) -> dict[str, float]:
    """The candidate actions: the sampled answers' final numbers, by the log of their share."""
    counts = Counter(map(final_number, drawn))
    return {number: math.log(count / len(drawn)) for number, count in counts.items()}


def try_problem(writer, samples: Samples, h: dict, attempt: int, config) -> list[Try]:
    """A new problem, the second of two, of which x is the first; and of --answers sampled answers
    to it the first that ends as most of them do."""
    starts, tries = [f"1. {' '.join(h[x.id].request.split())}\n2." for x in samples], []
    texts = written(writer, samples, ASK_PAIR, starts, [FORM] * len(samples), LIMIT, attempt,
                    config, prompt)
    for x, text in zip(samples, texts):
        reason = "no new problem" if is_copy(text, h[x.id].request) else ""
        tries.append(Try(x, [text], text.strip(), "", reason))
    sound, prompts, keys = [made for made in tries if not made.reason], [], []
    for made in sound:
        prompts += [Prompt(prompt(with_request(made.sample, made.request)))] * config.answers
        for i in range(config.answers):
            keys.append((config.seed, made.sample.id, "solution", attempt, i))
    solutions = iter(writer(prompts, config.max_new_tokens, config.temperature, config.top_p, keys)
                     if sound else [])
    for made in sound:
        own = [text.strip() for text in islice(solutions, config.answers)]
        made.written += own
        (number, count), = Counter(map(final_number, own)).most_common(1)
        made.text = next(text for text in own if final_number(text) == number)
        if number == NONE or count <= config.answers / 2:
            made.reason = "most answers to it end in different numbers"
    return tries


def verdict(text: str, x: Sample) -> Verdict:
    """Is the last number of the answer the gold's?"""
    said = final_number(text)
    reason = NONE if said == NONE else "" if said == x.answers[0] else "wrong number"
    return Verdict(text, not reason, reason, {"number": float(said != NONE)})


TASK = SampledTask(prompt, no_actions, at_start, "", {"call": try_problem}, verdict, "".join, weigh)


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    return program(argv, "arithmetic", TASK, read, ArithmeticConfig, __doc__)


if __name__ == "__main__":
    sys.exit(main())
