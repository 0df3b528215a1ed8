"""Runs that can be trusted: what is kept is not computed again, a run may be killed at any byte,
several processes find what one finds, and what a user can mend is one sentence."""
import json
import multiprocessing
import random
import signal
import time
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

import train
from augment import Found
from data import Sample
from evaluate import read_run
from train import TINY, Agent, Config, Kept, Stage, choose, main, self_improve

FORKS = multiprocessing.get_context("forkserver")       # its children have imported torch already
FORKS.set_forkserver_preload(["pytest", "torch._dynamo", "train"])
OPTIONS = {"bench": "apibank", "data": "bundled", "limit": 3, "model": "tiny", "device": "cpu",
           "tau": 1.0, "epochs": 1, "max_new_tokens": 16}   # a pair is found for each of the three


def argv(folder: Path, **changes) -> list[str]:
    given = {**OPTIONS, "out": folder / "run", **changes}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


PROGRAM = """
import os, socket, sys, train
sys.stdout = sys.stderr = open({log!r}, "a", buffering=1)
{before}
sys.exit(train.main({argv!r}))
"""


def start(folder: Path, argv: list[str], before: str = ""):
    """The program in a process of its own, which runs the lines `before` first."""
    code = PROGRAM.format(log=str(folder / "log"), before=before, argv=argv)
    process = FORKS.Process(target=exec, args=(code, {}))
    process.start()
    return process


@pytest.fixture(scope="module")
def loaded() -> tuple[Agent, list[Sample]]:
    return train.set_up(choose(Config(**OPTIONS)))


def run(loaded, folder: Path, improve=self_improve, **changes) -> int:
    """The program in this process, from a model that is loaded already."""
    agent, samples = loaded
    config = choose(Config(**{**OPTIONS, "out": str(folder / "run"), **changes}))
    return train.run(agent, samples[:config.limit], config, Kept(config, agent.facts), improve)


def found(folder: Path) -> list[dict]:
    """What a run found out: its records without the seconds."""
    return [asdict(replace(record, seconds={})) for record in read_run(folder / "run").records]


def kept(folder: Path) -> Counter:
    """(stage, sample id) -> how often its line is there whole."""
    ids = Counter()
    for path in folder.glob("stages/*.jsonl"):
        for line in path.read_text().split("\n")[1:-1]:     # what follows the last may be torn
            ids[path.name[0], json.loads(line)["id"]] += 1
    return ids


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[list[dict], float]:
    """The records of a run that nothing disturbs, and the seconds it takes."""
    folder = tmp_path_factory.mktemp("unbroken")
    start(folder, ["--help"]).join()                    # the first waits until torch is imported
    began, process = time.perf_counter(), start(folder, argv(folder))
    process.join()
    records = found(folder)
    assert process.exitcode == 0 and [r["outcome"] for r in records] == ["adapted"] * 3
    return records, time.perf_counter() - began


# --------------------------------------------------------------------------------- a stage's lines

LETTERS, SAMPLES = Stage("X", Found, ("seed",), ()), [Sample(id, (), ()) for id in "abcd"]


def letters(folder: Path, **changes) -> str:
    """The letters whose lines were not there and are computed now, one at a time."""
    lines, computed = Kept(Config(out=str(folder / "run"), model="a [1] * ü?", **changes), {}), []

    def compute(samples):
        computed.extend(x.id for x in samples)
        return [Found(x.id, texts=[f"{x.id} ü\n"]) for x in samples]
    for x in SAMPLES:
        assert lines(LETTERS, [x], compute)[x.id].texts == [f"{x.id} ü\n"]
    return "".join(computed)


def test_a_line_is_computed_once_for_what_it_depends_on(tmp_path):
    assert letters(tmp_path) == "abcd" and letters(tmp_path) == letters(tmp_path, tau=0.5) == ""
    assert letters(tmp_path, seed=1) == letters(tmp_path, fresh=True) == "abcd"
    assert letters(tmp_path) == letters(tmp_path, seed=1) == ""


def test_a_file_that_was_cut_at_any_byte_costs_the_lines_that_are_not_whole(tmp_path, capsys):
    letters(tmp_path)
    path, = tmp_path.glob("stages/*.jsonl")
    content = path.read_bytes()
    for cut in range(len(content)):
        folder = tmp_path / str(cut)
        (folder / "stages").mkdir(parents=True)
        (folder / "stages" / path.name).write_bytes(content[:cut])
        lines = content[:cut].split(b"\n")[1:]              # of which the last may be torn
        torn = any(lines[-1:]) and content[cut:cut + 1] != b"\n"
        capsys.readouterr()
        assert letters(folder) == "abcd"[sum(map(bool, lines)) - torn:]
        assert ("is torn" in capsys.readouterr().out) == torn
        assert letters(folder) == ""
    path.write_bytes(content + b'[]\n7\n\xff\n{}\n{"id": "a", "text": ""}\n{"id": []}\n{')
    assert letters(tmp_path) == ""                          # nor does rubbish cost anything


