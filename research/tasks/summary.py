"""Summarise a dialogue in a sentence or two: python -m research.tasks.summary --data FILE

H chooses among --answers sampled summaries: l_n is the mean log-probability of a summary's tokens,
the end of the turn included. A pair is a new dialogue of as many turns (six at most) between the
same speakers, and its summary. An answer is measured by ROUGE (rouge.py), of the best reference.

No summary is right or wrong by itself, so `exact` compares a sample's two: right is the one whose
ROUGE-L is higher by 0.02 or more; where they are closer neither is. "fixed" is then how many became
better by so much, "harmed" worse; "base" is the share of the harmed, "after" of the fixed. FILE:
{"document", "summaries"} a line, or DialogSum's {"dialogue", "summary1", ...} (Chen et al. 2021).
"""
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import train
from augment import Try
from data import Sample
from data.runs import Record, Verdict
from model import Blank, Form
from research.stream import Samples
from research.tasks import (SampledConfig, SampledTask, ask_for, at_start, is_copy, likelihoods,
                            no_actions, program, text_in, texts_in, written)
from research.tasks.rouge import rouge

SYSTEM = "You summarise dialogues."
ASK = "\n\nAnswer with nothing but a summary of this dialogue in one or two sentences."
ASK_PAIR = """Write two dialogues, and under each its summary in one or two sentences. The second \
dialogue is about something else."""
LIMIT = 320             # of a pair, in tokens
TURNS = 6               # of a new dialogue, at most
BETTER = 0.02           # by so much ROUGE-L, a share
RIGHT = ("exact: of a sample's two summaries the one whose ROUGE-L is higher by 2 points or more; "
         "so base is the share of the harmed, after of the fixed")


@dataclass(frozen=True)
class SummaryConfig(SampledConfig):
    max_new_tokens: int = train.option(64, train.HOW, "longest answer, in tokens")


def read(item: dict) -> list[Sample]:
    """A sample of an item, in either form; ValueError says what is wrong with it."""
    document, id = text_in(item, "document", "dialogue"), item.get("id", item.get("fname", ""))
    numbered = [key for key in item if re.fullmatch("summary[0-9]*", key)]
    golds = tuple(text_in(item, key) for key in numbered) or texts_in(item, "summaries")
    return [Sample(str(id), ({"role": "user", "content": document},), (), golds)]


def prompt(x: Sample) -> list[dict]:
    """The messages that ask for a summary."""
    return ask_for(SYSTEM, x, ASK)


def weigh(agent, cache, last, direct: str, drawn: Sequence[str]) -> dict[str, float]:
    """The candidate actions: the sampled summaries, by their mean log-probability a token."""
    sums = likelihoods(agent, cache, last, drawn)
    return {text: l / (len(agent.tokenizer.encode(text)) + 1) for text, l in sums.items()}


def try_pair(writer, samples: Samples, h: dict, attempt: int, config) -> list[Try]:
    """A new dialogue and its summary: the second of two, x and its direct answer are the first. Its
    speakers' names are given, in x's order."""
    starts, forms, tries = [], [], []
    for x in samples:
        document, direct = x.messages[-1]["content"], " ".join(h[x.id].text.split())
        starts.append(f"1.\n{document}\nSummary: {direct}\n\n2.\n")
        first, *names = re.findall(r"^([^\n:]{1,30}:)", document, re.M)[:TURNS] or [""]
        tails = [*[f"\n{name}" for name in names], "\nSummary:"]
        forms.append(Form(first, (*[Blank("\n", tail) for tail in tails], Blank("\n", "\n"))))
    texts = written(writer, samples, ASK_PAIR, starts, forms, LIMIT, attempt, config, prompt)
    for x, text in zip(samples, texts):
        dialogue, _, summary = map(str.strip, text.partition("\nSummary:"))
        tries.append(Try(x, [text], dialogue, summary, fault(dialogue, summary, x)))
    return tries


def fault(dialogue: str, summary: str, x: Sample) -> str:
    """Why a written dialogue and its summary are rejected; "" if they are kept."""
    turns = [line.partition(":")[2] or line for line in dialogue.split("\n")]
    own = x.messages[-1]["content"]
    if not all(map(str.strip, turns)):
        return "an empty turn"
    if any(is_copy(turn, own) for turn in turns if len(turn.split()) > 4):
        return "a turn of the seed dialogue"
    if is_copy(summary, dialogue):
        return "no summary, or a turn in its place"
    return "" if len(summary) < len(dialogue) else "a summary longer than its dialogue"


def verdict(text: str, x: Sample) -> Verdict:
    """The ROUGE of a summary, each of the best reference. `judged` says which is right."""
    each = [rouge(text, gold) for gold in x.answers]
    best = {name: max(scores[name] for scores in each) for name in each[0]}
    return Verdict(text, False, "not better", best)


def judged(record: Record) -> Record:
    """The record where of two answers the better one is right, if it is better by BETTER."""
    base, answer = record.base, record.answer
    gain = round(answer.measures["rougeL"] - base.measures["rougeL"], 9)
    if gain >= BETTER:
        answer = replace(answer, exact=True, reason="")
    if gain <= -BETTER:
        base = replace(base, exact=True, reason="")
    return replace(record, base=base, answer=answer)


TASK = SampledTask(prompt, no_actions, at_start, "", {"call": try_pair}, verdict, "\n".join, weigh)


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    return program(argv, "summary", TASK, read, SummaryConfig, __doc__, judged, RIGHT)


if __name__ == "__main__":
    sys.exit(main())
