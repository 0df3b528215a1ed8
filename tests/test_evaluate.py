"""What an answer is worth, a run's records on disk, the table of runs, one sample's story.

Scoring is told in test_calls.py, too, case by case.
"""
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data import Sample
from data.calls import Call
from data.runs import Record, Run, read_run, write_run
from evaluate import (KNOWN, difference, exact_match, join, listing, main, printable, story,
                      summarise, table, wrong_argument)

ROOT = Path(__file__).parent.parent

TOOL = {"name": "f", "description": "", "parameters": {"x": {"type": "integer"}}}
SAMPLE = Sample("s", (), (TOOL,), (Call("f", {"x": 1}),))
F, G = '{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": {}}'
TWO = F.replace("1", "2")
RIGHT, WRONG = exact_match(F, SAMPLE), exact_match(G, SAMPLE)
BEYOND = exact_match(F, replace(SAMPLE, tools=()))      # nobody offered its tool
CONFIG = {"bench": "sealtool", "data": "", "tau": 0.95}


def record(id: str, before: bool, after: bool, outcome: str = "adapted", **changes) -> Record:
    """A sample with two candidates, and whether it was right before and after."""
    made = Record(
        id, request="What?", margin=0.5, uncertain=outcome != "certain", outcome=outcome,
        candidates={"g": -2.5, "f": -0.5}, base=RIGHT if before else WRONG,
        answer=RIGHT if after else WRONG,
        pairs=[{"request": "Why?", "text": TWO, "read_back": False}], losses=[0.5, 0.25],
        rejected=[{"text": "bad", "reason": "unknown argument: y"}], norms=[9.0, 2.0],
        seconds={"H": 1.0, "T": 0.5}, gold=F, log_p=[-0.5, -0.25], entropy=[0.5, 0.25], ids=[5],
        prompt_tokens=9)
    return replace(made, **changes)


RECORDS = [record("a", False, True), record("b", True, False), record("c", True, True, "certain"),
           record("d", False, False, "no pair"), record("e", False, True)]
FAILED = [record("a", True, True, "non-finite", base=BEYOND, answer=BEYOND),
          record("b", True, True, "out of memory"),
          record("c", False, False, "too long", answer=replace(WRONG, reason="cut at 9 tokens: x"))]
LINE = json.dumps(asdict(RECORDS[0]))


@pytest.fixture
def folder(tmp_path) -> Path:
    assert write_run(Run(tmp_path / "run", CONFIG, RECORDS), summarise(RECORDS))
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- Scoring --------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, reason", [
    (F, ""), ("no idea", "unparsable"), ("", "unparsable"), (G, "wrong name: g for f"),
    (f"[{F}, {F}]", "wrong number of calls: 2 for 1"),
    (F.replace('"x": 1', ""), "missing argument: x"), (F.replace("1", '"1"'), ""),
    (F.replace("1", '1, "y": 2'), "extra argument: y"), (TWO, "wrong value: x")])
def test_an_answer_is_right_or_there_is_a_reason(text, reason):
    verdict = exact_match(text, SAMPLE)
    assert (verdict.text, verdict.exact, verdict.reason) == (text, not reason, reason)


def test_a_wrong_call_is_told_by_the_one_of_its_name_that_has_most_in_common():
    wanted = frozenset([("x", 1), ("y", 2)])
    none, one = ("f", frozenset([("x", 3), ("z", 4)])), ("f", frozenset([("x", 1), ("y", 5)]))
    for wrong in ([none, one], [one, none], [("g", wanted), one]):
        assert wrong_argument(Counter(wrong), "f", wanted) == "wrong value: y"
    other = ("f", frozenset([("x", 1)]))                                    # as much in common
    assert wrong_argument(Counter([other, one]), "f", wanted) == "missing argument: y"


# --- Records --------------------------------------------------------------------------------------

def test_a_run_is_read_as_it_was_written(folder):
    assert read_run(folder) == Run(folder, CONFIG, RECORDS)
    assert json.loads((folder / "summary.json").read_text()) == summarise(RECORDS)


@pytest.mark.parametrize("name, content, said", [
    ("config.json", "{", ": "), ("config.json", "[]", ": "), ("records.jsonl", "5", ", line 1: "),
    ("records.jsonl", f"{LINE}\n{{", ", line 2: "), ("records.jsonl", "\xff", ", line 1: "),
    ("records.jsonl", LINE.replace('"margin": 0.5, ', ""), ", line 1: .*'margin'"),
    ("records.jsonl", LINE.replace('"exact": false, ', ""), ", line 1: .*'exact'")])
