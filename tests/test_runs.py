"""Runs that can be trusted: what is kept is not computed again, a run may be killed at any byte,
several processes find what one finds, and what a user can mend is one sentence."""
import json
import multiprocessing
import random
import shutil
import signal
import socket
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import data
import train
from data import Sample
from evaluate import read_run
from train import Config, Kept, Stage, choose, main, self_improve

FORKS = multiprocessing.get_context("forkserver")       # whose children need not import torch again
FORKS.set_forkserver_preload(["pytest", "torch._dynamo", "train"])
BUNDLED = Path(data.__file__).parent / "samples" / "toolalpaca.json"


@pytest.fixture(scope="session")
def file(tmp_path_factory) -> str:
    """Three of the bundled samples, for which the model soon writes a pair."""
    items, path = json.loads(BUNDLED.read_text()), tmp_path_factory.mktemp("data") / "three.json"
    path.write_text(json.dumps([items[i] for i in (8, 3, 2)]))
    return str(path)


def options(folder: Path, file: str, **changes) -> dict:
    return {"bench": "toolalpaca", "data": file, "model": "tiny", "device": "cpu", "tau": 1.0,
            "pair": "joint", "epochs": 1, "max_new_tokens": 16, "out": str(folder / "run"), **changes}


def flags(folder: Path, file: str, **changes) -> list[str]:
    return [text for name, value in options(folder, file, **changes).items()
            for text in (f"--{name.replace('_', '-')}", str(value))]


PROGRAM = """
import os, resource, socket, sys, train
sys.stdout = sys.stderr = open({log!r}, "a", buffering=1)
{before}
sys.exit(train.main({argv!r}))
"""


def start(folder: Path, argv: list[str], before: str = ""):
    """The program in a process of its own, which runs the line `before` first."""
    code = PROGRAM.format(log=str(folder / "log"), before=before, argv=argv)
    process = FORKS.Process(target=exec, args=(code, {}))
    process.start()
    return process


def as_rank(folder: Path, argv: list[str], rank: int):
    """One of two processes, as torchrun starts it."""
    return start(folder, argv, f"os.environ.update(RANK='{rank}', WORLD_SIZE='2')")


def found(folder: Path) -> list[dict]:
    """What a run found out: its records without the seconds."""
    return [asdict(replace(r, seconds={})) for r in read_run(folder / "run").records]


def kept_ids(folder: Path) -> Counter:
    """(stage, sample id) -> how often its line is there whole."""
    ids = Counter()
    for path in folder.glob("stages/*.jsonl"):
        for line in path.read_text().split("\n")[1:-1]:         # behind the last stands what is torn
            ids[path.name[0], json.loads(line)["id"]] += 1
    return ids


@pytest.fixture(scope="module")
def unbroken(file, tmp_path_factory) -> tuple[list[dict], float]:
    """The records of a run that nothing disturbs, and the seconds it takes."""
    folder = tmp_path_factory.mktemp("unbroken")
    start(folder, ["--help"]).join()                    # the first waits until torch is imported
    began = time.perf_counter()
    process = start(folder, flags(folder, file))
    process.join()
    records = found(folder)
    assert process.exitcode == 0 and [r["outcome"] for r in records] == ["adapted"] * 3
    return records, time.perf_counter() - began


# --------------------------------------------------------------------------------- a stage's lines

@dataclass
class Line:
    id: str
    text: str
    seconds: float = 0.0


LETTERS, SAMPLES = Stage("X", Line, ("seed",), ()), [Sample(id, (), ()) for id in "abcd"]


def letters(folder: Path, **changes) -> tuple[dict[str, str], str]:
    """The letters' texts, and the ids of those that were computed now, one at a time."""
    kept, computed = Kept(Config(bench="sealtool", out=str(folder / "run"), **changes), {}), []

    def compute(samples):
        computed.extend(x.id for x in samples)
        return [Line(x.id, f"{x.id} ü\n") for x in samples]
    lines = [kept(LETTERS, [x], compute)[x.id] for x in SAMPLES]
    return {line.id: line.text for line in lines}, "".join(computed)


def test_a_line_is_computed_once_and_the_first_line_tells_what_it_depends_on(tmp_path):
    assert letters(tmp_path) == ({x: f"{x} ü\n" for x in "abcd"}, "abcd")
    assert letters(tmp_path)[1] == letters(tmp_path, tau=0.5)[1] == ""
    assert letters(tmp_path, seed=1)[1] == letters(tmp_path, fresh=True)[1] == "abcd"
    assert letters(tmp_path)[1] == letters(tmp_path, seed=1)[1] == ""
    keys = [json.loads(path.read_text().splitlines()[0])["key"] for path in
            tmp_path.glob("stages/X-sealtool-*.jsonl")]
    assert sorted(key["seed"] for key in keys) == [0, 1] and keys[0]["stage"] == "X"