DEPENDS = {     # an option or fact -> the stages whose lines depend on it; put a new one here, too
    **dict.fromkeys("samples weights tokenizer max_new_tokens".split(), "HGT"),
    **dict.fromkeys("writer k pair temperature top_p seed".split(), "GT"),
    **dict.fromkeys("adapt rank alpha epochs lr".split(), "T"),
    # what says where things are, and how to run them; data, model and teacher have their digests
    **dict.fromkeys("""bench data model method teacher teacher_model limit tau batch checkpointing
        out device dtype pack offline fresh torch python""".split(), "")}


def test_lines_are_kept_apart_exactly_where_something_that_they_depend_on_differs(loaded):
    assert set(DEPENDS) == {f.name for f in fields(Config)} | set(loaded[0].facts)
    known, stages = dict.fromkeys(DEPENDS, "as it was"), (train.H, train.G, train.T)
    for name, expected in DEPENDS.items():
        other = {**known, name: "another"}
        assert "".join(s.name for s in stages if s.key(known) != s.key(other)) == expected, name
    edited = replace(train.H, code=(train.assess,))             # other code is another file
    assert edited.key(known) != train.H.key(known)
    assert replace(train.G, after=edited).key(known) != train.G.key(known)


# ----------------------------------------------------------------------------- the same once more

def test_a_second_run_computes_nothing_and_other_options_share_what_they_can(
        tmp_path, loaded, unbroken):
    def computed(**changes) -> str:
        before = kept(tmp_path)
        assert run(loaded, tmp_path, limit=2, **changes) == 0
        return "".join(sorted({stage for stage, _ in kept(tmp_path) - before}))

    assert computed() == "GHT" and found(tmp_path) == unbroken[0][:2]
    records = (tmp_path / "run" / "records.jsonl").read_bytes()
    def never(*_): raise AssertionError("the model was called")
    with loaded[0].model.register_forward_pre_hook(never):
        assert computed(tau=0.5) == computed(tau=0.0) == computed(method="base") == computed() == ""
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == records
    assert computed(lr=1e-3) == "T" and computed(max_new_tokens=15) == "GHT"


def test_the_runs_name_holds_what_is_not_the_default():
    def name(**changes): return choose(Config(model="tiny", device="cpu", **changes)).out
    assert name(fresh=True, batch=4, offline=True) == name() == "runs/nexusraven-tiny-ttsi-s0"
    assert name(tau=0.5, adapt="suffix", seed=3) == (
        "runs/nexusraven-tiny-ttsi-tau=0.5-adapt=suffix-s3")


def test_a_teacher_is_another_writer_whose_pairs_are_kept_apart(loaded, checkpoint):
    config = choose(Config(**OPTIONS, method="ttd", teacher=str(checkpoint)))
    (taught, _), (alone, _) = train.set_up(config), loaded
    assert alone.writer.model is alone.model and taught.writer.model.config.hidden_size == 32
    assert taught.facts["weights"] == alone.facts["weights"]
    assert taught.facts["writer"] != alone.facts["writer"]


# ----------------------------------------------------------------------------- killed, interrupted

def test_a_run_killed_at_twenty_random_moments_ends_as_if_nothing_had_happened(
        tmp_path, loaded, unbroken):
    (records, seconds), moments, killed, folder = unbroken, random.Random(0), 0, tmp_path / "0"
    while killed < 20:
        folder.mkdir(exist_ok=True)
        process = start(folder, argv(folder, limit=2))
        process.join(moments.uniform(0.1, 0.4) * seconds)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
        else:                                   # it was faster: again from the start
            assert process.exitcode == 0 and found(folder) == records[:2]
            folder = tmp_path / str(killed)
    assert run(loaded, folder, limit=2) == 0 and found(folder) == records[:2]


