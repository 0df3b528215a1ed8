"""Choose the right one of some options: a question, options A, B, ..., one letter to answer with.

    python -m research.tasks.choice                         # bundled samples and model
    python -m research.tasks.choice --data FILE --model DIR --adapt suffix

H chooses among the options' letters. A pair is a new question with as many options, and a letter.
An answer is right if the letter that it begins with, or that it says after "answer", is the gold's:
the accuracy of CommonsenseQA (Talmor et al. 2019). `letter`: it says one at all. FILE: {"question",
"choices": {"A": ...}, "answer": "A"} a line, or CommonsenseQA's own lines.
"""
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import train
from augment import Try
from data import Sample, Task
from data.runs import Verdict
from model import Blank, Form
from research.stream import Samples
from research.tasks import TaskConfig, ask_for, at_start, is_copy, program, text_in, written

SYSTEM = "You answer multiple-choice questions."
ASK = "\n\nAnswer with nothing but the letter of the right option."
ASK_PAIR = """Write two multiple-choice questions, each with its options and the letter of the \
right one. Both are of the same kind, but the second is about something else."""
LIMIT = 160             # of a pair, in tokens
OPTION = re.compile(r"^([A-Z])\) *(.*)$", re.M)


@dataclass(frozen=True)
class ChoiceConfig(TaskConfig):
    max_new_tokens: int = train.option(8, train.HOW, "longest answer, in tokens")


def read(item: dict) -> list[Sample]:
    """A sample of an item, in either form; ValueError says what is wrong with it."""
    question, choices = item.get("question"), item.get("choices")
    if isinstance(question, dict):                      # CommonsenseQA's own
        choices = question.get("choices")
    if isinstance(choices, list) and all(isinstance(each, dict) for each in choices):
        choices = {text_in(each, "label"): text_in(each, "text") for each in choices}
    stem = text_in(question if isinstance(question, dict) else item, "stem", "question")
    if not isinstance(choices, dict) or len(choices) < 2:
        raise ValueError("'choices' are not two options or more by their letter")
    letter = text_in(item, "answer", "answerKey")
    if letter not in choices or not all(re.fullmatch("[A-Z]", each) for each in choices):
        raise ValueError(f"the answer {letter!r:.40} is not among the letters of 'choices', A to Z")
    lines = [f"{each}) {' '.join(text_in(choices, each).split())}" for each in choices]
    request = "\n".join([" ".join(stem.split()), *lines])
    return [Sample(str(item.get("id", "")), ({"role": "user", "content": request},), (), (letter,))]


def prompt(x: Sample) -> list[dict]:
    """The messages that ask for a letter."""
    return ask_for(SYSTEM, x, ASK)


def letters(x: Sample) -> list[str]:
    """The candidate actions: the letters of the options."""
    return [letter for letter, _ in OPTION.findall(x.messages[-1]["content"])]


def try_question(writer, samples: Samples, h: dict, attempt: int, config) -> list[Try]:
    """A new question with its options, and its letter: the second of two, of which x with the
    letter that H finds likeliest is the first."""
    starts, forms, tries = [], [], []
    for x in samples:
        likeliest, marks = max(h[x.id].candidates, key=h[x.id].candidates.get), letters(x)
        starts.append(f"1. {x.messages[-1]['content']}\nAnswer: {likeliest}\n\n2.")
        tails = [*[f"\n{mark})" for mark in marks], "\nAnswer:"]
        forms.append(Form("", (*[Blank("\n", tail) for tail in tails], Blank("\n", "\n"))))
    texts = written(writer, samples, ASK_PAIR, starts, forms, LIMIT, attempt, config, prompt)
    for x, text in zip(samples, texts):
        question, _, letter = text.strip().partition("\nAnswer:")
        options = [f"{mark}) {option.strip()}" for mark, option in OPTION.findall(question)]
        request = "\n".join([question.partition("\n")[0].strip(), *options])
        letter = letter.strip()[:1]
        tries.append(Try(x, [text], request, letter, fault(request, letter, x)))
    return tries


def fault(request: str, letter: str, x: Sample) -> str:
    """Why a written question and its letter are rejected; "" if they are kept."""
    options = OPTION.findall(request)
    if [mark for mark, _ in options] != letters(x):
        return "not as many options"
    if len({text.strip().casefold() for _, text in options} - {""}) < len(options):
        return "an option twice, or an empty one"
    if is_copy(request.partition("\n")[0], x.messages[-1]["content"]):
        return "no new question"
    return "" if letter in letters(x) else "the answer is no option"


def letter_of(text: str, x: Sample) -> str:
    """The letter that an answer says: of its beginning, or after "answer is"; "" if it has none."""
    found = re.match(r"\W*([A-Z])\b", text) or re.search(r"nswer\W+(?:is\W+)?([A-Z])\b", text)
    return found[1] if found and found[1] in letters(x) else ""


def verdict(text: str, x: Sample) -> Verdict:
    """Is the answer the gold letter?"""
    said = letter_of(text, x)
    reason = "" if said == x.answers[0] else "wrong letter" if said else "no letter"
    return Verdict(text, not reason, reason, {"letter": float(bool(said))})


TASK = Task(prompt, letters, at_start, "", {"call": try_question}, verdict, "".join)


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    return program(argv, "choice", TASK, read, ChoiceConfig, __doc__)


if __name__ == "__main__":
    sys.exit(main())
