"""Run folders that can be trusted: killed, resumed, shared among processes, checked afterwards, and fed with rubbish."""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import data
import evaluate
import model as model_py
import train
from augment import Found, Pair
from data.tiny import make
from lora import LoRALinear
from model import PrefixCaches, Tokenizer, fingerprint, load_model
from test_evaluate import record as sound_record
from train import TINY, Agent, Config, main

ROOT = Path(train.__file__).parent
SAMPLES = 8                             # of the runs that are killed


def program(folder: Path, *flags: str, processes: int = 0) -> subprocess.Popen:
    """A run of the program in a process of its own, or of several under torchrun."""
    starter = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes else []
    return subprocess.Popen([sys.executable, *starter, "train.py", "--bench", "toolalpaca", "--model", "tiny", "--device", "cpu",
                             "--limit", str(SAMPLES), "--max-new-tokens", "64", "--tau", "1", "--out", str(folder), *flags], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcomes(folder: Path) -> dict[str, dict]:
    """What a run found out, by sample: its records without the seconds."""
    return {r["id"]: {key: value for key, value in r.items() if key != "seconds"} for r in evaluate.read_records(folder)}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, dict]:
    """The outcome of a run that nothing disturbs; most of its samples are uncertain."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert program(folder).wait() == 0
    found = outcomes(folder)
    assert len(found) == SAMPLES and sum(bool(r["losses"]) for r in found.values()) >= 3
    return found


def run(folder: Path, *flags: str, code: int = 0) -> None:
    """A short run in this process."""
    assert main(["--bench", "toolalpaca", "--model", "tiny", "--device", "cpu", "--limit", "3", "--out", str(folder), *flags]) == code


# ---------------------------------------------------------------------------------------------------- killed, resumed

def test_runs_killed_at_twenty_random_moments_end_as_if_nothing_had_happened(unbroken, tmp_path):
    """Two runs side by side, to use two cores; each is killed ten times."""
    moments, folders = random.Random(0), [tmp_path / "one", tmp_path / "two"]
    for _ in range(10):
        processes = [program(folder) for folder in folders]
        time.sleep(moments.uniform(1.5, 4.0))
        for folder, process in zip(folders, processes):
            if process.poll() is not None:              # it was done before it could be killed: again from the start
                (folder / "records.jsonl").unlink()
            process.kill()
            process.wait()
    assert [process.wait() for process in map(program, folders)] == [0, 0]
    for folder in folders:
        assert outcomes(folder) == unbroken and evaluate.verify(folder) == []


def test_two_processes_find_what_one_finds_and_one_goes_on_where_two_were_killed(unbroken, tmp_path):
    process = program(tmp_path / "two", processes=2)
    assert process.wait() == 0 and "fixed" in process.stdout.read()
    assert outcomes(tmp_path / "two") == unbroken and evaluate.verify(tmp_path / "two") == []
    assert not list((tmp_path / "two").glob("records-*"))

    folder = tmp_path / "killed"
    process = program(folder, processes=2)
    shard = folder / "records-1.jsonl"
    while not (shard.is_file() and shard.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        time.sleep(0.02)
    for rank in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split():
        if b"RANK=1" in Path(f"/proc/{rank}/environ").read_bytes().split(b"\0"):
            os.kill(int(rank), signal.SIGKILL)
    assert process.wait() != 0
    finished = outcomes(folder)
    assert 2 <= len(finished) < SAMPLES and all(unbroken[id] == record for id, record in finished.items())
    assert program(folder).wait() == 0 and outcomes(folder) == unbroken


def test_sigterm_ends_with_the_table_and_how_to_go_on(tmp_path):
    process = program(tmp_path)
    while not (tmp_path / "records.jsonl").is_file() or not (tmp_path / "records.jsonl").stat().st_size:
        time.sleep(0.02)
    process.terminate()
    printed = process.communicate()[0]
    assert process.returncode == 130 and "fixed" in printed and "the same command goes on" in printed


def test_two_runs_do_not_write_into_one_folder(tmp_path, capsys):
    with train.locked(tmp_path):
        run(tmp_path, code=2)
    assert "another process" in capsys.readouterr().err
    run(tmp_path)


def test_records_of_other_ranks_are_read_and_merged_once(tmp_path):
    run(tmp_path)
    before, path = outcomes(tmp_path), tmp_path / "records.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first)
    (tmp_path / "records-1.jsonl").write_bytes(b"".join([first, *others]))       # the first stands in both, as a kill may leave it
    assert outcomes(tmp_path) == before
    run(tmp_path)
    assert outcomes(tmp_path) == before and not (tmp_path / "records-1.jsonl").exists()


# ------------------------------------------------------------------------------------------------- what a run began with

@pytest.mark.parametrize("name, code", [("data", 2), ("weights", 2), ("torch", 0), ("code", 0)])
def test_a_run_goes_on_only_with_its_data_and_weights_and_says_if_versions_differ(tmp_path, capsys, name, code):
    run(tmp_path)
    facts = evaluate.read_json(tmp_path / "facts.json")
    train.write_json(tmp_path / "facts.json", {**facts, name: "another"})
    run(tmp_path, code=code)
    printed = capsys.readouterr()
    assert f"the {name} changed" in printed.err if code else f"begun with {name} another" in printed.out


def test_verify_names_each_thing_that_is_not_as_it_was(tmp_path, capsys):
    run(tmp_path)
    content = (tmp_path / "records.jsonl").read_text()
    records = [json.loads(line) for line in content.splitlines()]

    def verified(*records) -> str:
        (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        code = evaluate.main([str(tmp_path), "--verify"])
        printed = capsys.readouterr().out
        assert code == ("sound" not in printed)
        return printed
    assert "sound" in verified(*records)
    assert "1 samples have no record" in verified(*records[1:])
    assert "records are of no sample" in verified(*records, {**records[0], "id": "toolalpaca-1000"})
    flipped = {**records[0], "answer": {**records[0]["answer"], "exact": not records[0]["answer"]["exact"]}}
    assert "toolalpaca-0: of answer, exact" in verified(flipped, *records[1:])
    assert "the gold calls are others" in verified({**records[0], "gold": "nothing"}, *records[1:])
    assert "not what margin and tau say" in verified({**records[0], "uncertain": not records[0]["uncertain"]}, *records[1:])
    for name in ("data", "weights_after", "config"):
        facts = evaluate.read_json(tmp_path / "facts.json")
        train.write_json(tmp_path / "facts.json", {**facts, name: "another"})
        assert {"data": "the samples are others", "weights_after": "base weights have changed",
                "config": "config.json was changed"}[name] in verified(*records)
        train.write_json(tmp_path / "facts.json", facts)


def test_a_run_that_changed_the_base_weights_is_not_called_finished(tmp_path, monkeypatch, capsys):
    real = train.self_improve

    def careless(agent, *args):
        with torch.no_grad():
            agent.model.model.norm.weight[0] += 1e-3
        return real(agent, *args)
    monkeypatch.setattr(train, "self_improve", careless)
    run(tmp_path, code=2)
    assert "base weights have changed" in capsys.readouterr().err


def test_the_fingerprint_sees_one_bit_and_an_exchange():
    model = load_model(TINY)
    before, weight = fingerprint(model), model.model.layers[3].mlp.up_proj.weight
    bits = weight.data.view(torch.int32)
    bits[5, 7] ^= 1
    assert fingerprint(model) != before
    bits[5, 7] ^= 1
    assert fingerprint(model) == before
    weight.data[[0, 1]] = weight.data[[1, 0]]
    assert fingerprint(model) != before


# --------------------------------------------------------------------------------------------------------------- faults

def test_out_of_memory_in_adaptation_keeps_the_direct_answer_and_elsewhere_the_finished_samples(tmp_path, monkeypatch, capsys):
    def exhausted(*_): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    fit = train.fine_tune
    monkeypatch.setattr(train, "fine_tune", exhausted)
    monkeypatch.setattr(train, "synthesize", lambda _, samples, *__: [Found([Pair("a request", (), "a call")])] * len(samples))
    run(tmp_path / "adapting", "--tau", "1")
    for record in evaluate.read_records(tmp_path / "adapting"):
        assert record["outcome"] == "out of memory" and record["answer"] == record["base"]
    assert "3 adaptations did not fit" in capsys.readouterr().out
    monkeypatch.setattr(train, "fine_tune", lambda agent, examples, *rest: exhausted() if len(examples) > 1 else fit(agent, examples, *rest))
    run(tmp_path / "halves", "--tau", "1", "--batch", "3")
    assert {r["outcome"] for r in evaluate.read_records(tmp_path / "halves")} == {"adapted"}
    monkeypatch.setattr(train, "score_candidates", exhausted)
    run(tmp_path / "scoring", code=1)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "CUDA out of memory" in error and "the same command goes on" in error


def test_what_the_context_does_not_hold_keeps_its_direct_answer(tmp_path, monkeypatch, capsys):
    def too_long(*_): raise model_py.ContextError("9999 tokens")
    monkeypatch.setattr(train, "synthesize", too_long)
    run(tmp_path, "--tau", "1", "--batch", "2")
    assert {r["outcome"] for r in evaluate.read_records(tmp_path)} == {"too long"}
    assert "3 adaptations exceeded" in capsys.readouterr().out


def test_overwrite_deletes_a_run_and_nothing_else(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    run(tmp_path)
    run(tmp_path, "--seed", "1", "--overwrite")
    assert (tmp_path / "mine.json").is_file() and evaluate.read_json(tmp_path / "config.json")["seed"] == 1


def test_a_full_disk_is_one_line(capsys, tmp_path):
    with pytest.raises(OSError, match="/dev/full: cannot be written .No space left on device.; what is finished is kept"):
        train.append(Path("/dev/full"), b"record\n")
    (tmp_path / "file").write_text("")
    run(tmp_path / "file" / "run", code=2)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_write_that_the_disk_takes_only_in_part_is_an_error(tmp_path):
    limit = "import resource, sys, train; from pathlib import Path; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)); " \
            "train.append(Path(sys.argv[1]), b'0123456789 and more')"
    done = subprocess.run([sys.executable, "-c", limit, str(tmp_path / "records.jsonl")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot be written" in done.stderr


def test_a_changed_file_of_the_hubs_cache_is_named(tmp_path, monkeypatch):
    import hashlib
    content = (TINY / "model.safetensors").read_bytes()
    blob, snapshot = tmp_path / "blobs" / hashlib.sha256(content).hexdigest(), tmp_path / "snapshots" / "main"
    blob.parent.mkdir()
    shutil.copytree(TINY, snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    blob.write_bytes(content)
    load_model(model_py.find_checkpoint("someone/tiny"))
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{blob.name}.*damaged"):
        model_py.find_checkpoint("someone/tiny")


def test_offline_opens_no_socket(tmp_path, monkeypatch):
    def blocked(*_, **__): raise AssertionError("a socket was opened")
    monkeypatch.setattr(socket, "socket", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TTSI_DATA", raising=False)
    run(tmp_path / "run", "--offline")
    run(tmp_path / "hub", "--offline", "--model", "nobody/nothing", "--data", "bundled", code=2)
    assert main(["--bench", "sealtool", "--model", str(TINY), "--offline", "--out", str(tmp_path / "data")]) == 2


def test_control_characters_in_a_file_never_reach_the_terminal(tmp_path, capsys):
    tool = {"name": "\x1b[2Jf", "description": "", "parameters": {"x": 5}}
    path = tmp_path / "odd.json"
    path.write_text(json.dumps([{"query": "hi", "tools": [tool], "answers": []}]))
    run(tmp_path / "run", "--data", str(path), code=2)
    error = capsys.readouterr().err
    assert "\\x1b[2Jf" in error and "\x1b" not in error


def test_two_hundred_adaptations_take_no_more_memory_than_a_few():
    def resident() -> int: return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    model = load_model(TINY)
    agent = Agent(model, Tokenizer(TINY), PrefixCaches(model))
    config = Config(bench="sealtool", lr=train.TINY_LR, epochs=1, max_new_tokens=4)
    sample = data.load("sealtool", bundled=True)[0]
    prompt, target = agent.tokenizer.chat(data.call_prompt(sample)), agent.tokenizer.encode(data.call_text(sample.answers))
    seen = []
    for i in range(200):
        params = train.new_params(model, 8, [train.seeded("memory", i)], config.targets.split(","))
        with train.adapters(model, params, 16.0):
            train.fine_tune(agent, [[(prompt[-40:], target)]], params, config)
        seen.append(resident())
    assert seen[-1] - seen[19] < 20e6       # an adapter of this model has 0.6 MB of parameters and 1.8 MB with AdamW's state
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


# --------------------------------------------------------------------------------------------------------------- rubbish

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["query", "tools", "answers", "name", "parameters", "role", "content", "type", "required", "id"])
                        | st.text(max_size=3), inner, max_size=4), max_leaves=12)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rubbish")


@settings(max_examples=1000, deadline=None)
@given(content=st.lists(JSON, max_size=2).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60))
def test_any_data_file_is_loaded_or_named(scratch, content):
    path = scratch / "any.json"
    path.write_bytes(content)
    try:
        assert data.load("sealtool", str(path))
    except ValueError as error:
        assert str(path) in str(error)


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_any_record_file_is_read_or_named_and_what_is_read_can_be_shown(scratch, draw):
    record = sound_record("x-0", True, False)
    key = draw.draw(st.sampled_from([*record, "none"]))
    line = json.dumps({**record, key: draw.draw(JSON)}).encode()
    line = draw.draw(st.just(line) | st.binary(max_size=40) | st.just(line[:len(line) // 2]))
    (scratch / "records.jsonl").write_bytes(line + b"\n")
    (scratch / "config.json").write_text('{"tau": 0.95}')
    try:
        records = evaluate.read_records(scratch)
    except ValueError as error:
        assert "records.jsonl, line " in str(error)
        return
    for shown in (evaluate.table(evaluate.read_runs([scratch])), *(evaluate.story(record) for record in records)):
        assert all(c.isprintable() or c == "\n" for c in shown)
        shown.encode()


def test_generated_names_are_never_paths(tmp_path, monkeypatch):
    """A tool named like a path stays text: nothing is written outside the run folder."""
    item = make.generate("toolalpaca", "held_out", 5, 1)[0]
    item["tools"][0]["name"] = "../../escape"
    path = tmp_path / "paths.json"
    path.write_text(json.dumps([item]))
    run(tmp_path / "a" / "b" / "run", "--data", str(path))
    written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert {p for p in written if not p.startswith("a/b/run/")} == {"paths.json"}