def test_a_model_may_have_any_name(tmp_path):
    for model in ("my [1] model", "*", "a?", "ü"):
        assert [letters(tmp_path, model=model)[1] for _ in range(2)] == ["abcd", ""]


def test_a_file_that_was_cut_at_any_byte_costs_the_lines_that_are_not_whole(tmp_path, capsys):
    whole, _ = letters(tmp_path)
    path, = tmp_path.glob("stages/*.jsonl")
    content = path.read_bytes()
    for cut in range(len(content)):
        folder = tmp_path / str(cut)
        (folder / "stages").mkdir(parents=True)
        (folder / "stages" / path.name).write_bytes(content[:cut])
        lines = content[:cut].split(b"\n")[1:]              # of which the last may be torn
        torn = bool(lines and lines[-1]) and content[cut:cut + 1] != b"\n"
        left = "abcd"[sum(map(bool, lines)) - torn:]
        capsys.readouterr()
        assert letters(folder) == (whole, left)
        assert ("is torn" in capsys.readouterr().out) == torn
        assert letters(folder) == (whole, "")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=30) | st.sampled_from(
    [b"[]", b"7", b"{}", b'{"id": "a"}', b'{"id": [], "text": ""}']), max_size=5))
def test_rubbish_among_the_lines_is_skipped(tmp_path_factory, rubbish):
    folder = tmp_path_factory.mktemp("rubbish")
    letters(folder)
    path, = folder.glob("stages/*.jsonl")
    path.write_bytes(path.read_bytes() + b"\n".join(rubbish))
    assert letters(folder) == ({x: f"{x} ü\n" for x in "abcd"}, "")


DEPENDS = {     # an option or fact -> the stages whose lines depend on it; a new one has to be put here
    **dict.fromkeys("samples weights max_new_tokens".split(), "HGT"),
    **dict.fromkeys("writer k pair temperature top_p seed".split(), "GT"),
    **dict.fromkeys("adapt rank alpha epochs lr".split(), "T"),
    # what says where things are and how to run them; data, model and teacher have their digests
    **dict.fromkeys("""bench data model method teacher teacher_model limit tau batch checkpointing
        out device dtype pack offline fresh torch python""".split(), "")}


@pytest.mark.parametrize("name", DEPENDS)
def test_a_stage_is_kept_anew_exactly_when_something_that_it_depends_on_changes(name):
    known = dict.fromkeys(DEPENDS, "as it was")
    other = {**known, name: "another"}
    stages = train.H, train.G, train.T
    assert "".join(s.name for s in stages if s.key(known) != s.key(other)) == DEPENDS[name]


def test_each_option_stands_in_the_table_and_other_code_is_another_file(tmp_path, file):
    agent, _ = train.set_up(choose(Config(**options(tmp_path, file))))
    assert set(DEPENDS) == {f.name for f in fields(Config)} | set(agent.facts)
    known = dict.fromkeys(DEPENDS, "as it was")
    edited = replace(train.H, code=(train.assess,))
    assert edited.key(known) != train.H.key(known)
    assert replace(train.G, after=edited).key(known) != train.G.key(known)


# ----------------------------------------------------------------------------- the same once more

def test_a_second_run_computes_nothing_and_other_options_share_what_they_can(
        tmp_path, file, unbroken):
    config = choose(Config(**options(tmp_path, file, limit=2)))
    agent, samples = train.set_up(config)

    def go(**changes) -> str:
        """Run, and give the stages that were computed."""
        other, before = replace(config, **changes), kept_ids(tmp_path)
        assert train.run(agent, samples, other, Kept(other, agent.facts), self_improve) == 0
        return "".join(sorted({stage for stage, _ in kept_ids(tmp_path) - before}))

    assert go() == "GHT" and found(tmp_path) == unbroken[0][:2]
    records = (tmp_path / "run" / "records.jsonl").read_bytes()
    def never(*_): raise AssertionError("the model was called")
    handle = agent.model.register_forward_pre_hook(never)
    assert go() == go(tau=0.5) == go(tau=0.0) == go(method="base") == ""
    assert go() == "" and (tmp_path / "run" / "records.jsonl").read_bytes() == records
    handle.remove()
    assert go(lr=1e-3) == "T" and go(max_new_tokens=15) == "GHT"


def test_fresh_forgets_what_is_kept(tmp_path, file, unbroken):
    for path in ("as it was", "fresh"):
        extra = ["--fresh"] if path == "fresh" else []
        assert main([*flags(tmp_path, file, limit=1), *extra]) == 0
        stages = {p.name: p.read_bytes() for p in tmp_path.glob("stages/*")}
        assert len(stages) == 3 and found(tmp_path) == unbroken[0][:1]
        before = stages if path == "as it was" else before
    assert not set(stages) & set(before)