def test_a_damaged_or_missing_file_is_named_with_its_line(folder, name, content, said):
    (folder / name).write_text(content, "latin-1")
    with pytest.raises(ValueError, match=f"{name}{said}.*; the run's command writes it again"):
        read_run(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: is .* a run folder of train.py"):
        read_run(folder)


def test_a_write_that_fails_leaves_the_old_files_whole_and_nothing_else(folder, monkeypatch):
    before = contents(folder)
    with pytest.raises(ValueError):                     # JSON has no number for it
        write_run(Run(folder, {}, [record("a", True, True, losses=[math.nan])] * 5), {})

    def interrupted(source, target): raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_run(Run(folder, {"bench": "other"}, RECORDS[::-1]), {})
    assert contents(folder) == before


def test_a_folder_of_more_records_is_left_as_it_is_and_its_own_are_told(folder, capsys):
    before = contents(folder)
    assert not write_run(Run(folder, {}, RECORDS[:4]), {}) and contents(folder) == before
    join(Run(folder, CONFIG, RECORDS[2:4]))
    said = capsys.readouterr().out
    assert contents(folder) == before and "more samples are in it already" in said
    assert table([Run(folder, CONFIG, RECORDS)]) in said
    assert said.endswith(f"evaluate.py {folder} --sample a    tells its story.\n")     # a change


def test_a_run_is_joined_whether_or_not_anything_changed(tmp_path, capsys):
    for records, next_ in ((RECORDS[2:], "e"), (RECORDS[2:4], "c"), ([], None)):
        run = Run(tmp_path / str(next_), CONFIG, records)
        join(run)
        said = capsys.readouterr().out
        assert read_run(run.folder) == run and table([run]) in said
        assert (f"--sample {next_} " in said) == bool(records) == ("Next: " in said)


# --- The table ------------------------------------------------------------------------------------

def test_a_summary_by_hand():
    s = summarise(RECORDS + FAILED)
    assert (s["n"], s["uncertain"], s["adapted"], s["no_pair"]) == (8, 7, 3, 1)
    assert (s["non_finite"], s["out_of_memory"], s["too_long"], s["cut"]) == (1, 1, 1, 1)
    assert s["base_reachable"] == s["answer_reachable"] == 7 / 8
    assert s["reasons"] == {"wrong name": 2, "cut at 9 tokens": 1}
    s = summarise(RECORDS)
    assert (s["base_accuracy"], s["answer_accuracy"], s["fixed"], s["harmed"]) == (0.4, 0.6, 2, 1)
    assert (s["base_name_correct"], s["answer_name_f1"], s["base_argument_f1"]) == (0.4, 0.6, 0.4)
    assert s["reasons"] == {"wrong name": 2} and s["rejected"] == {"unknown argument": 5}
    assert s["seconds"] == {"H": 5.0, "T": 2.5}


@pytest.mark.parametrize("markdown", [False, True])
def test_the_table_of_two_runs(markdown):
    runs = [Run(Path("runs/one"), CONFIG, RECORDS), Run(Path("runs/two"), CONFIG, RECORDS[:2])]
    head, rule, one, two, *rest = table(runs, markdown).splitlines()
    assert len(head) == len(rule) == len(one) == len(two)
    assert head.count("|") == rule.count("|") == one.count("|") == 13 * markdown
    assert one.replace("|", " ").split() == "one 5 4 3 1 40.0 60.0 +20.0 2 1 60.0 1.50".split()
    assert two.replace("|", " ").split() == "two 2 2 2 0 50.0 50.0 +0.0 1 1 50.0 1.50".split()
    note = "all runs: the paper's gain (Qwen2.5-1.5B-Instruct, 5 seeds) is +5.76"
    assert rest == [""] * markdown + [note]         # in Markdown a paragraph of its own


def test_a_run_that_goes_on_says_of_how_many_and_what_is_not_measured_is_a_dash():
    bare = [replace(record("a", True, True), answer=replace(RIGHT, measures={}))]
    *_, row = table([Run(Path("x"), {"samples": 3}, bare)]).splitlines()
    assert row.split() == "x 1 of 3 1 1 0 100.0 100.0 +0.0 0 0 - 1.50".split()


@pytest.mark.parametrize("config, records, notes", [
    ({"bench": "nexusraven", "data": "folder"}, RECORDS,
     ["the paper's gain (Qwen2.5-1.5B-Instruct, 5 seeds) is +6.05"]),
    ({"bench": "nexusraven", "data": "bundled"}, RECORDS,
     ["bundled samples, made for this project; they are not the benchmark"]),
    ({"bench": "nexusraven", "data": "mine.jsonl"}, RECORDS, []), ({"bench": []}, RECORDS, []),
    ({"uses_labels": True}, RECORDS, ["uses labels"]), ({}, [], ["no finished sample yet"]),
    ({}, FAILED, ["non-finite, the direct answer stands: 1",
                  "out of memory, the direct answer stands: 1",
                  "too long for the model's context: 1",
                  "wrong answers that were cut at --max-new-tokens: 1",
                  "at most 66.7% can be right: elsewhere a gold tool is not offered"])])
def test_what_a_reader_must_know_stands_below(config, records, notes):
    lines = table([Run(Path("x"), config, records)]).splitlines()
    assert [line for line in lines if line.startswith("x: ")] == [f"x: {note}" for note in notes]


def test_what_can_be_known_of_samples_that_were_looked_at_stands_below():
    """It takes the place of the note that looks at names alone."""
    name, (known, named) = next(iter(json.loads(KNOWN.read_text()).items()))
    config = {"facts": {"samples": name}}
    lines = table([Run(Path("x"), config, [FAILED[0]])])
    *_, note = lines.splitlines()
    assert note == f"x: at most {known} % can be known from the prompt; naming by rule: {named} %"
    assert "a gold tool is not offered" not in lines
    other = table([Run(Path("x"), {"facts": {"samples": "others"}}, [FAILED[0]])])
    assert "can be known" not in other and "a gold tool is not offered" in other


def test_without_gold_answers_nothing_is_counted_right_or_wrong():
    bare = exact_match(F, replace(SAMPLE, answers=None))
    assert (bare.exact, bare.reason) == (None, "no gold answer")
    records = [record(id, True, True, base=bare, answer=bare) for id in "ab"]
    s = summarise([*records, RECORDS[0]])
    assert (s["n"], s["no_gold"], s["answer_accuracy"], s["fixed"], s["harmed"]) == (3, 2, 1, 1, 0)
    assert s["reasons"] == {} and "answer_accuracy" not in summarise(records)
    _, _, row, note = table([Run(Path("x"), {}, records)]).splitlines()
    assert row.split() == "x 2 2 2 0 - - - 0 0 - 1.50".split()
    assert note == "x: without a gold answer, so neither right nor wrong: 2"
    assert f"     after  {F}   (no gold answer)" in story(records[0], 0.95)


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
        f"            {TWO}",
        "  rejected  unknown argument: y: bad",
        "    losses  0.500 0.250",
        f"    before  wrong  {G}   (wrong name: g for f)",
        f"     after  right  {F}",
        f"      gold  {F}"]


