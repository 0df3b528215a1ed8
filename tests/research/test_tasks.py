"""Other tasks than calling tools: how each is read, asked and scored, and Algorithm 1 over them.

The bundled model knows nothing but tools, so it writes few pairs: here somebody else writes them.
"""
import json
import math
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train
from data.chat import Tokenizer
from data.runs import Kept, Record, Verdict, read_run
from research import tasks
from research.tasks import (arithmetic, assess_sampled, choice, improve, other_samples,
                            read_samples, reading, rouge, summary)
from train import Outcome

TASKS = {"choice": choice, "reading": reading, "arithmetic": arithmetic, "summary": summary}
SAMPLED = ("reading", "arithmetic", "summary")
BUNDLED = Path(choice.__file__).parent / "samples"
CONFIGS = {"choice": choice.ChoiceConfig, "reading": reading.ReadingConfig,
           "arithmetic": arithmetic.ArithmeticConfig, "summary": summary.SummaryConfig}
# what somebody writes for a pair of the first samples of each task
WRITTEN = {"choice": " What is cold?\nA) a fire\nB) snow\nC) the sun\nD) a stove\nAnswer: B\n",
           "reading": " What comes first?\nAnswer: {first}.\n",
           "arithmetic": " Max has 2 nuts and finds 3. How many has he?\n",
           "summary": "Ali: Are you hungry?\nBea: Very much.\nAli: I cook soup.\nBea: Good."
                      "\nSummary: Ali cooks soup for Bea.\n"}


SO = Verdict("", False, "not better", {})
RECORD = Record("x", "", 0.5, True, "adapted", {}, SO, SO, [], [], [], [], {}, "", [], [], [], 1)


def bundled(name: str, count: int = 3) -> list:
    """The first bundled samples of a task."""
    return read_samples(name, BUNDLED / f"{name}.json", TASKS[name].read)[:count]


def writer(prompts, limit, temperature, top_p, keys) -> list[str]:
    """Writes the pair of whichever task asks; of a text its first word, for a problem 5."""
    texts, asked = [], {task.ASK_PAIR: WRITTEN[name] for name, task in TASKS.items()}
    for prompt in prompts:
        system, user = [message["content"] for message in prompt.messages]
        first = system.partition("<text>\n")[2].partition(" ")[0]
        texts.append(asked.get(user, "2 + 3 = 5\nAnswer: 5").format(first=first))
    return texts


def set_up(name: str, folder: Path, samples: list, **options) -> tuple:
    """An agent for a task with the bundled model, for whom somebody else writes, and its config."""
    options = {"max_new_tokens": 10, "epochs": 2, "tau": 1.0, "answers": 3, **options}
    if name == "choice":
        del options["answers"]
    config = train.fill_in(CONFIGS[name](model="tiny", device="cpu", data="bundled", pack=False,
                                         out=str(folder / "run"), **options))
    agent, samples = train.set_up(replace(config, bench=name), TASKS[name].TASK, samples)
    agent.writer = writer
    return agent, samples, replace(config, bench=name)


def outcomes(name: str, folder: Path, samples: list, **options) -> list[Outcome]:
    agent, samples, config = set_up(name, folder, samples, **options)
    return improve(samples, config, Kept(agent, config), other_samples(samples, config))


# ---------------------------------------------------------------------------------- from end to end

@pytest.mark.parametrize("name", TASKS)
def test_a_task_runs_on_its_bundled_samples_to_a_table_and_goes_on(name, tmp_path, capsys):
    def go(limit: int) -> list:
        flags = ["--limit", str(limit), "--out", str(tmp_path / f"run{limit}"), "--epochs", "1",
                 "--max-new-tokens", "6", "--model", "tiny", "--device", "cpu"]
        assert TASKS[name].main(flags) == 0
        return read_run(tmp_path / f"run{limit}").records
    one, = go(1)
    assert "kept: 0 of 1 samples" in capsys.readouterr().out
    two = go(2)
    out = capsys.readouterr().out
    assert "kept: 1 of 2 samples" in out and replace(two[0], seconds=one.seconds) == one
    assert "bundled samples, made for this project; they are not the benchmark" in out
    assert "the paper" not in out                       # it has no figures for such a task
    for record in two:
        assert record.candidates and record.gold
        for measure in record.base.measures:
            assert f"\n{measure}: base " in out
    assert len({str(x.messages) for x in bundled(name, 99)}) == len(bundled(name, 99)) == 30


