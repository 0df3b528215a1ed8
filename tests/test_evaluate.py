"""What a run comes to: the numbers of a run folder, the table, and one sample's story."""
import itertools
import json
import math

import pytest
import torch
from scipy import stats

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
    text = table(evaluate.read_runs([folder]))
    assert "+20.0" in text and "40.0" in text and "60.0" in text and "66.37 -> 72.43" in text


def test_bundled_samples_are_never_set_beside_the_papers_figures(folder):
    (folder / "config.json").write_text(json.dumps({"bench": "sealtool", "data": "bundled", "tau": 0.95}))
    assert "bundled samples" in table(evaluate.read_runs([folder])) and "66.37" not in table(evaluate.read_runs([folder]))


def test_what_no_method_can_reach_is_said(folder):
    (folder / "records.jsonl").write_text(json.dumps(record("a", False, False) | {"reachable": False}) + "\n")
    assert "at most 0.0% can be reached" in table(evaluate.read_runs([folder]))


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


# ------------------------------------------------------------------------------------------------ is a gain real?

@pytest.mark.parametrize("right, n", [(0, 10), (10, 10), (3, 10), (57, 114), (1, 1)])
def test_wilson_is_scipys(right, n):
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert evaluate.wilson(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


@pytest.mark.parametrize("fixed, harmed", [(0, 0), (1, 0), (5, 0), (6, 1), (3, 3), (2, 9), (20, 11)])
def test_mcnemar_is_the_exact_binomial_test(fixed, harmed):
    theirs = stats.binomtest(fixed, fixed + harmed).pvalue if fixed + harmed else 1.0
    assert evaluate.mcnemar(fixed, harmed) == pytest.approx(theirs, abs=1e-12)


def test_holm_by_hand():
    assert evaluate.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evaluate.holm([0.5, 0.9]) == [1.0, 1.0] and evaluate.holm([]) == []


@pytest.mark.parametrize("n, points", [(114, 10.2), (294, 6.3), (526, 4.7), (1252, 3.1), (20, 39.2)])
def test_the_smallest_gain_that_can_be_found(n, points):
    """By the normal approximation; a gain is never larger than the share of the answers that change."""
    assert 100 * evaluate.detectable(n) == pytest.approx(points, abs=0.06)


@pytest.mark.parametrize("k, drawn, right", [(1, 5, 2), (2, 5, 2), (5, 5, 1), (3, 6, 0), (2, 4, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(k, drawn, right):
    subsets = list(itertools.combinations([True] * right + [False] * (drawn - right), k))
    assert evaluate.pass_at(k, drawn, right) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_the_nested_bootstrap_has_the_spread_of_the_samples_and_of_the_seeds():
    gain = torch.tensor([[1, 0] * 100])                                     # SD of the mean of n = 200: 0.5 / sqrt(200)
    means = evaluate.nested_bootstrap(gain)
    assert means.mean().item() == pytest.approx(0.5, abs=0.005) and means.std().item() == pytest.approx(0.5 / 200 ** 0.5, rel=0.1)
    same = evaluate.nested_bootstrap(gain.repeat(5, 1))                     # five times the same seed is no more evidence
    assert same.std().item() == pytest.approx(means.std().item(), rel=0.1)
    assert evaluate.nested_bootstrap(torch.ones(3, 7)).unique().tolist() == [1.0]
    apart = torch.rand(20, 200, generator=torch.Generator().manual_seed(0)).round()         # seeds that are as different as samples
    assert evaluate.nested_bootstrap(apart).std().item() == pytest.approx((0.5 / 4000 ** 0.5) * 2 ** 0.5, rel=0.2)


# -------------------------------------------------------------------------------------------------------- runs compared

def write_run(folder, records, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"bench": "sealtool", "data": "", "model": "Qwen/Qwen2.5-1.5B-Instruct", "method": "ttsi", "gate": "score", "pairs": "self",
                                                    "tau": 0.95, "seed": 0, "offline": True, **config}))
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two seeds of ttsi, and the base with sampled answers."""
    def sampled(right, votes): return {"vote": part(votes), "sampled": [part(i < right) for i in range(5)]}
    second = [RECORDS[0], record("b", True, True, "certain"), *RECORDS[2:4], record("e", False, False)]
    base = [{**record(r["id"], r["base"]["exact"], r["base"]["exact"], "direct"), "pairs": [], "rejected": [], "losses": [], **sampled(i, i > 2)}
            for i, r in enumerate(RECORDS)]
    return [write_run(tmp_path / "s0", RECORDS), write_run(tmp_path / "s1", second, seed=1), write_run(tmp_path / "base", base, method="base")]


def test_seeds_are_one_group_and_its_figures_are_those_by_hand(runs):
    ttsi, base = evaluate.compare(evaluate.grouped(evaluate.read_runs(runs)))
    assert (ttsi["name"], ttsi["n"], ttsi["seeds"], base["name"], base["seeds"]) == ("ttsi", 5, 2, "base", 1)
    assert (ttsi["base"], ttsi["after"]["mean"], ttsi["gain"]["mean"], ttsi["fixed"], ttsi["harmed"]) == (0.4, 0.6, pytest.approx(0.2), 3, 1)
    assert ttsi["after"]["sd"] == 0.0 and math.isnan(base["after"]["sd"])
    assert ttsi["p"] == pytest.approx((evaluate.mcnemar(2, 1) + evaluate.mcnemar(1, 0)) / 2) and ttsi["holm"] == ttsi["p"]
    assert ttsi["interval"][0] < 0.2 < ttsi["interval"][1] and (ttsi["fixed name"], ttsi["fixed format"]) == (3, 0)
    assert (ttsi["uncertain"], ttsi["TPR"], base["acted"], base["TPR"]) == (0.7, 1.0, 0, 0) and math.isnan(base["interval"][0])
    assert (ttsi["paper"], base["paper"]) == (72.43, 66.37)


@pytest.mark.parametrize("one, other", [({"lr": 1e-4}, {"lr": 1e-3}), ({"teacher": "a"}, {"teacher": "b"}), ({"data": "a.json"}, {"data": "b.json"}),
                                        ({"model": "x/m"}, {"model": "y/m"})])
def test_other_settings_are_no_further_seeds_and_a_run_given_twice_is_one(tmp_path, one, other):
    folders = [write_run(tmp_path / "a", RECORDS, **one), write_run(tmp_path / "b", RECORDS, **other)]
    assert [group["seeds"] for group in evaluate.compare(evaluate.grouped(evaluate.read_runs([*folders, folders[0]])))] == [1, 1]


@pytest.mark.parametrize("config, shown", [({}, 72.43), ({"tau": 0.35}, 68.10), ({"gate": "all", "tau": 0.5}, 73.47), ({"gate": "all", "pairs": "gold"}, 78.89),
    ({"tau": 0.5}, None), ({"model": "Qwen/Qwen2.5-0.5B-Instruct"}, None), ({"data": "bundled"}, None), ({"rank": 64}, None), ({"limit": 50}, None), ({"epochs": 1}, None),
    ({"gate_score": "entropy"}, None), ({"adapt": "suffix"}, None), ({"k": 4}, None), ({"bench": "apibank"}, None)])
def test_the_papers_figures_stand_beside_runs_of_its_own_setting_alone(tmp_path, config, shown):
    row, = evaluate.compare(evaluate.grouped(evaluate.read_runs([write_run(tmp_path / "run", RECORDS, **config)])))
    assert row["paper"] == shown if shown else math.isnan(row["paper"])


def test_several_benchmarks_are_corrected_for_and_have_a_mean(tmp_path):
    """All base answers wrong, 6 of 6 and 0 of 2 mended; a run that differs in more than the benchmark is not of the family."""
    six, two = [record(str(i), False, True) for i in range(6)], [record(str(i), False, False) for i in range(2)]
    folders = [write_run(tmp_path / "a", six, lr=1e-4, train_data="a.json"), write_run(tmp_path / "b", two, bench="apibank", lr=1e-4, train_data="b.json"),
               write_run(tmp_path / "c", two, bench="apibank", lr=1e-4, train_data="b.json", k=2)]
    first, second, other, both = evaluate.compare(evaluate.grouped(evaluate.read_runs(folders)))
    assert first["p"] == pytest.approx(2 / 2 ** 6) and first["holm"] == pytest.approx(2 * first["p"]) and other["holm"] == 1.0
    assert (both["bench"], both["n"], both["fixed"], both["net"], both["seeds"]) == ("mean of 2", 8, 6, 6, 1)
    assert (both["base"], both["after"]["mean"], both["gain"]["mean"], both["p"]) == (0.0, 0.5, 0.5, first["p"]) and both["interval"] == (0.5, 0.5)
    assert "mean of 2" in evaluate.report(evaluate.read_runs(folders))


def test_what_not_all_seeds_have_is_left_out_and_told(tmp_path):
    folders = [write_run(tmp_path / "short", RECORDS[:1]), write_run(tmp_path / "long", RECORDS), write_run(tmp_path / "other", RECORDS[1:4], seed=1)]
    row, = evaluate.compare(evaluate.grouped(evaluate.read_runs(folders)))
    assert (row["n"], row["seeds"], row["left out"]) == (3, 2, 2)               # short and long are the same seed
    assert "2 samples that not all of its seeds have" in evaluate.report(evaluate.read_runs(folders))


def test_what_a_method_costs_by_hand(tmp_path):
    """A draw costs what one sampled answer does, 0.2 s, in every row; extra is what acting added."""
    drawn = {**record("a", False, True), "sampled": [part(True)] * 5, "seconds": {"score": 1.0, "base": 0.5, "sampled": 1.0}, "tokens": {"base": 10, "sampled": 50}}
    learnt = {**record("a", False, True), "seconds": {"score": 1.0, "base": 0.5, "pairs": 2.0, "train": 1.0, "answer": 0.6}, "tokens": {"base": 10, "train": 7}}
    runs = evaluate.read_runs([write_run(tmp_path / "vote", [drawn], method="vote"), write_run(tmp_path / "ttsi", [learnt, record("b", True, True, "certain")])])
    vote, ttsi = evaluate.compare(evaluate.grouped(runs))
    assert (vote["extra seconds"], vote["draws"], vote["tokens"]) == (1.0, 5.0, 60)
    assert (ttsi["extra seconds"], ttsi["draws"], ttsi["tokens"], ttsi["seconds"]) == (pytest.approx(3.6), pytest.approx(18.0), 8.5, pytest.approx((5.1 + 1.5) / 2))


def test_runs_that_differ_in_a_path_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / name, RECORDS, teacher=f"https://{name}/v1") for name in "ab"]
    assert [group["name"] for group in evaluate.grouped(evaluate.read_runs(folders))] == ["ttsi teacher https://a/v1", "ttsi teacher https://b/v1"]


def test_votes_and_pass_at_k_by_hand(runs):
    row, = evaluate.votes(evaluate.grouped(evaluate.read_runs(runs)))
    assert row["vote"]["mean"] == pytest.approx(2 / 5)
    assert row["pass@1"]["mean"] == pytest.approx((0 + 1 + 2 + 3 + 4) / 25) and row["pass@5"]["mean"] == pytest.approx(4 / 5)


def test_the_pairs_by_hand(tmp_path):
    pair = {"request": "Is it cold in Oslo?", "calls": [{"name": "f", "arguments": {"city": "Oslo", "n": 5}}], "text": "", "votes": 3}
    records = [{**record("a", False, True), "request": "Is it warm in Rome? 5", "gold": '{"name": "f", "arguments": {"city": "Oslo"}}',
                "base": {**part(False), "text": '{"name": "g", "arguments": {}}'}, "pairs": [pair], "norms": [2.0, 9.0], "kl": 0.5},
               {**record("b", False, True), "pairs": [{**pair, "request": "What?"}]}]
    row, = evaluate.describe_pairs(evaluate.grouped(evaluate.read_runs([write_run(tmp_path / "run", records)])))
    assert (row["pairs"], row["valid"], row["unique"], row["repeats"]) == (2, 0.5, 1.0, 1)      # "What?" is the second's own request
    assert row["ROUGE-L"] == pytest.approx((2 * 3 / 11 + 1) / 2)                                # is it _ in, of 5 and 6 words
    assert (row["copied values"], row["tool as gold"], row["tool as direct"]) == (0.25, 0.5, 0.0)
    assert (row["leaks"], row["largest norm"], row["KL"], row["first loss"], row["last loss"]) == (1, 9.0, 0.5, 0.5, 0.25)


def test_the_report_in_every_form(runs, capsys):
    assert main(list(map(str, runs))) == 0
    text = capsys.readouterr().out
    assert "Gains" in text and "pass@5" in text and "72.43" in text and "Median seconds" in text
    assert main([*map(str, runs), "--markdown"]) == 0
    assert "| bench | run |" in capsys.readouterr().out
    assert main([*map(str, runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["gains"][0]["gain"]["mean"] == pytest.approx(0.2) and len(found["runs"]) == 3


def test_tables_for_a_readme_are_tables_there(runs):
    """A blank line before and after each, else what follows is read as a row."""
    lines = evaluate.report(evaluate.read_runs(runs), markdown=True).splitlines()
    for before, line, after in zip(["", *lines], lines, [*lines[1:], ""]):
        assert line.startswith("|") or not (before.startswith("|") or after.startswith("|")) or not line


def test_a_vote_of_a_few_samples_is_told_of_those_alone(tmp_path):
    few = [{**RECORDS[0], "vote": part(True), "sampled": [part(False), part(True)]}, *RECORDS[1:]]
    runs = evaluate.read_runs([write_run(tmp_path / "run", few, method="vote")])
    assert "of the 1 samples with sampled answers, pass@2 100.0, the majority 100.0" in table(runs)
    all_of_them = [{**r, "vote": part(True), "sampled": [part(i == 0) for i in range(7)]} for r in RECORDS]
    row, = evaluate.votes(evaluate.grouped(evaluate.read_runs([write_run(tmp_path / "all", all_of_them, method="vote")])))
    assert (row["direct"]["mean"], row["vote"]["mean"]) == (0.4, 1.0)           # the direct answers, not the votes
    assert [row[f"pass@{k}"]["mean"] for k in (1, 5, 7)] == pytest.approx([1 / 7, 5 / 7, 1])


@pytest.mark.parametrize("name, flag", [("facts.json", "--verify"), ("config.json", "--verify"), ("config.json", "--rescore")])
@pytest.mark.parametrize("content", ["{}", "[]", "5"])
def test_a_run_folders_file_of_another_shape_is_named(tmp_path, capsys, name, flag, content):
    folder = write_run(tmp_path / "run", RECORDS, limit=0)
    (folder / name).write_text(content)
    assert main([str(folder), flag]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error


def test_rescoring_reads_the_stored_texts_and_writes_nothing(tmp_path, capsys):
    item = {"query": "hi", "tools": [{"name": "f", "description": "", "parameters": {}}], "answers": [{"name": "f", "arguments": {}}]}
    (tmp_path / "data.json").write_text(json.dumps([item]))
    wrong = {**record("sealtool-0", False, False), "answer": part(False, '{"name": "f", "arguments": {}}')}
    folder = write_run(tmp_path / "run", [wrong], data=str(tmp_path / "data.json"), limit=0)
    before = (folder / "records.jsonl").read_bytes()
    assert main([str(folder), "--rescore", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][str(folder)]["accuracy"] == 1.0
    assert (folder / "records.jsonl").read_bytes() == before
    (tmp_path / "data.json").unlink()
    assert main([str(folder), "--rescore"]) == 2 and "data.json" in capsys.readouterr().err


def test_the_mean_of_votes_has_what_all_benchmarks_have(tmp_path):
    def voted(draws, right): return [{**r, "vote": part(right), "sampled": [part(i == 0) for i in range(draws)]} for r in RECORDS]
    folders = [write_run(tmp_path / "a", voted(5, True), method="base"), write_run(tmp_path / "b", voted(3, False), method="base", bench="apibank")]
    *_, both = evaluate.votes(evaluate.grouped(evaluate.read_runs(folders)))
    assert (both["bench"], both["n"], both["vote"]["mean"], both["pass@1"]["mean"]) == ("mean of 2", 10, 0.5, pytest.approx((1 / 5 + 1 / 3) / 2))
    assert "pass@5" not in both and "pass@3" not in both