def test_where_the_memory_did_not_hold_even_the_reading_the_story_says_so():
    bare = record("a", False, False, "out of memory", margin=None, candidates={}, pairs=[],
                  rejected=[], losses=[])
    assert story(bare, 0.95).startswith("    sample  a: out of memory\n   request  What?\n")


def test_control_characters_never_reach_the_terminal():
    assert printable("a\x1b[2Jb\x07\r\u202e\ud800\nc") == "a\\x1b[2Jb\\x07\\r\\u202e\\ud800\nc"
    hostile = record("\x1b[2J", True, True, gold="\x1b[2J", candidates={"\x1b[2J": 0.0})
    assert "\x1b" not in story(hostile, 0.95) + table([Run(Path("\x1b[2J"), {}, RECORDS)])


# --- The samples of a run, a line each ------------------------------------------------------------

@pytest.mark.parametrize("which, ids", [
    ("fixed", "ae"), ("harmed", "b"), ("uncertain", "abde"), ("rejected", "ab"), ("all", "abcde")])
def test_a_list_has_a_line_for_each_of_its_samples(tmp_path, which, ids):
    records = [replace(r, rejected=r.rejected if r.id in "ab" else []) for r in RECORDS]
    *lines, last = listing(Run(Path("run"), CONFIG, records), which).splitlines()
    assert [line.split()[0] for line in lines] == list(ids)
    assert last == f"run: {which}: {len(ids)} of 5 samples"
    assert ("unknown argument: y" in lines[0]) == (which == "rejected")
    if which == "fixed":
        assert lines[0] == "a  adapted   u 0.500  wrong -> right  wrong name: g for f"


