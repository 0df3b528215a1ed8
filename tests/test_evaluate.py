"""What a run comes to: its records on disk, the table of runs, one sample's story.

When an answer is right is told in test_calls.py, case by case.
"""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data import Sample
from data.calls import Call
from evaluate import (Record, Run, Verdict, exact_match, f1, main, printable, read_run, story,
                      summarise, table, write_run)

CONFIG = {"bench": "sealtool", "data": "", "tau": 0.95}


def verdict(exact: bool) -> Verdict:
    text, reason = ("f(x=1)", "") if exact else ("g()", "wrong name: g for f")
    return Verdict(text, exact, reason, strict=False, parsed=True, recovery="", name_correct=exact,
                   name_f1=float(exact), argument_f1=0.5)


def record(id: str, base: bool, answer: bool, outcome: str = "adapted", **changes) -> Record:
    """A sample with two candidates; base and answer: whether it was right before and after."""
    made = Record(
        id, request="What?", margin=0.5, uncertain=outcome != "certain", outcome=outcome,
        candidates={"g": -2.5, "f": -0.5}, base=verdict(base), answer=verdict(answer),
        pairs=[{"request": "Why?", "text": "f(x=2)", "read_back": False}], losses=[0.5, 0.25],
        rejected=[{"text": "bad", "reason": "unknown argument: y"}], norms=[9.0, 2.0],
        seconds={"score": 1.0, "base": 0.5}, tokens={"score": 7}, gold="f(x=1)", reachable=True,
        log_p=[-0.5, -0.25], entropy=[0.5, 0.25], ids=[5], prompt_tokens=9)
    return replace(made, **changes)


RECORDS = [record("a", False, True), record("b", True, False), record("c", True, True, "certain"),
           record("d", False, False, "no pair"), record("e", False, True)]
RUNS = [Run(Path("runs/one"), CONFIG, RECORDS), Run(Path("runs/another"), CONFIG, RECORDS[:2])]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_run(tmp_path / "run", CONFIG, RECORDS)
    return tmp_path / "run"


# --- Scoring --------------------------------------------------------------------------------------

def test_f1_is_one_to_one_so_repeating_does_not_pay():
    assert f1("aaa", "a") == 0.5 and f1("a", "aaa") == 0.5 and f1("aba", "baa") == 1.0
    assert f1("", "") == 1.0 and f1("a", "") == 0.0


@pytest.mark.parametrize("text, gold, exact, reason", [
    ("now()", [Call("now")], True, ""), ("no idea", [Call("now")], False, "unparsable"),
    ("", [Call("now")], False, "unparsable"), (" \n", [], True, ""),
    ("no idea", [], False, "unparsable"), ("now()", [], False, "wrong number of calls: 1 for 0")])
def test_text_without_a_call_earns_nothing_unless_it_is_empty_and_no_call_is_wanted(
        text, gold, exact, reason):
    tools = ({"name": "now", "description": "", "parameters": {}},)
    v = exact_match(text, Sample("s", (), tools, tuple(gold)))
    assert (v.text, v.exact, v.reason, v.name_correct, v.name_f1) == (
        text, exact, reason, exact, float(exact))
    assert reason != "unparsable" or v.argument_f1 == 0.0


def test_scoring_needs_no_torch():
    code, root = "import sys, evaluate; sys.exit('torch' in sys.modules)", Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# --- Records --------------------------------------------------------------------------------------

def test_a_run_is_read_as_it_was_written(folder):
    assert read_run(folder) == Run(folder, CONFIG, RECORDS)
    assert json.loads((folder / "summary.json").read_text()) == summarise(RECORDS)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jsonl"}


def test_a_record_without_a_field_is_named(folder):
    lines = (folder / "records.jsonl").read_text().splitlines()
    for part, field in ((None, "margin"), ("base", "exact")):
        changed = json.loads(lines[1])
        del (changed[part] if part else changed)[field]
        (folder / "records.jsonl").write_text("\n".join([lines[0], json.dumps(changed)]))
        with pytest.raises(ValueError, match=f"records.jsonl, line 2: .*'{field}'; the run's comm"):
            read_run(folder)


