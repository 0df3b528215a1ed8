"""What a run comes to: the numbers of a run folder, the table, and one sample's story."""
import json
import math

import pytest

import evaluate
from evaluate import main, printable, read_records, story, summarise, table


def part(exact: bool, text: str = "text", reason: str = "wrong name: f for g") -> dict:
    return {"text": text, "exact": exact, "reason": "" if exact else reason, "strict": exact, "parsed": True, "recovery": "",
            "name_correct": exact, "name_f1": float(exact), "argument_f1": 0.5}


def record(id: str, base: bool, answer: bool, outcome: str = "adapted", margin: float = 0.5) -> dict:
    return {"id": id, "request": "What?", "margin": margin, "uncertain": outcome != "certain", "gate": "margin", "tau": 0.95,
            "scores": {"margin": 1 - margin}, "candidates": {"f": -0.5, "g": -2.5},
            "outcome": outcome, "base": part(base), "answer": part(answer), "gold": "gold", "reachable": True, "tokens": {},
            "pairs": [{"request": "Why?", "calls": [{"name": "f", "arguments": {"x": 1}}], "text": "f(x=1)", "votes": 3}],
            "rejected": [{"text": "bad", "reason": "unknown argument: y"}], "losses": [0.5, 0.25], "sampled": [], "seconds": {"score": 1.0, "base": 0.5}}


RECORDS = [record("a", False, True), record("b", True, False), record("c", True, True, "certain"), record("d", False, False, "no pair"),
           record("e", False, True)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"bench": "sealtool", "data": "", "tau": 0.95}))
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return tmp_path


def test_a_run_by_hand():
    s = summarise(RECORDS)
    assert (s["n"], s["uncertain"], s["adapted"], s["no_pair"], s["fixed"], s["harmed"]) == (5, 4, 3, 1, 2, 1)
    assert (s["base_accuracy"], s["accuracy"]) == (0.4, 0.6) and s["accuracy"] - s["base_accuracy"] == pytest.approx((2 - 1) / 5)
    assert s["reasons"] == {"wrong name": 2} and s["rejected"] == {"unknown argument": 5}
    assert s["seconds"] == {"score": 5.0, "base": 2.5}


def test_no_records_are_no_number():
    assert math.isnan(summarise([])["accuracy"])


def test_the_table_has_before_after_and_the_papers_figure(folder):
    text = table([folder])
    assert "+20.0" in text and "40.0" in text and "60.0" in text and "66.37 -> 72.43" in text


def test_bundled_samples_are_never_set_beside_the_papers_figures(folder):
    (folder / "config.json").write_text(json.dumps({"bench": "sealtool", "data": "bundled", "tau": 0.95}))
    assert "bundled samples" in table([folder]) and "66.37" not in table([folder])


def test_what_no_method_can_reach_is_said(folder):
    (folder / "records.jsonl").write_text(json.dumps(record("a", False, False) | {"reachable": False}) + "\n")
    assert "at most 0.0% can be reached" in table([folder])


def test_a_story_has_all_that_happened():
    text = story(RECORDS[0])
    for said in ("What?", "88.1%", "below tau = 0.95", "Why?", "3 votes", "unknown argument: y", "0.500 0.250", "gold",
                 "wrong name: f for g"):
        assert said in text
    first, second = [line for line in text.splitlines() if "%" in line]
    assert first.count("#") == 26 and second.count("#") == 4                # bars of 30 for softmax(-0.5, -2.5)


def test_control_characters_never_reach_the_terminal():
    assert printable("a\x1b[2Jb\x07\r\u202e\ud800\nc") == "a\\x1b[2Jb\\x07\\r\\u202e\\ud800\nc"


def test_the_program(folder, capsys):
    assert main([str(folder)]) == 0 and "sealtool" not in capsys.readouterr().err
    assert main([str(folder), "--sample", "a"]) == 0 and "sample  a: adapted" in capsys.readouterr().out


@pytest.mark.parametrize("break_, sample, said", [
    (lambda f: (f / "records.jsonl").unlink(), "a", "a run folder of train.py"), (lambda f: None, "z", "no sample 'z'"),
    (lambda f: (f / "config.json").unlink(), None, "a run folder of train.py"),
    (lambda f: (f / "config.json").write_text("{"), None, "config.json"),
    (lambda f: (f / "records.jsonl").write_text(json.dumps(RECORDS[0]) + "\n{\n"), "a", "records.jsonl, line 2"),
    (lambda f: (f / "records.jsonl").write_text('{"id": "a"}\n'), "a", "records.jsonl, line 1")])
def test_a_users_mistake_is_one_line_and_code_2(folder, capsys, break_, sample, said):
    break_(folder)
    assert main([str(folder), *(["--sample", sample] if sample else [])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_a_torn_last_line_is_left_out(folder):
    with open(folder / "records.jsonl", "a") as file:
        file.write('{"id": "f", "requ')
    assert [r["id"] for r in read_records(folder)] == list("abcde")