def test_a_sample_without_gold_or_margin_is_listed_as_neither_right_nor_wrong():
    bare = replace(RIGHT, exact=None, reason="no gold answer")
    run = Run(Path("run"), {}, [record("a\n\x1b", True, True, base=bare, answer=bare, margin=None)])
    assert listing(run, "all").splitlines()[0] == \
        "a \\x1b  adapted   u     -      ? -> ?      no gold answer"
    assert len(listing(run, "fixed").splitlines()) == len(listing(run, "harmed").splitlines()) == 1


def test_of_two_runs_is_told_what_differs_sample_by_sample():
    others = [RECORDS[0], replace(RECORDS[1], margin=0.25, pairs=[]),
              replace(RECORDS[3], answer=RIGHT), replace(RECORDS[4], seconds={}), record("f", 0, 1)]
    one, other = Run(Path("one"), CONFIG, RECORDS), Run(Path("other"), CONFIG, others)
    assert difference(one, other, "all").splitlines() == [
        "b: margin, pairs", "  1  adapted   u 0.500  right -> wrong  wrong name: g for f",
        "  2  adapted   u 0.250  right -> wrong  wrong name: g for f",
        "d: answer", "  1  no pair   u 0.500  wrong -> wrong  wrong name: g for f",
        "  2  no pair   u 0.500  wrong -> right  wrong name: g for f",
        "1 = one, 2 = other: all: 2 samples differ; in one run alone: 2"]
    assert [line[0] for line in difference(one, other, "fixed").splitlines()] == list("d  1")
    assert "0 samples differ; in one run alone: 0" in difference(one, one, "all")


# --- The program ----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, said", [
    ([], "+20.0"), (["--markdown"], "| run"), (["--sample", "a"], "run\n    sample  a: adapted"),
    (["--sample", "a", "b"], "sample  b: adapted"), (["--list", "harmed"], "harmed: 1 of 5"),
    (["--json"], json.dumps(summarise(RECORDS), indent=2).replace("\n", "\n  "))])
def test_the_program_tells_what_is_asked_for_and_skips_the_kept_stages(folder, capsys, flags, said):
    stages = folder.with_name("stages")
    stages.mkdir()
    assert main([str(folder), str(stages), *flags]) == 0 and said in capsys.readouterr().out


@pytest.mark.parametrize("name, flags, said", [
    ("none\x1b", [], "a run folder of train.py?"),
    ("run", ["--sample", "z"], "no sample 'z'; it has a, b, c")])
def test_a_users_mistake_is_one_line_and_code_2(folder, capsys, name, flags, said):
    assert main([str(folder.with_name(name)), *flags]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("evaluate.py: error: ") and error.endswith("\n")
    assert said in error and error[:-1].isprintable()


def test_what_is_no_run_beside_a_run_is_passed_over_and_named(folder, capsys):
    for name in ("stages", "notes"):
        folder.with_name(name).mkdir()
    folder.with_name("a.txt").write_text("")
    assert main(list(map(str, folder.parent.iterdir()))) == 0
    out, error = capsys.readouterr()
    assert "+20.0" in out and "stages" not in error
    assert error.count("passed over, it is no run folder") == 2 and "notes" in error
    (folder / "config.json").unlink()                       # a run that has lost a file is none
    assert main(list(map(str, folder.parent.iterdir()))) == 2
    assert "config.json: is " in capsys.readouterr().err
    assert main([str(folder.with_name("notes"))]) == 2      # nor is there a table of no run


def test_two_runs_differ_or_each_is_listed(folder, capsys):
    assert main([str(folder), str(folder), "--list", "all"]) == 0
    assert "0 samples differ" in capsys.readouterr().out
    assert main([*[str(folder)] * 3, "--list", "fixed"]) == 0
    assert capsys.readouterr().out.count("fixed: 2 of 5 samples") == 3


@pytest.mark.parametrize("flags", [["--list", "all"], ["--sample", "a"]])
def test_a_reader_that_has_read_enough_is_no_error(folder, flags):
    read, write = os.pipe()
    os.close(read)                                          # as `| head` leaves it
    process = subprocess.run([sys.executable, ROOT / "evaluate.py", folder, *flags], stdout=write,
                             stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONUNBUFFERED": ""})
    os.close(write)
    assert (process.returncode, process.stderr) == (0, "")