@pytest.mark.parametrize("name", TASKS)
def test_algorithm_1_learns_a_pair_of_the_task(name, tmp_path):
    """H, a pair that somebody else writes, T, and an answer."""
    for outcome in outcomes(name, tmp_path, bundled(name), control="all"):
        pair, = outcome.g.pairs
        assert pair.request in WRITTEN[name]
        assert pair.text in WRITTEN[name] or pair.text in ("The", "2 + 3 = 5\nAnswer: 5")
        assert outcome.t.losses[-1] < outcome.t.losses[0]


def test_a_control_changes_what_is_compared_and_nothing_else(tmp_path):
    """all: a certain sample is adapted to as well; other: an uncertain one to another's pair; icl:
    the pair is shown, and nothing is trained."""
    samples = bundled("choice")
    plain = outcomes("choice", tmp_path, samples)
    tau = max(outcome.h.margin for outcome in plain)            # at it one is certain
    for control, trained in (("", 2), ("all", 3), ("other", 2), ("icl", 0)):
        changed = outcomes("choice", tmp_path, samples, control=control, tau=tau)
        assert [outcome.h for outcome in changed] == [outcome.h for outcome in plain]
        assert [bool(o.t and o.t.losses) for o in changed].count(True) == trained, control
        assert [bool(o.t) for o in changed].count(True) == (3 if control == "all" else 2)
        if control == "all":
            assert [outcome.t for outcome in changed] == [outcome.t for outcome in plain]


def test_the_pair_of_another_sample_is_learnt_with_that_samples_text(tmp_path, monkeypatch):
    samples, seen = bundled("reading", 30)[:20:6], {}

    def learn(agent, samples, lessons, config):
        seen.update({x.id: lesson for x, lesson in zip(samples, lessons)})
        return [train.Adapted(x.id, text="learnt") for x in samples]
    monkeypatch.setattr(tasks, "learn", learn)
    agent, samples, config = set_up("reading", tmp_path, samples, control="other")
    others = other_samples(samples, config)
    found = improve(samples, config, Kept(agent, config), others)
    assert seen and seen.keys() == {outcome.h.id for outcome in found if outcome.t}
    for x in [x for x in samples if x.id in seen]:
        (lesson, answer), = seen[x.id]
        text = others[x.id].messages[0]["content"]
        assert lesson.messages[0]["content"] == text != x.messages[0]["content"]
        assert answer == text.partition(" ")[0]


def test_the_examples_of_icl_stand_before_the_question(tmp_path, monkeypatch):
    shown = []

    def answer_with(agent, samples, params, config, chats):
        shown.extend(chats)
        return [train.Adapted(x.id, text="B") for x in samples]
    monkeypatch.setattr(tasks, "answer_with", answer_with)
    outcomes("choice", tmp_path, bundled("choice", 1), control="icl")
    (system, question, letter, own), = shown
    assert question["content"].startswith("What is cold?\nA) a fire")
    assert question["content"].endswith(choice.ASK)
    assert letter == {"role": "assistant", "content": "B"}
    assert [system, own] == choice.prompt(bundled("choice", 1)[0])


# ------------------------------------------------------------------------- what must not get in

@pytest.mark.parametrize("name", TASKS)
def test_labels_never_reach_a_text_that_is_read(name, tmp_path, monkeypatch):
    """A canary in the gold answers of all samples is in no text that is put into tokens, and in no
    line that is kept; the verdict sees it."""
    read, encode = [], Tokenizer.encode

    def listen(tokenizer, text):
        read.append(text)
        return encode(tokenizer, text)
    monkeypatch.setattr(Tokenizer, "encode", listen)
    samples = [replace(x, answers=("canary 77",)) for x in bundled(name, 2)]
    for control in ("other", "all"):
        folder, options = tmp_path / control, {"control": control, "epochs": 1}
        agent, samples, config = set_up(name, folder, samples, **options)
        run = partial(improve, others=other_samples(samples, config))
        assert train.run(agent, samples, config, run) == 0
    assert any(x.messages[-1]["content"].split("\n")[0] in text for x in samples for text in read)
    assert not any("canary" in text for text in read)
    lines = [path.read_text() for path in (tmp_path / "all" / "stages").glob("*.jsonl")]
    assert len(lines) == 3 and not any("canary" in text for text in lines)          # H, G, T
    records = read_run(tmp_path / "all" / "run").records
    assert all(r.losses and "canary" in r.gold for r in records)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_draw_depends_on_the_seed_and_the_sample_alone(name, tmp_path):
    """Not on the batch, the order, or the other samples."""
    agent, samples, config = set_up(name, tmp_path, bundled(name))
    one_by_one = [assess_sampled(agent, [x], config)[0] for x in samples]
    together = assess_sampled(agent, samples[::-1], config)[::-1]
    for a, b in zip(one_by_one, together):
        assert (a.text, a.drawn, a.margin) == (b.text, b.drawn, pytest.approx(b.margin, abs=1e-4))
        assert len(a.drawn) == 3 and a.candidates == pytest.approx(b.candidates, abs=1e-3)
    seed, = assess_sampled(agent, samples[:1], replace(config, seed=1))
    id, = assess_sampled(agent, [replace(samples[0], id="other")], config)
    assert seed.text == id.text == one_by_one[0].text
    assert one_by_one[0].drawn not in (seed.drawn, id.drawn)