@pytest.mark.parametrize("name, content", [
    ("config.json", b"{"), ("config.json", b"[]"), ("records.jsonl", b"5"),
    ("records.jsonl", b"{"), ("records.jsonl", b"\xff"), ("records.jsonl", b"{}")])
def test_a_damaged_file_is_named_with_its_line(folder, name, content):
    (folder / name).write_bytes(content)
    where = name if name == "config.json" else f"{name}, line 1"
    with pytest.raises(ValueError, match=f"{where}: "):
        read_run(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: is .* a run folder of train.py"):
        read_run(folder)


def test_an_interrupted_write_leaves_the_old_files_whole_and_nothing_else(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    synced = []                             # bytes on the disk before the file takes its name

    def interrupted(source, target):
        assert synced == [os.path.getsize(source)]
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_run(folder, {"bench": "other"}, RECORDS[:1])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("config, losses", [(CONFIG, [math.nan]), ({"tau": math.inf}, [])])
def test_what_json_has_no_number_for_is_refused_before_anything_is_written(folder, config, losses):
    with pytest.raises(ValueError):
        write_run(folder, config, [record("a", True, True, losses=losses)])
    assert read_run(folder) == Run(folder, CONFIG, RECORDS)


# --- The table ------------------------------------------------------------------------------------

def test_a_summary_by_hand():
    outcomes = ["no pair", "no pair", "no pair", "non-finite", "out of memory"]
    s = summarise(RECORDS[:3] + [record(o, False, False, o) for o in outcomes])
    assert (s["n"], s["uncertain"], s["adapted"], s["no_pair"]) == (8, 7, 2, 3)
    assert (s["non_finite"], s["out_of_memory"], s["fixed"], s["harmed"]) == (1, 1, 1, 1)
    s = summarise(RECORDS)
    assert (s["base_accuracy"], s["accuracy"], s["fixed"], s["harmed"]) == (0.4, 0.6, 2, 1)
    assert (s["base_name_correct"], s["answer_name_f1"], s["base_argument_f1"]) == (0.4, 0.6, 0.5)
    assert (s["answer_strict"], s["base_parsed"], s["reachable"]) == (0.0, 1.0, 1.0)
    assert s["reasons"] == {"wrong name": 2} and s["rejected"] == {"unknown argument": 5}
    assert s["seconds"] == {"score": 5.0, "base": 2.5}


def test_without_records_there_is_no_number(tmp_path):
    write_run(tmp_path, CONFIG, [])
    assert summarise([])["accuracy"] is None
    assert table([read_run(tmp_path)]).endswith("no finished sample yet")


def test_the_table_of_two_runs():
    head, _, one, another, note = table(RUNS).splitlines()
    assert head.startswith("run    ") and len(head) == len(one) == len(another)
    assert one.split() == "one 5 4 3 1 40.0 60.0 +20.0 2 1 60.0 1.50".split()
    assert another.split() == "another 2 2 2 0 50.0 50.0 +0.0 1 1 50.0 1.50".split()
    assert note == "all runs: the paper's gain (Qwen2.5-1.5B-Instruct, 5 seeds) is +5.76"
    assert "\none: the paper" in table([RUNS[0], Run(Path("x"), {}, RECORDS)])


def test_the_table_for_a_readme_is_one_there():
    head, rule, one, another, blank, note = table(RUNS, markdown=True).splitlines()
    for line in (head, rule, one, another):
        assert line.startswith("| ") and line.endswith(" |") and line.count("|") == 13
    assert set(rule) == set("| -") and blank == "" and note.startswith("all runs: ")


@pytest.mark.parametrize("config, said, unsaid", [
    ({"bench": "nexusraven", "data": "folder"}, "+6.05", "bundled"),
    ({"bench": "nexusraven", "data": "bundled"}, "bundled samples", "6.05"),
    ({"bench": "nexusraven", "data": "mine.json"}, "x", "6.05"),
    ({"bench": "apibank_l2"}, "x", "paper"), ({"bench": []}, "x", "paper"),
    ({"uses_labels": True}, "\nx: uses labels", "paper"), ({"uses_labels": False}, "x", "labels")])
def test_what_a_reader_must_know_stands_below(config, said, unsaid):
    text = table([Run(Path("x"), config, RECORDS)])
    assert said in text and unsaid not in text


def test_failed_adaptations_and_unreachable_samples_are_told():
    text = table([Run(Path("x"), {}, [record("a", True, True, "non-finite", reachable=False),
                                      record("b", True, True, "out of memory")])])
    assert "dropped as non-finite, the direct answer stands: 1" in text
    assert "out of memory, the direct answer stands: 1" in text and "stands" not in table(RUNS)
    assert "at most 50.0% can be right" in text and "at most" not in table(RUNS)


# --- The story ------------------------------------------------------------------------------------

def test_a_story_has_all_that_happened_in_the_papers_order():
    text = story(record("a", False, True, request="What\nnow?"), 0.95)
    assert [line.rstrip() for line in text.splitlines()] == [
        "    sample  a: adapted",
        "   request  What",
        "            now?",
        " candidate   88.1% ##########################     f",    # softmax(-0.5, -2.5), bars of 30
        " candidate   11.9% ####                           g",
        "    margin  0.500, below tau = 0.95",
        "      pair  Why?",
        "            f(x=2)",
        "  rejected  unknown argument: y: bad",
        "    losses  0.500 0.250",
        "    before  wrong  g()   (wrong name: g for f)",
        "     after  right  f(x=1)",
        "      gold  f(x=1)"]


def test_the_story_of_a_certain_sample_is_short():
    nothing = {"candidates": {}, "pairs": [], "rejected": [], "losses": []}
    certain = record("c", True, True, "certain", margin=0.95, **nothing)
    labels = [line.split()[0] for line in story(certain, 0.95).splitlines()]
    assert labels == ["sample", "request", "margin", "before", "after", "gold"]
    assert "0.950, not below tau = 0.95" in story(certain, 0.95)


def test_control_characters_never_reach_the_terminal():
    assert printable("a\x1b[2Jb\x07\r\u202e\ud800\nc") == "a\\x1b[2Jb\\x07\\r\\u202e\\ud800\nc"
    hostile = record("\x1b[2J", True, True, gold="\x1b[2J", candidates={"\x1b[2J": 0.0})
    assert "\x1b" not in story(hostile, 0.95) + table([Run(Path("\x1b[2J"), {}, RECORDS)])


# --- The program ----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, said", [
    ([], "+20.0"), (["--markdown"], "| run"), (["--sample", "a"], "run\n    sample  a: adapted")])
def test_the_program_tells_what_is_asked_for(folder, capsys, flags, said):
    assert main([str(folder), *flags]) == 0 and said in capsys.readouterr().out
    assert main([str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {str(folder): summarise(RECORDS)}


@pytest.mark.parametrize("name, flags, said", [
    ("none\x1b", [], "a run folder of train.py?"),
    ("run", ["--sample", "z"], "no sample 'z'; it has a, b, c")])
def test_a_users_mistake_is_one_line_and_code_2(tmp_path, capsys, name, flags, said):
    write_run(tmp_path / "run", {"tau": 0.95}, RECORDS)
    assert main([str(tmp_path / name), *flags]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("evaluate.py: error: ") and error.endswith("\n")
    assert said in error and error[:-1].isprintable()


def test_the_kept_stages_beside_the_runs_are_no_run(tmp_path, capsys):
    write_run(tmp_path / "run", {"bench": "sealtool", "data": "", "tau": 0.95}, [])
    (tmp_path / "stages").mkdir()
    assert main([str(tmp_path / "run"), str(tmp_path / "stages")]) == 0
    assert "no finished sample" in capsys.readouterr().out
