"""Runs that can be trusted: what is kept is not computed again, a run may be killed at any byte,
several processes find what one finds, and what a user can mend is one sentence."""
import json
import multiprocessing
import random
import signal
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import train
from data import Sample
from evaluate import read_run
from train import TINY, Agent, Config, Kept, Stage, choose, main, self_improve

FORKS = multiprocessing.get_context("forkserver")       # its children have imported torch already
FORKS.set_forkserver_preload(["pytest", "torch._dynamo", "train"])
OPTIONS = {"bench": "toolalpaca", "model": "tiny", "device": "cpu", "tau": 1.0, "epochs": 1,
           "max_new_tokens": 16}


@pytest.fixture(scope="session")
def file(tmp_path_factory) -> str:
    """Three of the bundled samples, for which the model soon writes a pair."""
    items = json.loads((TINY.parent / "samples" / "toolalpaca.json").read_text())
    path = tmp_path_factory.mktemp("data") / "three.json"
    path.write_text(json.dumps([items[i] for i in (29, 6, 28)]))
    return str(path)


def argv(folder: Path, file: str, **changes) -> list[str]:
    options = {**OPTIONS, "data": file, "out": str(folder / "run"), **changes}
    return [text for name, value in options.items()
            for text in (f"--{name.replace('_', '-')}", str(value))]