def test_other_samples_are_drawn_by_seed_and_id_and_have_no_labels():
    samples = bundled("choice", 30)
    draws = [other_samples(samples, SimpleNamespace(seed=seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and draws[0].key == draws[1].key != draws[2].key
    for x in samples:
        assert draws[0][x.id].id != x.id and draws[0][x.id].answers == ()
    assert other_samples(samples[:1], SimpleNamespace(seed=0))[samples[0].id].id == samples[0].id


# ------------------------------------------------------------------------------ H: what is chosen

def test_an_answers_likelihood_is_that_of_its_tokens_and_the_end(tmp_path):
    """l of the greedy answer, found in one pass with the others, is the sum that decoding it gave;
    a summary's is the mean over as many tokens."""
    agent, samples, config = set_up("reading", tmp_path, bundled("reading"), max_new_tokens=40)
    compared = 0
    for x, line in zip(samples, assess_sampled(agent, samples, config)):
        texts = {line.text.strip(), *line.drawn} - {""}
        assert line.candidates.keys() == texts
        if len(texts) > 1 and agent.tokenizer.encode(line.text) == line.ids:
            assert line.candidates[line.text] == pytest.approx(sum(line.log_p), abs=1e-3)
            assert len(line.log_p) == len(line.ids) + 1
            caches, last = agent.prefixes.split(agent.tokenizer, [reading.prompt(x)], "answer")
            means = summary.weigh(agent, caches[0], last[0], "", [line.text, "other"])
            assert means[line.text] == pytest.approx(np.mean(line.log_p), abs=1e-4)
            compared += 1
    assert compared


def test_a_numbers_score_is_the_log_of_its_share():
    found = arithmetic.weigh(None, None, None, "7", ["so 18", "It is $18.00.", "I don't know", "4"])
    assert {n: math.exp(l) for n, l in found.items()} == pytest.approx(
        {"18": 0.5, "no number": 0.25, "4": 0.25})


def test_one_answer_alone_is_certain():
    assert tasks.likelihoods(None, None, None, ["same", "same", ""]) == {"same": 0.0}
    assert tasks.likelihoods(None, None, None, ["", ""]) == {"": 0.0}


# ------------------------------------------------------------------------- G: which pairs are kept

def tried(name: str, *texts: str):
    """The try that these texts, one after the other, lead to for the task's first bundled sample;
    the likeliest option is B."""
    x, given = bundled(name, 1)[0], iter(texts)
    line = SimpleNamespace(request=x.messages[-1]["content"], text="so",
                           candidates={"A": -2.0, "B": -1.0})
    config = SimpleNamespace(seed=0, temperature=0.7, top_p=0.95, answers=3, max_new_tokens=9)
    made, = TASKS[name].TASK.tries["call"](lambda prompts, *_: [next(given) for _ in prompts], [x],
                                           {x.id: line}, 0, config)
    return made


DIFFER = "most answers to it end in different numbers"
OPTIONS = "\nA) p\nB) q\nC) r\nD) s\nAnswer:"


@pytest.mark.parametrize("name, texts, request_, text", [
    ("choice", [f" Which one? {OPTIONS} C\n"], "Which one?\nA) p\nB) q\nC) r\nD) s", "C"),
    ("reading", [" What is it?\nAnswer: Grey granite.\n"], "What is it?", "Grey granite"),
    ("arithmetic", [" What is 2+3?\n", "5", "So 6.0", "6"], "What is 2+3?", "So 6.0"),
    ("summary", ["Ali: Hi.\nBea: Oh, hi.\nSummary: They meet.\n"], "Ali: Hi.\nBea: Oh, hi.",
     "They meet.")])
def test_a_good_pair_is_kept(name, texts, request_, text):
    made = tried(name, *texts)
    assert (made.request, made.text, made.reason) == (request_, text, "")
    assert made.written == texts


@pytest.mark.parametrize("name, texts, reason", [
    ("choice", [f" Which one?{OPTIONS} E\n"], "the answer is no option"),
    ("choice", [f" Which one?{OPTIONS}"], "the answer is no option"),
    ("choice", [" Which one?\nA) p\nB) q\nAnswer: A\n"], "not as many options"),
    ("choice", [f" Which one?{OPTIONS} A\n".replace("q", "P ")],
     "an option twice, or an empty one"),
    ("choice", [f" which tool would you use to turn a screw{OPTIONS} A\n"], "no new question"),
    ("choice", [f"{OPTIONS} A\n"], "not as many options"),
    ("reading", [" When was it built?\nAnswer: 1928\n"], ""),
    ("reading", [" When was it built?\nAnswer: 1929\n"], "the answer does not stand in the text"),
    ("reading", [" When was it built?\nAnswer:"], "the answer does not stand in the text"),
    ("reading", [" When was it, in 1928?\nAnswer: 1928\n"], "the question says its answer"),
    ("reading", [" when was the lighthouse of norvik built\nAnswer: 1928"], "no new question"),
    ("arithmetic", [" What is 2+3?\n", "5", "6", "7"], DIFFER),
    ("arithmetic", [" What is 2+3?\n", "a", "b", "c"], DIFFER),
    ("arithmetic", [" Mia picks 12 pears\n"], "no new problem"),
    ("summary", ["Ali: Hi.\nBea:\nSummary: They meet."], "an empty turn"),
    ("summary", ["Ali: Did you water the plants while I was away?\nBea: No.\nSummary: Plants."],
     "a turn of the seed dialogue"),
    ("summary", ["Ali: Hi.\nBea: Oh, hi.\nSummary: Oh, hi!"],
     "no summary, or a turn in its place"),
    ("summary", ["Ali: Hi.\nBea: Oh, hi.\nSummary:"], "no summary, or a turn in its place"),
    ("summary", ["Ali: Hi.\nBea: Ho.\nSummary: They say so much that it is longer."],
     "a summary longer than its dialogue")])
def test_a_bad_pair_says_why(name, texts, reason):
    assert tried(name, *texts).reason == reason


# ----------------------------------------------------------------------- when an answer is right

@pytest.mark.parametrize("text, number", [
    ("18", "18"), ("18.", "18"), ("18.0", "18"), ("$1,234.50", "1234.5"), ("It is $18.00!", "18"),
    ("#### 18", "18"), ("3 + 15 = 18 eggs", "18"), ("18%", "18"), ("-5", "-5"), ("5 - 3", "3"),
    ("5-3", "3"), ("so \u22125", "-5"), ("-$5", "-5"), ("-0.0", "0"), ("007", "7"), (".50", "0.5"),
    ("0.125", "0.125"), ("1,2", "2"), ("1,234,567", "1234567"), ("1/2", "2"), ("100", "100"),
    ("12,3456", "3456"), ("none", "no number"), ("", "no number")])
def test_the_final_number_has_one_spelling(text, number):
    assert arithmetic.final_number(text) == number


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("B.", "B"), ("(B)", "B"), ("B) snow", "B"), ("**B**", "B"), (" B\n", "B"),
    ("The answer is B.", "B"), ("Answer: B", "B"), ("answer (B)", "B"), ("snow", ""), ("", ""),
    ("Bank", ""), ("E", ""), ("b", "")])
def test_the_letter_of_an_answer(text, letter):
    x = bundled("choice", 1)[0]
    assert choice.letter_of(text, x) == letter
    verdict = choice.verdict(text, replace(x, answers=("B",)))
    assert verdict.exact == (letter == "B") and verdict.measures == {"letter": float(letter != "")}
    assert verdict.reason == ("" if letter else "no letter")
    wrong = choice.verdict(text, replace(x, answers=("A",)))
    assert wrong.reason == ("wrong letter" if letter else "no letter")


SQUAD = [("The Cat.", ["cat"], 1, 1), ("a cat sat", ["the cat"], 0, 2 / 3), ("", ["cat"], 0, 0),
         ("cat cat", ["cat"], 0, 2 / 3), ("dog", ["cat", "a dog"], 1, 1), ("1,871", ["1871"], 1, 1),
         ("in 1871", ["1871", "the year 1871"], 0, 2 / 3), ("U.S.", ["us"], 1, 1),
         ("thecat", ["the cat"], 0, 0), ("  the   old\ncat ", ["Old cat"], 1, 1),
         ("the\u2014cat", ["cat"], 0, 0), ("ship's cook", ["a ships cook"], 1, 1)]


@pytest.mark.parametrize("text, golds, exact, f1", SQUAD)
def test_exact_match_and_f1_are_squads(text, golds, exact, f1):
    verdict = reading.verdict(text, replace(bundled("reading", 1)[0], answers=tuple(golds)))
    assert (verdict.exact, verdict.measures["f1"]) == (bool(exact), pytest.approx(f1))


def test_exact_match_and_f1_are_those_of_a_package():
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    draw, cases = random.Random(0), [(text, golds) for text, golds, *_ in SQUAD if text]
    words = ["the", "A", "an", "cat", "Cat.", "dog's", "U.S.", "1,871", "-", "\u201cold", "\n"]
    for _ in range(60):
        cases.append((" ".join(draw.choices(words, k=draw.randint(1, 4))),
                      [" ".join(draw.choices(words, k=draw.randint(1, 4))) for _ in range(2)]))
    for text, golds in cases:
        if not all(map(reading.normalised, [text, *golds])):
            continue            # that of nothing: the package counts it as right
        theirs = squad([{"prediction_text": text, "id": "0"}],
                       [{"answers": {"answer_start": [0] * len(golds), "text": golds}, "id": "0"}])
        verdict = reading.verdict(text, replace(bundled("reading", 1)[0], answers=tuple(golds)))
        own = {"exact_match": 100.0 * verdict.exact, "f1": 100 * verdict.measures["f1"]}
        assert own == pytest.approx({name: float(value) for name, value in theirs.items()}), text


def test_rouge_is_that_of_the_package():
    """Also of texts in which words repeat, of other scripts, and of nothing."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(
        ["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    draw, words = random.Random(0), ["the", "Cat", "cat,", "sat", "42", "on-a", "Zürich", "_x"]
    for k in (0, 1, 2, 5, 20) * 20:
        text, gold = [" ".join(draw.choices(words, k=draw.randint(0, k))) for _ in range(2)]
        theirs = {name: score.fmeasure for name, score in scorer.score(gold, text).items()}
        assert rouge.rouge(text, gold) == pytest.approx(theirs), (text, gold)


def test_rouge_worked_by_hand():
    """the cat sat | the cat lay down: 2 of 3 and 4 words; 1 of 2 and 3 pairs; a row of 2."""
    assert rouge.rouge("The cat sat.", "the cat lay down") == pytest.approx(
        {"rouge1": 4 / 7, "rouge2": 2 / 5, "rougeL": 4 / 7})
    assert rouge.rouge("b a", "a b")["rougeL"] == 0.5 and rouge.rouge("", "a")["rouge1"] == 0.0
    best = summary.verdict("a b", replace(bundled("summary", 1)[0], answers=("c d", "a b", "a")))
    assert best.measures == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0} and not best.exact


@pytest.mark.parametrize("before, after, right", [
    (0.30, 0.32, (False, True)), (0.30, 0.319, (False, False)), (0.32, 0.30, (True, False)),
    (0.30, 0.30, (False, False)), (0.30, 0.281, (False, False)), (0.1, 0.9, (False, True))])
def test_of_two_summaries_the_clearly_better_one_is_right(before, after, right):
    record = summary.judged(replace(RECORD, base=replace(SO, measures={"rougeL": before}),
                                    answer=replace(SO, measures={"rougeL": after})))
    assert (record.base.exact, record.answer.exact) == right
    assert [v.reason == "" for v in (record.base, record.answer)] == list(right)


# ----------------------------------------------------------------------------------- data of others

FORMS = {
    "choice": [{"question": "Q?", "choices": {"A": "x", "B": "y"}, "answer": "B", "id": "7"},
               {"id": "7", "question": {"stem": "Q?", "question_concept": "q", "choices": [
                   {"label": "A", "text": "x"}, {"label": "B", "text": "y"}]}, "answerKey": "B"}],
    "reading": [{"context": "C c.", "question": "Q?", "answers": ["c", "C c"], "id": "7"},
                {"title": "T", "paragraphs": [{"context": "C c.", "qas": [
                    {"id": "7", "question": "Q?", "answers": [
                        {"answer_start": 2, "text": "c"}, {"answer_start": 0, "text": "C c"}]}]}]}],
    "arithmetic": [{"question": "Q?", "answer": "1234.5", "id": "7"},
                   {"question": "Q?", "answer": 1234.5, "id": 7},
                   {"question": "Q?", "answer": "2 * <<2*2=4>>4 ...\n#### 1,234.50", "id": "7"}],
    "summary": [{"document": "D", "summaries": ["s", "t"], "id": "7"},
                {"fname": "7", "dialogue": "D", "summary1": "s", "topic1": "x", "summary2": "t"}]}


@pytest.mark.parametrize("name", FORMS)
def test_the_published_form_of_a_data_set_is_read_as_the_plain_one(name, tmp_path):
    """As JSON Lines, as a list, and as an object with the list under "data"."""
    plain = TASKS[name].read(FORMS[name][0])
    for i, item in enumerate(FORMS[name]):
        assert TASKS[name].read(item) == plain
        path = tmp_path / f"{i}.json"
        for content in (json.dumps(item), json.dumps([item]), json.dumps({"data": [item]})):
            path.write_text(f"{content}\n")
            assert read_samples(name, path, TASKS[name].read) == plain
    path.write_text("\n".join([json.dumps(FORMS[name][0] | {"id": i}) for i in (1, 1)]))
    assert [x.id for x in read_samples(name, path, TASKS[name].read)] == [f"{name}-0", f"{name}-1"]


def test_one_summary_of_a_training_split_is_read():
    x, = summary.read({"id": "train_0", "dialogue": "D", "summary": "s", "topic": "x"})
    assert x.answers == ("s",)


@pytest.mark.parametrize("name, content, said", [
    ("choice", "", "cannot be read"), ("choice", "[]", "not a list of samples, or an empty one"),
    ("choice", "[3]", "item 0: not a JSON object"), ("choice", "[{}]", "has no 'stem' and no 'que"),
    ("choice", [{"question": "Q", "choices": {"A": "x"}, "answer": "A"}], "not two options"),
    ("choice", [{"question": "Q", "choices": {"A": "x", "B": "y"}, "answer": "C"}], "'C' is not"),
    ("choice", [{"question": "Q", "choices": {"1": "x", "2": "y"}, "answer": "1"}], "A to Z"),
    ("choice", [{"question": "Q", "choices": {"A": "x", "B": ""}, "answer": "A"}], "'B' is not"),
    ("reading", [{"context": "C", "question": "Q", "answers": []}], "'answers' is not a list"),
    ("reading", [{"context": 3, "question": "Q", "answers": ["a"]}], "'context' is not a text"),
    ("reading", [{"paragraphs": [{"context": "C", "qas": [3]}]}], "'qas' is not a list of objects"),
    ("arithmetic", [{"question": "Q", "answer": "many"}], "the answer 'many' has no number"),
    ("arithmetic", [{"question": "Q"}], "has no 'answer'"),
    ("summary", [{"document": "D"}], "'summaries' is not a list of texts"),
    ("summary", [{"document": "D", "summary": " "}], "'summary' is not a text, or an empty one")])
def test_a_bad_file_is_one_sentence_and_nothing_is_begun(name, content, said, tmp_path, capsys):
    path = tmp_path / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert TASKS[name].main(["--data", str(path), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error and str(path) in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, said", [
    (["--data", "no-such-file"], "no file no-such-file"), (["--answers", "1"], "--answers 1: must"),
    (["--bench", "sealtool"], "--bench sealtool: a task's samples"), (["--tau", "2"], "--tau 2.0"),
    (["--pair", "joint"], "--pair joint: this task has only call"),
    (["--method", "base", "--control", "all"], "--control all: --method base adapts to nothing")])
def test_a_wrong_option_is_one_sentence(flags, said, capsys):
    assert reading.main(flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("name, file", [("choice", "commonsenseqa"), ("reading", "squad"),
                                        ("arithmetic", "gsm8k"), ("summary", "dialogsum")])
def test_real_samples_are_read_and_their_gold_answers_are_right(name, file):
    path = Path(os.environ.get("TTSI_DATA", "")) / "transfer" / f"{file}.jsonl"
    if not path.is_file():
        pytest.skip("TTSI_DATA names no folder with transfer/")
    samples = read_samples(name, path, TASKS[name].read)
    assert len(samples) == 200
    for x in samples:
        verdict = TASKS[name].TASK.verdict(x.answers[0], x)
        assert verdict.exact or name == "summary" and min(verdict.measures.values()) == 1