def test_a_run_folder_holds_what_others_rely_on(tmp_path, file, capsys):
    assert main(flags(tmp_path, file, limit=1, method="base")) == 0
    record, = [json.loads(x) for x in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert {"id", "request", "margin", "uncertain", "outcome", "candidates", "base", "answer",
            "pairs", "rejected", "losses", "norms", "seconds", "tokens", "gold", "reachable",
            "log_p", "entropy", "ids", "prompt_tokens", "extra"} == set(record)
    assert {"text", "exact", "reason"} <= set(record["base"]) & set(record["answer"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["max_new_tokens"] == 16 and {"weights", "samples", "torch"} <= set(config["facts"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"n", "uncertain", "base_accuracy", "accuracy", "fixed", "harmed"} <= set(summary)
    printed = capsys.readouterr().out
    assert "real samples" in printed and "fixed" in printed and "evaluate.py" in printed


def test_the_runs_name_holds_what_is_not_the_default():
    def name(**changes): return choose(Config(model="tiny", device="cpu", **changes)).out
    assert name() == "runs/nexusraven-tiny-ttsi-s0"
    assert name(tau=0.5, seed=3, adapt="suffix") == (
        "runs/nexusraven-tiny-ttsi-tau=0.5-adapt=suffix-s3")
    assert len({name(), name(lr=0.1), name(k=2), name(limit=4), name(pair="joint")}) == 5
    assert name(fresh=True, batch=4, offline=True) == name() and name(out="here") == "here"


# ------------------------------------------------------------------------------ killed, interrupted

def test_a_run_killed_at_twenty_random_moments_ends_as_if_nothing_had_happened(
        tmp_path, file, unbroken):
    records, seconds = unbroken[0][:2], unbroken[1]
    moments, killed, folder = random.Random(0), 0, tmp_path / "0"
    while killed < 20:
        folder.mkdir(exist_ok=True)
        process = start(folder, flags(folder, file, limit=2))
        process.join(moments.uniform(0.1, 0.5) * seconds)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
        else:                                   # it was faster: again from the start
            assert process.exitcode == 0 and found(folder) == records
            folder = tmp_path / str(killed)
    folder.mkdir(exist_ok=True)
    assert main(flags(folder, file, limit=2)) == 0 and found(folder) == records


def test_two_processes_find_what_one_finds(tmp_path, file, unbroken):
    processes = [as_rank(tmp_path, flags(tmp_path, file), rank) for rank in (0, 1)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert found(tmp_path) == unbroken[0] and set(kept_ids(tmp_path).values()) == {1}


def test_if_one_of_two_processes_is_killed_nothing_that_is_finished_is_lost(
        tmp_path, file, unbroken):
    first, second = [as_rank(tmp_path, flags(tmp_path, file), rank) for rank in (0, 1)]
    while len(list(tmp_path.glob("stages/H-*"))) < 2:
        assert second.is_alive()
        time.sleep(0.01)
    second.kill()
    first.join()
    finished = kept_ids(tmp_path)
    assert first.exitcode == 0 and not (tmp_path / "run").exists()      # it was not the last one
    assert "another process" in (tmp_path / "log").read_text()
    assert main(flags(tmp_path, file)) == 0 and found(tmp_path) == unbroken[0]
    assert set(kept_ids(tmp_path).values()) == {1} and finished <= kept_ids(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_tells_what_is_finished_and_goes_on(
        tmp_path, file, unbroken, capsys, number):
    config, handlers = choose(Config(**options(tmp_path, file))), []
    for name in (signal.SIGINT, signal.SIGTERM):
        handlers.append((name, signal.getsignal(name)))
    agent, samples = train.set_up(config)

    def interrupted(agent, batch, config, kept):
        if batch[0].id == samples[2].id:
            signal.raise_signal(number)
        return self_improve(agent, batch, config, kept)
    assert train.run(agent, samples, config, Kept(config, agent.facts), interrupted) == 130
    assert "after 2" in capsys.readouterr().out and found(tmp_path) == unbroken[0][:2]
    assert train.run(agent, samples, config, Kept(config, agent.facts), self_improve) == 0
    assert found(tmp_path) == unbroken[0]
    for name, handler in handlers:
        signal.signal(name, handler)


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, file, unbroken):
    process = start(tmp_path, flags(tmp_path, file),
                    "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))")
    process.join()
    said = (tmp_path / "log").read_text().splitlines()[-1]
    assert process.exitcode == 2 and said.startswith("error: ") and "File too large" in said
    assert kept_ids(tmp_path)[("H", "toolalpaca-0")] == 1
    assert main(flags(tmp_path, file)) == 0 and found(tmp_path) == unbroken[0]


# ------------------------------------------------------------------------------------------ errors

OFFLINE = """
def blocked(*_, **__): raise AssertionError("a socket was opened")
socket.socket = socket.create_connection = socket.getaddrinfo = blocked"""


@pytest.mark.parametrize("changes, code, said", [
    ({}, 0, "evaluate.py"), ({"model": "nobody/nothing"}, 2, "nobody/nothing"),
    ({"data": ""}, 2, "offline")])
def test_offline_opens_no_socket(tmp_path, file, changes, code, said):
    argv = flags(tmp_path, file, **{"limit": 1, "method": "base", **changes})
    before = f"{OFFLINE}\nos.environ.update(XDG_CACHE_HOME={str(tmp_path)!r}, TTSI_DATA='')"
    if changes.get("data") == "":               # the bundled model, but as one of the user's own
        argv[argv.index("tiny")] = str(BUNDLED.parent.parent / "tiny")
    process = start(tmp_path, [*argv, "--offline"], before)
    process.join()
    assert process.exitcode == code and said in (tmp_path / "log").read_text()


def item(**changes) -> str:
    tool = {"name": "f", "description": "", "parameters": {}}
    return json.dumps([{"query": "hi", "tools": [tool], "answers": [], **changes}])


FILES = {"BROKEN": "[{", "VOID": "[]", "LONG": item(query="word " * 3000), "SHORT": item(),
         "ODD": item(tools=[{"name": "\x1b[2Jf", "description": "", "parameters": {"x": 5}}])}


@pytest.mark.parametrize("bad, said", [
    ({"tau": 1.5}, "--tau 1.5"), ({"tau": "nan"}, "--tau nan"), ({"k": 0}, "--k 0"),
    ({"lr": -1}, "--lr -1"), ({"alpha": "inf"}, "--alpha inf"), ({"top_p": 0}, "--top-p 0"),
    ({"max_new_tokens": 0}, "--max-new-tokens 0"), ({"method": "ttd"}, "--teacher"),
    ({"teacher": "tiny"}, "--method ttd"), ({"method": "ttd", "teacher": "https://x/v1"}, "URL"),
    ({"model": "./nowhere"}, "nowhere"), ({"model": "nobody/nothing", "offline": ""}, "nobody"),
    ({"data": "nowhere.json"}, "nowhere.json"), ({"data": "BROKEN"}, "BROKEN"),
    ({"data": "VOID"}, "VOID"), ({"data": "LONG"}, "exceed the model's context"),
    ({"data": "ODD"}, "\\x1b[2Jf"), ({"device": "nonsense"}, "--device nonsense"),
    ({"out": "FILE/run"}, "FILE")])
def test_a_users_mistake_is_one_sentence_and_code_2(tmp_path, capsys, bad, said):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "FILE").write_text("")
    mistake = {key: str(tmp_path / value) if str(value).split("/")[0] in (*FILES, "FILE") else value
               for key, value in bad.items()}
    argv = [text for text in flags(tmp_path, str(tmp_path / "SHORT"), **mistake) if text]
    assert main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error and "\x1b" not in error
    assert not list(tmp_path.glob("run*"))


def test_an_unknown_bench_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as refused:
        main(["--bench", "nonsense"])
    assert refused.value.code == 2 and "sealtool" in capsys.readouterr().err


def test_a_run_that_changed_the_base_weights_is_not_called_finished(tmp_path, file):
    config = choose(Config(**options(tmp_path, file, limit=1, method="base")))
    agent, samples = train.set_up(config)

    def careless(agent, *rest):
        with torch.no_grad():
            agent.model.model.norm.weight[0] += 1e-3
        return self_improve(agent, *rest)
    with pytest.raises(ValueError, match="base weights have changed"):
        train.run(agent, samples, config, Kept(config, agent.facts), careless)
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_another_writer_whose_pairs_are_kept_apart(tmp_path, file, checkpoint):
    taught = choose(Config(**options(tmp_path, file, method="ttd", teacher=str(checkpoint))))
    (alone, _), (agent, _) = [train.set_up(c) for c in (replace(taught, method="ttsi", teacher=""), taught)]
    assert alone.writer.model is alone.model and agent.writer.model is not agent.model
    assert agent.writer.model.config.hidden_size == 32
    assert agent.facts["weights"] == alone.facts["weights"]
    assert agent.facts["writer"] != alone.facts["writer"]


def test_a_tool_that_is_named_like_a_path_stays_text(tmp_path):
    tool = {"name": "../../escape", "description": "", "parameters": {}}
    (tmp_path / "paths.json").write_text(item(tools=[tool]))
    folder = tmp_path / "a" / "b"
    assert main(flags(folder, str(tmp_path / "paths.json"))) == 0
    written = [p for p in tmp_path.rglob("*") if p.is_file() and folder not in p.parents]
    assert written == [tmp_path / "paths.json"]