PROGRAM = """
import os, resource, socket, sys, train
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
def loaded(file) -> tuple[Agent, list[Sample]]:
    return train.set_up(choose(Config(**OPTIONS, data=file)))


def run(loaded, folder: Path, improve=self_improve, limit: int | None = None, **changes) -> int:
    """The program in this process, from a model that is loaded already."""
    (agent, samples), options = loaded, {**OPTIONS, "out": str(folder / "run"), **changes}
    config = choose(Config(**options))
    return train.run(agent, samples[:limit], config, Kept(config, agent.facts), improve)


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
def unbroken(file, tmp_path_factory) -> tuple[list[dict], float]:
    """The records of a run that nothing disturbs, and the seconds it takes."""
    folder = tmp_path_factory.mktemp("unbroken")
    start(folder, ["--help"]).join()                    # the first waits until torch is imported
    began = time.perf_counter()
    process = start(folder, argv(folder, file))
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
TEXTS = {id: f"{id} ü\n" for id in "abcd"}


def letters(folder: Path, **changes) -> str:
    """The letters whose lines were not there and are computed now, one at a time."""
    lines, computed = Kept(Config(out=str(folder / "run"), **changes), {}), []

    def compute(samples):
        computed.extend(x.id for x in samples)
        return [Line(x.id, TEXTS[x.id]) for x in samples]
    assert {x.id: lines(LETTERS, [x], compute)[x.id].text for x in SAMPLES} == TEXTS
    return "".join(computed)


def test_a_line_is_computed_once_and_the_first_line_tells_what_it_depends_on(tmp_path):
    assert letters(tmp_path) == "abcd" and letters(tmp_path) == letters(tmp_path, tau=0.5) == ""
    assert letters(tmp_path, seed=1) == letters(tmp_path, fresh=True) == "abcd"
    assert letters(tmp_path) == letters(tmp_path, seed=1) == ""
    paths = tmp_path.glob("stages/X-nexusraven-*.jsonl")
    keys = [json.loads(path.read_text().splitlines()[0])["key"] for path in paths]
    assert sorted(key["seed"] for key in keys) == [0, 1] and keys[0]["stage"] == "X"


@pytest.mark.parametrize("model", ["a [1] model", "*", "ü?"])
def test_lines_are_found_again_whatever_the_models_folder_is_called(tmp_path, model):
    assert [letters(tmp_path, model=model), letters(tmp_path, model=model)] == ["abcd", ""]


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


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=30) | st.sampled_from(
    [b"[]", b"7", b"{}", b'{"id": "a"}', b'{"id": [], "text": ""}']), max_size=5))
def test_rubbish_among_the_lines_is_skipped(tmp_path_factory, rubbish):
    folder = tmp_path_factory.mktemp("rubbish")
    letters(folder)
    path, = folder.glob("stages/*.jsonl")
    path.write_bytes(path.read_bytes() + b"\n".join(rubbish))
    assert letters(folder) == ""


DEPENDS = {     # an option or fact -> the stages whose lines depend on it; put a new one here, too
    **dict.fromkeys("samples weights tokenizer max_new_tokens".split(), "HGT"),
    **dict.fromkeys("writer k pair temperature top_p seed".split(), "GT"),
    **dict.fromkeys("adapt rank alpha epochs lr".split(), "T"),
    # what says where things are, and how to run them; data, model and teacher have their digests
    **dict.fromkeys("""bench data model method teacher teacher_model limit tau batch checkpointing
        out device dtype pack offline fresh torch python""".split(), "")}


@pytest.mark.parametrize("name", DEPENDS)
def test_lines_are_kept_apart_exactly_where_something_that_they_depend_on_differs(name):
    known, stages = dict.fromkeys(DEPENDS, "as it was"), (train.H, train.G, train.T)
    other = {**known, name: "another"}
    assert "".join(s.name for s in stages if s.key(known) != s.key(other)) == DEPENDS[name]


def test_each_option_stands_in_the_table_and_other_code_is_another_file(loaded):
    assert set(DEPENDS) == {f.name for f in fields(Config)} | set(loaded[0].facts)
    known, edited = dict.fromkeys(DEPENDS, ""), replace(train.H, code=(train.assess,))
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
    handle = loaded[0].model.register_forward_pre_hook(never)
    assert computed(tau=0.5) == computed(tau=0.0) == computed(method="base") == computed() == ""
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == records
    handle.remove()
    assert computed(lr=1e-3) == "T" and computed(max_new_tokens=15) == "GHT"


def test_a_run_whose_files_were_cut_at_random_bytes_ends_the_same(tmp_path, loaded, unbroken):
    draw = random.Random(0)
    for _ in range(3):
        assert run(loaded, tmp_path, limit=2) == 0 and found(tmp_path) == unbroken[0][:2]
        path = draw.choice(sorted(tmp_path.glob("stages/*")))
        path.write_bytes(path.read_bytes()[:draw.randrange(path.stat().st_size)])
    assert run(loaded, tmp_path, limit=2) == 0 and found(tmp_path) == unbroken[0][:2]


def test_a_run_folder_holds_what_others_rely_on(tmp_path, loaded, capsys):
    assert run(loaded, tmp_path, limit=1, method="base") == 0
    def read(name): return json.loads((tmp_path / "run" / name).read_text())
    assert {"id", "request", "margin", "uncertain", "outcome", "candidates", "base", "answer",
            "pairs", "rejected", "losses", "norms", "seconds", "tokens", "gold", "reachable",
            "log_p", "entropy", "ids", "prompt_tokens", "extra"} == set(read("records.jsonl"))
    assert {"text", "exact", "reason"} <= set(read("records.jsonl")["answer"])
    assert {"n", "uncertain", "base_accuracy", "accuracy", "fixed"} <= set(read("summary.json"))
    assert read("config.json")["max_new_tokens"] == 16
    assert {"samples", "weights", "writer", "torch"} <= set(read("config.json")["facts"])
    printed = capsys.readouterr().out
    assert "fixed" in printed and "Next: python evaluate.py" in printed


def test_the_runs_name_holds_what_is_not_the_default():
    def name(**changes): return choose(Config(model="tiny", device="cpu", **changes)).out
    assert name() == "runs/nexusraven-tiny-ttsi-s0"
    assert name(tau=0.5, adapt="suffix", seed=3) == (
        "runs/nexusraven-tiny-ttsi-tau=0.5-adapt=suffix-s3")
    assert len({name(), name(lr=0.1), name(k=2), name(limit=4), name(pair="joint")}) == 5
    assert name(fresh=True, batch=4, offline=True) == name() and name(out="here") == "here"


# ----------------------------------------------------------------------------- killed, interrupted

def test_a_run_killed_at_twenty_random_moments_ends_as_if_nothing_had_happened(
        tmp_path, file, loaded, unbroken):
    (records, seconds), moments, killed, folder = unbroken, random.Random(0), 0, tmp_path / "0"
    while killed < 20:
        folder.mkdir(exist_ok=True)
        process = start(folder, argv(folder, file, limit=2))
        process.join(moments.uniform(0.1, 0.4) * seconds)
        if process.is_alive():
            process.kill()
            process.join()
            killed += 1
        else:                                   # it was faster: again from the start
            assert process.exitcode == 0 and found(folder) == records[:2]
            folder = tmp_path / str(killed)
    assert run(loaded, folder, limit=2) == 0 and found(folder) == records[:2]


def two(folder: Path, file: str) -> list:
    """Two processes that share a run, as torchrun starts them."""
    return [start(folder, argv(folder, file), f"os.environ.update(RANK='{rank}', WORLD_SIZE='2')")
            for rank in (0, 1)]


def test_two_processes_find_what_one_finds(tmp_path, file, unbroken):
    for process in two(tmp_path, file):
        process.join()
        assert process.exitcode == 0
    assert found(tmp_path) == unbroken[0] and set(kept(tmp_path).values()) == {1}


def test_if_one_of_two_processes_is_killed_nothing_finished_is_lost_or_computed_twice(
        tmp_path, file, loaded, unbroken):
    first, second = two(tmp_path, file)
    while len(list(tmp_path.glob("stages/H-*"))) < 2:       # both have begun
        assert second.is_alive()
        time.sleep(0.01)
    second.kill()
    first.join()
    finished = kept(tmp_path)
    assert first.exitcode == 0 and not (tmp_path / "run").exists()
    assert "with other processes" in (tmp_path / "log").read_text()
    assert run(loaded, tmp_path) == 0 and found(tmp_path) == unbroken[0]
    assert set(kept(tmp_path).values()) == {1} and finished <= kept(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_tells_what_is_finished_and_goes_on(
        tmp_path, loaded, unbroken, capsys, number):
    def interrupted(agent, batch, config, kept):
        if batch[0].id == "toolalpaca-2":
            signal.raise_signal(number)
        return self_improve(agent, batch, config, kept)
    assert run(loaded, tmp_path, interrupted) == 130 and found(tmp_path) == unbroken[0][:2]
    assert "the same command goes on" in capsys.readouterr().out
    assert run(loaded, tmp_path) == 0 and found(tmp_path) == unbroken[0]


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, file, loaded, unbroken):
    process = start(tmp_path, argv(tmp_path, file),
                    "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))")
    process.join()
    said = (tmp_path / "log").read_text().splitlines()[-1]
    assert process.exitcode == 2 and said.startswith("error: ") and "too large" in said
    assert kept(tmp_path)["H", "toolalpaca-0"] == 1
    assert run(loaded, tmp_path) == 0 and found(tmp_path) == unbroken[0]
    assert kept(tmp_path)["H", "toolalpaca-0"] == 1


# ------------------------------------------------------------------------------------------ errors

OFFLINE = """
def blocked(*_, **__): raise AssertionError("a socket was opened")
socket.socket = socket.create_connection = socket.getaddrinfo = blocked
os.environ.update(XDG_CACHE_HOME="/nowhere", TTSI_DATA="")"""


@pytest.mark.parametrize("changes, code, said", [
    ({}, 0, "Next:"), ({"model": "nobody/nothing"}, 2, "nobody/nothing"),
    ({"model": str(TINY), "data": ""}, 2, "/nowhere/ttsi/toolalpaca.json")])
def test_offline_opens_no_socket(tmp_path, file, changes, code, said):
    options = argv(tmp_path, file, **{"limit": 1, "method": "base", **changes})
    process = start(tmp_path, [*options, "--offline"], OFFLINE)
    process.join()
    assert process.exitcode == code and said in (tmp_path / "log").read_text()


def item(name: str = "f", query: str = "hi", **parameters) -> str:
    tool = {"name": name, "description": "", "parameters": parameters}
    return json.dumps([{"query": query, "tools": [tool], "answers": []}])


FILES = {"BROKEN": "[{", "VOID": "[]", "LONG": item(query="word " * 3000),
         "ODD": item("\x1b[2Jf", x=5)}


@pytest.mark.parametrize("bad, said", [
    ({"tau": 1.5}, "--tau 1.5"), ({"tau": "nan"}, "--tau nan"), ({"k": 0}, "--k 0"),
    ({"lr": -1}, "--lr -1"), ({"alpha": "inf"}, "--alpha inf"), ({"top_p": 0}, "--top-p 0"),
    ({"max_new_tokens": 0}, "--max-new-tokens 0"), ({"method": "ttd"}, "--teacher"),
    ({"teacher": "tiny"}, "--method ttd"), ({"method": "ttd", "teacher": "https://x/v1"}, "URL"),
    ({"model": "./nowhere"}, "nowhere"), ({"data": "nowhere.json"}, "nowhere.json"),
    ({"data": "BROKEN"}, "BROKEN"), ({"data": "VOID"}, "VOID"), ({"data": "ODD"}, "\\x1b[2Jf"),
    ({"data": "LONG"}, "exceed the model's context"), ({"device": "nonsense"}, "--device nonsense"),
    ({"out": "VOID/run"}, "VOID")])
def test_a_users_mistake_is_one_sentence_and_code_2(tmp_path, file, capsys, monkeypatch, bad, said):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_text(content)
    assert main(argv(tmp_path, file, **{"limit": 1, **bad})) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error and "\x1b" not in error
    assert not list(tmp_path.glob("run*"))


def test_an_unknown_bench_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--bench", "nonsense"])
    assert "sealtool" in capsys.readouterr().err


def test_a_run_that_changed_the_base_weights_is_not_called_finished(tmp_path, file):
    def careless(agent, *rest):
        with torch.no_grad():
            agent.model.model.norm.weight[0] += 1e-3
        return self_improve(agent, *rest)
    another = train.set_up(choose(Config(**OPTIONS, data=file)))
    with pytest.raises(ValueError, match="base weights have changed"):
        run(another, tmp_path, careless, limit=1, method="base")
    assert not (tmp_path / "run").exists()


def test_a_teacher_is_another_writer_whose_pairs_are_kept_apart(loaded, file, checkpoint):
    taught, _ = train.set_up(choose(Config(**OPTIONS, data=file, method="ttd",
                                           teacher=str(checkpoint))))
    alone, _ = loaded
    assert alone.writer.model is alone.model and taught.writer.model.config.hidden_size == 32
    assert taught.facts["weights"] == alone.facts["weights"]
    assert taught.facts["writer"] != alone.facts["writer"]


def test_a_tool_that_is_named_like_a_path_stays_text(tmp_path):
    (tmp_path / "paths.json").write_text(item("../../escape"))
    assert main(argv(tmp_path / "a" / "b", str(tmp_path / "paths.json"))) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"paths.json", "a"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"b"}