def test_two_processes_find_what_one_finds_also_after_one_was_killed(tmp_path, unbroken):
    """Nothing that was finished is lost or computed twice."""
    def two() -> list:
        """Two processes that share a run, as torchrun starts them."""
        return [start(tmp_path, argv(tmp_path), f"os.environ.update(RANK='{rank}', WORLD_SIZE='2')")
                for rank in (0, 1)]
    first, second = two()
    while len(list(tmp_path.glob("stages/H-*"))) < 2:       # both have begun
        assert second.is_alive()
        time.sleep(0.01)
    second.kill()
    first.join()
    finished = kept(tmp_path)
    assert first.exitcode == 0 and not (tmp_path / "run").exists()
    assert "with other processes" in (tmp_path / "log").read_text()
    for process in two():
        process.join()
        assert process.exitcode == 0
    assert found(tmp_path) == unbroken[0]
    assert set(kept(tmp_path).values()) == {1} and finished <= kept(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_tells_what_is_finished_and_goes_on(
        tmp_path, loaded, unbroken, capsys, number):
    def interrupted(agent, batch, config, kept):
        assert not batch[0].answers             # the method is not even shown the labels
        if batch[0].id == "apibank-2":
            signal.raise_signal(number)
        return self_improve(agent, batch, config, kept)
    assert run(loaded, tmp_path, interrupted) == 130 and found(tmp_path) == unbroken[0][:2]
    assert "the same command goes on" in capsys.readouterr().out
    assert run(loaded, tmp_path) == 0 and found(tmp_path) == unbroken[0]


def test_what_the_memory_does_not_hold_keeps_its_answer_is_counted_and_is_tried_again(
        tmp_path, loaded, unbroken, capsys):
    def full(module, args):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    with loaded[0].model.register_forward_pre_hook(full):
        assert run(loaded, tmp_path) == 0
    for record in found(tmp_path):
        assert record["outcome"] == "out of memory" and record["answer"] == record["base"]
    assert "out of memory, the direct answer stands: 3" in capsys.readouterr().out
    assert run(loaded, tmp_path) == 0 and found(tmp_path) == unbroken[0]


# ------------------------------------------------------------------------------------------ errors

OFFLINE = """
def blocked(*_, **__): raise AssertionError("a socket was opened")
socket.socket = socket.create_connection = socket.getaddrinfo = blocked
os.environ.update(XDG_CACHE_HOME="/nowhere", TTSI_DATA="")"""


@pytest.mark.parametrize("changes, code, said", [
    ({}, 0, "Next:"), ({"model": "nobody/nothing"}, 2, "nobody/nothing"),
    ({"model": TINY, "data": ""}, 2, "/nowhere/ttsi/apibank_l1.json")])
def test_offline_opens_no_socket(tmp_path, changes, code, said):
    given = argv(tmp_path, **{"limit": 1, "method": "base", **changes})
    process = start(tmp_path, [*given, "--offline"], OFFLINE)
    process.join()
    assert process.exitcode == code and said in (tmp_path / "log").read_text()


ITEM = '[{"query": "%s", "tools": [{"name": "%s", "parameters": {%s}}], "answers": []}]'
FILES = {"VOID": "[]", "LONG": ITEM % ("word " * 3000, "f", ""),
         "ODD": ITEM % ("hi", r"\u001b[2Jf", '"x": 5')}


@pytest.mark.parametrize("bad, said", [
    ({"tau": 1.5}, "--tau 1.5"), ({"tau": "nan"}, "--tau nan"), ({"k": 0}, "--k 0"),
    ({"lr": -1}, "--lr -1"), ({"alpha": "inf"}, "--alpha inf"), ({"top_p": 0}, "--top-p 0"),
    ({"max_new_tokens": 0}, "--max-new-tokens 0"), ({"method": "ttd"}, "--teacher"),
    ({"teacher": "tiny"}, "--method ttd"), ({"method": "ttd", "teacher": "https://x/v1"}, "URL"),
    ({"model": "./nowhere"}, "nowhere"), ({"device": "nonsense"}, "--device nonsense"),
    ({"data": "nowhere.json"}, "nowhere.json"), ({"data": "VOID"}, "VOID"),
    ({"data": "ODD"}, "\\x1b[2Jf"), ({"data": "LONG"}, "exceed the model's context"),
    ({"out": "VOID/run"}, "VOID")])
def test_a_users_mistake_is_one_sentence_and_code_2(tmp_path, capsys, monkeypatch, bad, said):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_text(content)
    assert main(argv(tmp_path, **bad)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error and "\x1b" not in error
    assert not list(tmp_path.glob("run*"))


def test_a_run_that_changed_the_base_weights_is_not_called_finished(tmp_path, loaded):
    agent, samples = loaded
    other = replace(agent, facts={**agent.facts, "weights": "as they were at the start"})
    with pytest.raises(ValueError, match="base weights have changed"):
        run((other, samples), tmp_path, method="base")
    assert not (tmp_path / "run").exists()
