"""Answer a question in the words of a text: python -m research.tasks.reading --data FILE

H chooses among --answers sampled answers and the greedy one, as whole texts with the end of the
turn. A pair is a new question about the same text, with an answer that stands in it. An answer is
right by the exact match of SQuAD v1.1 (Rajpurkar et al. 2016, evaluate-v1.1.py): in lower case,
without punctuation and articles it is one of the gold answers; `f1` is its token F1, of the best
gold answer. FILE: {"context", "question", "answers": [...]} a line, or SQuAD's own file.
"""
import re
import string
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import train
from augment import Try, stands_in
from data import Sample
from data.runs import Verdict
from model import Blank, Form
from research.stream import Samples
from research.tasks import (SampledConfig, SampledTask, at_start, is_copy, items_in, likelihoods,
                            no_actions, program, text_in, texts_in, written)

SYSTEM = "You answer questions about this text:\n<text>\n{text}\n</text>"
ASK = "\n\nAnswer with nothing but the few words of the text that answer the question."
ASK_PAIR = """Write two questions about the text, and under each its answer: a few words that \
stand in the text. The second question asks for something else."""
FORM = Form("", (Blank("\n", "\nAnswer:"), Blank("\n", "\n")))
LIMIT = 96              # of a pair, in tokens


@dataclass(frozen=True)
class ReadingConfig(SampledConfig):
    max_new_tokens: int = train.option(24, train.HOW, "longest answer, in tokens")


def read(item: dict) -> list[Sample]:
    """The samples of an item, in either form; ValueError says what is wrong with it."""
    if "paragraphs" in item:
        found = []
        for paragraph in items_in(item, "paragraphs"):
            for asked in items_in(paragraph, "qas"):
                golds = [text_in(each, "text") for each in items_in(asked, "answers")]
                found += read({**asked, "context": text_in(paragraph, "context"), "answers": golds})
        return found
    # the text is a sample's system turn: so a pair's question is about the same text
    messages = ({"role": "system", "content": text_in(item, "context")},
                {"role": "user", "content": text_in(item, "question")})
    return [Sample(str(item.get("id", "")), messages, (), texts_in(item, "answers"))]


def prompt(x: Sample) -> list[dict]:
    """The messages that ask for an answer; who asks about one text shares its cache."""
    text, question = [message["content"] for message in x.messages]
    return [{"role": "system", "content": SYSTEM.format(text=text)},
            {"role": "user", "content": question + ASK}]


def weigh(agent, cache, last, direct: str, drawn: Sequence[str]) -> dict[str, float]:
    """The candidate actions: the greedy answer and the sampled ones."""
    return likelihoods(agent, cache, last, [direct, *drawn])


def try_pair(writer, samples: Samples, h: dict, attempt: int, config) -> list[Try]:
    """A new question about the text and its answer: the second of two, x and its direct answer are
    the first."""
    starts, tries = [], []
    for x in samples:
        direct = " ".join(h[x.id].text.split())
        starts.append(f"1. Question: {x.messages[1]['content']}\nAnswer: {direct}\n2. Question:")
    texts = written(writer, samples, ASK_PAIR, starts, [FORM] * len(samples), LIMIT, attempt,
                    config, prompt)
    for x, text in zip(samples, texts):
        question, _, answer = map(str.strip, text.rstrip(" .\n").partition("\nAnswer:"))
        tries.append(Try(x, [text], question, answer, fault(question, answer, x)))
    return tries


def fault(question: str, answer: str, x: Sample) -> str:
    """Why a written question and its answer are rejected; "" if they are kept."""
    text, own = [message["content"] for message in x.messages]
    if is_copy(question, own):
        return "no new question"
    if not stands_in(answer, text):
        return "the answer does not stand in the text"
    return "the question says its answer" if stands_in(answer, question) else ""


def normalised(text: str) -> str:
    """SQuAD's: lower case, no ASCII punctuation, no articles, single spaces."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def f1(text: str, gold: str) -> float:
    """The F1 of the tokens that an answer and a gold one share."""
    said, wanted = normalised(text).split(), normalised(gold).split()
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def verdict(text: str, x: Sample) -> Verdict:
    """Exact match, and the F1 of the best gold answer."""
    exact = normalised(text) in map(normalised, x.answers)
    best = max(f1(text, gold) for gold in x.answers)
    return Verdict(text, exact, "" if exact else "in part" if best else "wrong", {"f1": best})


TASK = SampledTask(prompt, no_actions, at_start, "", {"call": try_pair}, verdict, "; ".join, weigh)


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    return program(argv, "reading", TASK, read, ReadingConfig, __doc__)


if __name__ == "__main__":
    sys.exit(main())
