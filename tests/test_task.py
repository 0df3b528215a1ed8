"""A task is one object: here another one than calling tools, choose one of the options A to D, runs
through the same Algorithm 1 to a table. Nothing of the core is replaced."""
import re

from data.runs import Verdict, read_run
from augment import Prompt, Try
from data import Sample, Task
from train import Config, fill_in, run, set_up


# -------------------------------------------------------------------------------- the task, whole

def prompt(x: Sample) -> list[dict]:
    return [{"role": "system", "content": "Answer with a letter."}, *x.messages]


def letters(x: Sample) -> list[str]:
    return re.findall(r"^([A-D])\) ", x.messages[-1]["content"], re.M)


def answer_start(text: str) -> str:
    return ""                                   # an answer is the letter, from its beginning


def try_questions(writer, samples, h, attempt, config) -> list[Try]:
    """A new question of the model's own, with x's options and the answer that H finds likeliest."""
    prompts, keys = [], [(config.seed, x.id, "question", attempt) for x in samples]
    for x in samples:
        ask = {"role": "user", "content": f"{x.messages[-1]['content']}\nWrite such a question."}
        prompts.append(Prompt([prompt(x)[0], ask]))
    tries = []
    texts = writer(prompts, 12, config.temperature, config.top_p, keys)
    for x, text in zip(samples, texts):
        options = x.messages[-1]["content"].partition("\n")[2]
        likeliest = max(h[x.id].candidates, key=h[x.id].candidates.get)
        reason = "" if text.strip() else "no question"
        tries.append(Try(x, [text], f"{text}\n{options}", likeliest, reason))
    return tries


def verdict(text: str, x: Sample) -> Verdict:
    exact = text.strip() == x.answers[0]
    return Verdict(text, exact, "" if exact else "wrong letter", {"letter": len(text.strip()) == 1})


def gold(answers: tuple) -> str:
    return answers[0]


CHOICE = Task(prompt, letters, answer_start, "", {"call": try_questions}, verdict, gold)


# ------------------------------------------------------------------------------------ what it does

SAMPLES = [Sample(f"q{i}", ({"role": "user", "content": f"What is {i} + 1?\n{options}"},), (), (a,))
           for i, (options, a) in enumerate([("A) 7\nB) 1", "B"), ("A) 2\nB) 5\nC) 9\nD) 0", "A"),
                                             ("A) 3", "A")])]


def test_another_task_runs_through_algorithm_1_to_a_table(tmp_path, capsys):
    """The bundled model knows nothing but tools: what it learns is to answer with a letter."""
    config = fill_in(Config(model="tiny", device="cpu", tau=1.0, epochs=12, max_new_tokens=8,
                            lr=1e-2, data="sums", out=str(tmp_path / "run")))
    assert run(*set_up(config, CHOICE, SAMPLES), config) == 0
    two, four, one = read_run(tmp_path / "run").records
    assert (len(two.candidates), len(four.candidates), one.margin) == (2, 4, 1.0)
    assert [r.outcome for r in (two, four, one)] == ["adapted", "adapted", "certain"]
    for record in (two, four):
        likeliest = max(record.candidates, key=record.candidates.get)
        assert record.pairs[0]["text"] == likeliest and record.losses[-1] < record.losses[0]
        assert not record.base.measures["letter"] and record.answer.text == likeliest
        assert record.answer.exact == (record.gold == likeliest)
    table = capsys.readouterr().out
    assert re.search(r"^run +3 +2 +2 +0 ", table, re.M)
