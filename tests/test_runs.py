"""Runs that can be trusted: what is kept is not computed again, a run may be killed at any byte,
several processes find what one finds, and what a user can mend is one sentence."""
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from shutil import copy, rmtree
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from conftest import write_checkpoint

import augment
import data
import evaluate
import train
from augment import Found
from data import Sample
from data.runs import (Kept, Lines, agrees, code_digest, definitions, forget, kept_files, key_in,
                       prune, read_run, stage)
from train import TINY, Agent, Config, fill_in, main, self_improve

ROOT = Path(__file__).parent.parent

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
    return train.set_up(fill_in(Config(**OPTIONS)))


def run(loaded, folder: Path, improve=self_improve, **changes) -> int:
    """The program in this process, from a model that is loaded already."""
    agent, samples = loaded
    config = fill_in(Config(**{**OPTIONS, "out": str(folder / "run"), **changes}))
    return train.run(agent, samples[:config.limit or None], config, improve)


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

SAMPLES, COMPUTED = [Sample(id, (), ()) for id in "abcd"], []


@stage("X", Found, "seed")
def write_letters(agent, samples, config) -> list[Found]:
    COMPUTED.extend(x.id for x in samples)
    return [Found(x.id, texts=[f"{x.id} ü\n"]) for x in samples]


def letters(folder: Path, samples=SAMPLES, **changes) -> str:
    """The letters whose lines were not there and are computed now, one at a time."""
    COMPUTED.clear()
    config = Config(out=str(folder / "run"), model="a [1] * ü?", **changes)
    if config.fresh:
        forget(config, {})
    kept = Kept(SimpleNamespace(facts={}), config)
    for x in samples:
        assert kept(write_letters, [x])[x.id].texts == [f"{x.id} ü\n"]
    return "".join(COMPUTED)


def test_a_line_is_computed_once_for_what_it_depends_on(tmp_path):
    assert letters(tmp_path) == "abcd" and letters(tmp_path) == letters(tmp_path, tau=0.5) == ""
    assert letters(tmp_path, seed=1) == letters(tmp_path, fresh=True) == "abcd"
    assert letters(tmp_path) == letters(tmp_path, seed=1) == ""


def test_fresh_forgets_this_configuration_alone(tmp_path):
    for changes in ({}, {"seed": 1}, {"bench": "apibank"}):
        assert letters(tmp_path, **changes) == "abcd"
    torn = tmp_path / "stages" / "X-nexusraven-a [1] x ü?-0123456789ab.01234567.jsonl"
    torn.write_text('{"key": {"sta')
    assert letters(tmp_path, fresh=True) == "abcd" and torn.exists()
    assert letters(tmp_path, seed=1) == letters(tmp_path, bench="apibank") == ""


def test_another_request_under_an_id_that_is_kept_has_a_line_of_its_own(tmp_path):
    """And one more sample recomputes nothing of the others."""
    asked = [replace(SAMPLES[0], messages=({"role": "user", "content": text},)) for text in "xyx"]
    assert letters(tmp_path, asked) == "aa" and letters(tmp_path, asked[::-1]) == ""
    assert letters(tmp_path) == "abcd"


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
    **dict.fromkeys("weights shape tokenizer penalty numerics asks order".split(), "HGT"),
    "max_new_tokens": "HGT",
    # of these two there are facts: the number itself; the seed where it draws the order
    "repetition_penalty": "", "tools": "",
    **dict.fromkeys("writer tries k pair temperature top_p".split(), "GT"), "seed": "GT",
    **dict.fromkeys("adapt rank alpha epochs lr".split(), "T"),
    # what says where things are, and how to run them; a sample, a model and a teacher have digests
    **dict.fromkeys("""bench data ask model method teacher teacher_model teacher_option limit tau
        batch checkpointing out device dtype pack offline keep_adapters fresh samples torch python
        """.split(), "")}


def keys(known: dict, **codes) -> dict[str, str]:
    """The key of each stage, as it is made for lines that one stage sees of the one before."""
    seen, found = [], {}
    for function in (train.assess, augment.synthesize, train.adapt):
        now = function.stage
        key = {"code": codes.get(now.name, now.code), **{name: known[name] for name in now.reads},
               "seen": seen}
        seen, found[now.name] = [key], json.dumps(key)
    return found


def test_lines_are_kept_apart_exactly_where_something_that_they_depend_on_differs(loaded):
    assert set(DEPENDS) == {f.name for f in fields(Config)} | set(loaded[0].facts)
    known = dict.fromkeys(DEPENDS, "as it was")
    before = keys(known)
    for name, expected in DEPENDS.items():
        after = keys({**known, name: "another"})
        assert "".join(s for s in "HGT" if before[s] != after[s]) == expected, name
    edited = keys(known, H="other code")
    assert all(edited[s] != before[s] for s in "HGT")


def test_a_keys_parts_stand_in_the_first_line_of_each_file(tmp_path, loaded):
    assert run(loaded, tmp_path, limit=1) == 0
    made = {path.name[0]: key_in(path) for path in tmp_path.glob("stages/*.jsonl")}
    assert set(made) == set("HGT") and made["T"]["seen"] == [made["G"], made["H"]]
    assert made["G"]["seen"] == [made["H"]] and made["H"]["seen"] == []
    assert made["H"]["shape"]["rope_theta"] == loaded[0].model.config.rope_theta


# ------------------------------------------------------------------------- the key tells what runs

STAGES = (train.assess, augment.synthesize, train.adapt)
EDITS = [   # file, old, new -> what is computed anew: H, G, T, (a)sks, t(r)ies
    ("train.py", '"""TT-SI,', '# a comment at the top\n"""TT-SI,', ""),
    ("train.py", "x is read once", "another comment", ""),
    ("lora.py", "B = 0, so y = W x at the start", "another docstring", ""),
    ("train.py", "0.5 * (1 + math.cos(math.pi", "0.6 * (1 + math.cos(math.pi", "T"),
    ("augment.py", "TRIES = 3 ", "TRIES = 4 ", "G"),
    ("augment.py", "MAX_CALL_TOKENS = 192", "MAX_CALL_TOKENS = 193", "r"),
    ("augment.py", "prompt.form.start + row.text", "row.text", "r"),
    ("data/__init__.py", "Answer with nothing but", "Answer with only", "a"),
    ("data/calls.py", "MAX_DEPTH = 32 ", "MAX_DEPTH = 31 ", "r"),
    ("lora.py", "A = torch.stack(rows) * 2", "A = torch.stack(rows) * 3", "T"),
    ("uncertainty.py", "topk(2)", "topk(3)", "H"),
    ("model.py", "rsqrt(y.pow(2)", "rsqrt(y.pow(4)", "HT"),
    ("data/chat.py", "add_special_tokens=False", "add_special_tokens=True", "H"),
    ("evaluate.py", "not reason and as_asked", "reason and as_asked", ""),
    ("train.py", 'RUN, "the benchmark', 'RUN, "a benchmark', "")]


def digests() -> dict[str, str]:
    """Of the three stages, and of how a sample is asked and a pair is tried, as if loaded now."""
    definitions.cache_clear()
    task = train.CALLING
    found = {f.stage.name: code_digest(f) for f in STAGES}
    return found | {"a": code_digest(task.prompt, task.actions, task.answer_start),
                    "r": code_digest(*task.tries.values())}


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    return digests()


@pytest.mark.parametrize("file, old, new, anew", EDITS, ids=[e[2][:30] for e in EDITS])
def test_other_code_is_another_key_but_not_another_comment(
        file, old, new, anew, before, monkeypatch):
    """Of what a stage runs, wherever that stands: the network's code is in H's digest."""
    plain = Path.read_text

    def edited(path, **how):
        text = plain(path, **how)
        if path == ROOT / file:
            assert old in text
            text = text.replace(old, new)
        return text
    monkeypatch.setattr(Path, "read_text", edited)
    after = digests()
    definitions.cache_clear()
    changed = {name for name in before if before[name] != after[name]}
    assert set(anew) <= changed and (anew or not changed)
    assert before == {**before, **{f.stage.name: f.stage.code for f in STAGES}}


def test_an_edit_during_a_run_changes_nothing_of_that_run(tmp_path, loaded):
    """Digests are of what was loaded: they are made when the program is."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        copy(path, tmp_path / path.relative_to(ROOT))
    code = """if True:
        import train, pathlib
        for path in pathlib.Path(".").rglob("*.py"):
            path.write_text("edited = True")
        print(train.assess.stage.code, train.adapt.stage.code, train.CALLING.code["tries"],
              train.code_digest(train.assess))"""
    out = subprocess.run([sys.executable, "-c", code.replace("train.code", "train.data.code")],
                         cwd=tmp_path, capture_output=True, text=True)
    expected = [train.assess.stage.code, train.adapt.stage.code, train.CALLING.code["tries"],
                train.assess.stage.code]
    assert out.stdout.split() == expected, out.stderr


# ------------------------------------------------------------------------ the key tells which model

@pytest.mark.parametrize("change, fact", [
    ({"rope_theta": 5e5}, "shape"), ({"num_attention_heads": 2, "num_key_value_heads": 1}, "shape"),
    ({"rms_norm_eps": 1e-5}, "shape"), ({"max_position_embeddings": 400}, "shape")])
def test_the_same_weights_under_another_config_are_another_model(tmp_path, change, fact):
    """Also as a teacher."""
    one, other = (write_checkpoint(tmp_path / name) for name in ("one", "other"))
    config = json.loads((other / "config.json").read_text())
    if "num_attention_heads" in change:         # the same widths: 2 heads of 16 as 4 of 8
        config["num_key_value_heads"] = 2
        change = {"num_attention_heads": 4, "rope_theta": 1e4}
    (other / "config.json").write_text(json.dumps(config | change))
    facts = []
    for folder in (one, other):
        loaded, found = train.load_local(str(folder), fill_in(Config(model="tiny", device="cpu")))
        facts.append(found)
    assert [name for name in facts[0] if facts[0][name] != facts[1][name]] == [fact]


def test_other_end_tokens_are_another_tokenizer(tmp_path):
    one, other = (write_checkpoint(tmp_path / name) for name in ("one", "other"))
    (other / "generation_config.json").write_text('{"eos_token_id": 7}')
    config = fill_in(Config(model="tiny", device="cpu"))
    facts = [train.load_local(str(folder), config)[1] for folder in (one, other)]
    assert [name for name in facts[0] if facts[0][name] != facts[1][name]] == ["tokenizer"]


def test_a_checkpoints_own_repetition_penalty_is_taken_if_asked_for(tmp_path, capsys):
    folder = write_checkpoint(tmp_path)
    said = [(None, 1.0), (1.1, 1.1), ("many", "its repetition_penalty is 'many'"),
            (-1, "is -1, not in")]
    for own, expected in said:
        (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": own}))
        usual = fill_in(Config(model="tiny", device="cpu"))
        assert train.load_local(str(folder), usual)[0].model.repetition_penalty == 1.0
        asked = replace(usual, repetition_penalty="checkpoint")
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                train.load_local(str(folder), asked)
            continue
        me, facts = train.load_local(str(folder), asked)
        assert me.model.repetition_penalty == facts["penalty"] == expected
        assert f"its repetition penalty is {expected}" in capsys.readouterr().out
        assert train.load_local(str(folder), replace(usual, repetition_penalty="2"))[1][
            "penalty"] == 2.0


def test_a_servers_url_is_another_writer(monkeypatch):
    options = {**OPTIONS, "method": "ttd", "teacher_model": "big"}
    writers = [train.set_up(fill_in(Config(**options, teacher=url)))[0].facts["writer"]
               for url in ("https://one/v1", "https://two/v1")]
    assert writers == ["big at https://one/v1", "big at https://two/v1"]


def test_in_bfloat16_the_device_the_batch_and_torch_are_in_the_key_and_in_float32_they_are_not():
    numerics = {}
    for dtype in ("float32", "bfloat16"):
        for batch in (1, 4):
            config = fill_in(Config(**{**OPTIONS, "dtype": dtype, "batch": batch}))
            facts = train.set_up(config)[0].facts
            numerics[dtype, batch] = facts["numerics"]
            assert (facts["batch"], facts["torch"]) == (batch, torch.__version__)
    assert numerics["float32", 1] == numerics["float32", 4] == "float32"
    assert torch.__version__ in numerics["bfloat16", 1] != numerics["bfloat16", 4]
    assert torch.backends.cpu.get_cpu_capability() in numerics["bfloat16", 1]


# ---------------------------------------------------------------------- a folder, a configuration

def test_the_runs_name_holds_what_is_not_the_default():
    def name(**changes): return fill_in(Config(model="tiny", device="cpu", **changes)).out
    assert name(fresh=True, batch=4, offline=True) == name() == "runs/nexusraven-tiny-ttsi-s0"
    assert name(tau=0.5, adapt="suffix", seed=3) == (
        "runs/nexusraven-tiny-ttsi-tau=0.5-adapt=suffix-s3")
    assert name(repetition_penalty="1") == name() and "1.1" in name(repetition_penalty="1.10")


@pytest.mark.parametrize("one, other", [
    ({"data": "a/test.json"}, {"data": "b/test.json"}),
    ({"model": "a/checkpoint-500"}, {"model": "b/checkpoint-500"}),
    ({"method": "ttd", "teacher": "https://a/v1", "teacher_model": "big"},
     {"method": "ttd", "teacher": "https://b/v1", "teacher_model": "big"}),
    ({"model": "a/checkpoint-500", "dtype": "bfloat16"},
     {"model": "a/checkpoint-500", "dtype": "bfloat16", "batch": 4}),
    *(({"data": c * 70 + "1/" + c * 250}, {"data": c * 70 + "2/" + c * 250}) for c in "y界")])
def test_two_configurations_never_meet_in_a_folder(tmp_path, monkeypatch, one, other):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        write_checkpoint(tmp_path / folder / "checkpoint-500")
        (tmp_path / folder / "test.json").write_text(ITEM % ("hi", "f", ""))
    folders = []
    for changes in (one, other):
        config = fill_in(Config(**{**OPTIONS, **changes}))
        numerics = f"{config.dtype} {config.batch}" if config.dtype == "bfloat16" else ""
        folders.append(train.run_folder(config, {"numerics": numerics}))
        assert len(Path(folders[-1]).name.encode()) < 200 and "*" not in folders[-1]
    assert folders[0] != folders[1]


@pytest.mark.parametrize("data_", ["mine/home.jsonl", "mine"])
def test_own_data_runs_under_its_own_name(tmp_path, monkeypatch, capsys, data_):
    """A file, or the folder of one. One more sample recomputes nothing of the others, and without
    gold answers nothing is right or wrong."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    item = json.loads(ITEM % ("hi", "f", ""))[0]
    own = tmp_path / "mine" / "home.jsonl"
    own.write_text(json.dumps(item))
    options = ["--data", data_, "--model", "tiny", "--device", "cpu", "--max-new-tokens", "4"]
    assert main(options) == 0
    said = capsys.readouterr().out
    assert "the samples of mine/home.jsonl" in said and "paper" not in said and "real" not in said
    folder, = (tmp_path / "runs").glob("home-tiny-ttsi-max_new_tokens=4-s0-*")
    assert [record.id for record in read_run(folder).records] == ["home-0"]
    del item["answers"]
    own.write_text(own.read_text() + "\n" + json.dumps(item | {"id": "b"}))
    assert main(options) == 0
    said = capsys.readouterr().out
    assert "kept: 1 of 2 samples; to compute: 1" in said
    assert "without a gold answer, so neither right nor wrong: 1" in said
    (tmp_path / "mine" / "other.json").write_text("[]")
    assert main(["--data", "mine"]) == 2
    assert "mine has 2 files .json and .jsonl" in capsys.readouterr().err
    assert main(["--data", "gone.json"]) == 2
    assert "no file gone.json; --data and $TTSI_DATA take a file" in capsys.readouterr().err
    assert main(["--bench", "apibank_l2", "--data", "bundled"]) == 2
    assert "bundled are only apibank, nexusraven, sealtool, toolalpaca" in capsys.readouterr().err


def test_a_model_here_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write_checkpoint(tmp_path / "mine"))
    assert fill_in(Config(model=".", device="cpu")).out == "runs/nexusraven-mine-ttsi-s0-*"


def test_a_folder_of_another_configuration_is_refused_and_what_differs_is_named(
        tmp_path, loaded, capsys):
    assert run(loaded, tmp_path, limit=1) == 0
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    with pytest.raises(ValueError, match="tau 1.0, now 0.5"):
        run(loaded, tmp_path, limit=1, tau=0.5)
    agent, samples = loaded
    other = replace(agent, facts={**agent.facts, "weights": "of another model"})
    with pytest.raises(ValueError, match="weights .* now 'of another model'"):
        run((other, samples), tmp_path, limit=1)
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before
    assert run(loaded, tmp_path, limit=1, batch=2, checkpointing=True) == 0     # no difference
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        run(loaded, tmp_path, limit=1)


# ----------------------------------------------------------------------------- the same once more

def test_a_second_run_computes_nothing_and_other_options_share_what_they_can(
        tmp_path, loaded, unbroken):
    def computed(out: str, **changes) -> str:
        before = kept(tmp_path)
        assert run(loaded, tmp_path, limit=2, out=str(tmp_path / out), **changes) == 0
        return "".join(sorted({stage for stage, _ in kept(tmp_path) - before}))

    assert computed("run") == "GHT" and found(tmp_path) == unbroken[0][:2]
    records = (tmp_path / "run" / "records.jsonl").read_bytes()
    def never(*_): raise AssertionError("the model was called")
    with loaded[0].model.register_forward_pre_hook(never):
        assert computed("a", tau=0.5) == computed("b", tau=0.0) == computed("run") == ""
        assert computed("c", method="base") == ""
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == records
    assert computed("d", lr=1e-3) == "T" and computed("e", max_new_tokens=15) == "GHT"


def test_a_run_says_what_it_found_what_it_computes_and_which_other_lines_are_there(
        tmp_path, loaded, capsys):
    assert run(loaded, tmp_path, limit=1) == 0
    assert "kept: 0 of 1 samples; to compute: 1\n" in capsys.readouterr().out
    assert run(loaded, tmp_path, limit=3, out=str(tmp_path / "three")) == 0
    said = capsys.readouterr().out
    assert "kept: 1 of 3 samples; to compute: 2\n" in said and "that differ" not in said
    assert run(loaded, tmp_path, max_new_tokens=15, out=str(tmp_path / "other")) == 0
    said = capsys.readouterr().out
    assert "kept: 0 of 3" in said
    assert "Lines of H are there that differ in: max_new_tokens.\n" in said


def test_a_teacher_is_another_writer_whose_pairs_are_kept_apart(loaded, checkpoint):
    config = fill_in(Config(**OPTIONS, method="ttd", teacher=str(checkpoint)))
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
            folder, seconds = tmp_path / f"{killed}-{seconds:.3f}", 0.7 * seconds
    assert run(loaded, folder, limit=2) == 0 and found(folder) == records[:2]


def test_the_same_run_with_shuffled_tools_is_the_same_run(tmp_path, capsys):
    """All stages see the order; what is kept of another one is neither used nor forgotten."""
    own = {"bench": "sealtool", "limit": 2, "tools": "shuffled"}
    given, one, other = (train.set_up(fill_in(Config(**{**OPTIONS, **own, **changes})))[1]
                         for changes in ({"tools": "as-given"}, {}, {"seed": 1}))
    assert one == [data.shuffled(x, 0) for x in given] != given
    assert other == [data.shuffled(x, 1) for x in given] != one
    main(argv(tmp_path, **own))
    first, lines = found(tmp_path), kept(tmp_path)
    assert [[*r["candidates"]] for r in first] == [[t["name"] for t in x.tools] for x in one]
    assert "adapted" in [r["outcome"] for r in first]
    main(argv(tmp_path, **own))
    assert found(tmp_path) == first and kept(tmp_path) == lines
    for fresh in ([], ["--fresh"]):
        main(argv(tmp_path, **{**own, "tools": "as-given", "out": tmp_path / "given"}) + fresh)
        assert {kept(tmp_path)["H", x.id] for x in given} == {2}
    assert "differ in: order" in capsys.readouterr().out


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
    def interrupted(batch, config, kept):
        assert not batch[0].answers             # the method is not even shown the labels
        if batch[0].id == "apibank-2" and kept.computing:
            signal.raise_signal(number)
        return self_improve(batch, config, kept)
    program = train.exit_codes(lambda folder: run(loaded, folder, interrupted))
    assert program(tmp_path) == 130 and found(tmp_path) == unbroken[0][:2]
    said = capsys.readouterr().out
    assert "Interrupted after 2 of 3 samples: the same command goes on." in said
    assert " 2 of 3 " in said and "2 of 3 samples" in told(tmp_path)
    assert run(loaded, tmp_path) == 0 and found(tmp_path) == unbroken[0]
    assert "of 3" not in told(tmp_path)
    program = train.exit_codes(lambda out: run(loaded, out.parent, interrupted, fresh=True,
                                               out=str(out)))
    assert program(tmp_path / "x") in (0, 130)


def told(folder: Path) -> str:
    """What evaluate.py tells of a run's first sample."""
    return evaluate.story_in(read_run(folder / "run"), "apibank-0")


def test_what_a_start_with_fresh_would_do_is_said_when_it_is_interrupted(
        tmp_path, loaded, capsys):
    def interrupted(batch, config, kept):
        if kept.computing:
            raise KeyboardInterrupt
        return self_improve(batch, config, kept)
    assert run(loaded, tmp_path, interrupted, fresh=True) == 130
    assert "would begin anew; without --fresh it goes on" in capsys.readouterr().out


def test_an_interrupt_joins_all_that_is_kept_and_never_replaces_more(
        tmp_path, loaded, unbroken, capsys):
    """A folder of three finished samples stays, if another code's run is stopped after none."""
    assert run(loaded, tmp_path) == 0
    for path in tmp_path.glob("stages/*.jsonl"):
        path.unlink()                                   # as after an edit of the code: nothing fits
    def interrupted(batch, config, kept):
        if kept.computing:
            raise KeyboardInterrupt
        return self_improve(batch, config, kept)
    assert run(loaded, tmp_path, interrupted) == 130
    assert "more samples are in it already" in capsys.readouterr().out
    assert found(tmp_path) == unbroken[0]

    def last_first(batch, config, kept):                # another process has finished the last
        outcomes = self_improve(batch, config, kept)
        if kept.computing and batch[0].id == "apibank-0":
            self_improve([replace(x, answers=()) for x in loaded[1][2:3]], config, kept)
            raise KeyboardInterrupt
        return outcomes
    assert run(loaded, tmp_path, last_first, out=str(tmp_path / "other" / "run")) == 130
    assert found(tmp_path / "other") == unbroken[0][::2]


def test_what_the_memory_does_not_hold_is_a_line_that_a_later_start_tries_again(
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


def test_processes_end_although_each_has_a_sample_that_is_too_large(tmp_path):
    """The join reads the lines that say so, whoever wrote them."""
    full = """
import torch
from model import Qwen2
plain = Qwen2.forward
def forward(model, ids, cache=None):
    if torch.is_grad_enabled():
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return plain(model, ids, cache)
Qwen2.forward = forward
os.environ.update(RANK='{}', WORLD_SIZE='2')"""
    processes = [start(tmp_path, argv(tmp_path), full.format(rank)) for rank in (0, 1)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [record["outcome"] for record in found(tmp_path)] == ["out of memory"] * 3
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("command", [["train.py"], ["evaluate.py", "x"], ["-m", "research.rivals"]])
def test_an_interrupt_while_torch_loads_leaves_no_traceback(command):
    process = subprocess.Popen(         # in a shell's foreground, wherever these tests run
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while "torch" not in process.stderr.readline():         # a line each module
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "Traceback" not in error


def test_two_interrupts_in_a_row_leave_no_traceback_and_the_handlers_are_put_back(
        tmp_path, loaded):
    process = start(tmp_path, argv(tmp_path))
    while not list(tmp_path.glob("stages/H-*")):
        assert process.is_alive()
        time.sleep(0.01)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.02)
    process.join()
    said = (tmp_path / "log").read_text()           # the second does not stop what the first began
    assert process.exitcode == 130 and "Traceback" not in said and "Interrupted after" in said

    def twice(batch, config, kept):
        if kept.computing:
            raise KeyboardInterrupt
        return self_improve(batch, config, kept)

    def again(_):
        run(loaded, tmp_path, twice, out=str(tmp_path / "other"))
        raise KeyboardInterrupt                             # while the program ends
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert train.exit_codes(again)() == 130
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


# ------------------------------------------------------------------------ one request of one's own

TOOLS = [{"name": "set_lamp", "parameters": {"room": {"type": "string"}}},
         {"type": "function", "function": {"name": "ring", "parameters": {}}}]


@pytest.mark.parametrize("content", [
    json.dumps(TOOLS), json.dumps({"tools": TOOLS}), "\n".join(map(json.dumps, TOOLS)),
    json.dumps([{"id": "7", "query": "no", "tools": json.dumps(TOOLS), "answers": []}, 5]),
    json.dumps({"messages": [{"role": "user", "content": "no"}], "tools": TOOLS})])
def test_a_request_of_ones_own_is_asked_with_the_tools_of_a_file(tmp_path, content):
    """A list of tools, an object of one, JSON Lines, or samples: the first one's."""
    (tmp_path / "mine.json").write_text(content)
    sample, = train.data.load("ask", str(tmp_path / "mine.json"), ask="Lamp in the hall, please")
    assert sample.id == "ask-0" and sample.answers is None
    assert sample.messages == ({"role": "user", "content": "Lamp in the hall, please"},)
    assert [tool["name"] for tool in sample.tools] == ["set_lamp", "ring"]


def test_one_request_is_told_as_a_story_from_h_to_both_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("tools.json").write_text(json.dumps(TOOLS))
    asked = ["--ask", "Turn on the lamp in the hall", "--data", "tools.json", "--model", "tiny",
             "--device", "cpu", "--tau", "1", "--max-new-tokens", "24"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    parts = ["  sample  ask-0: adapted", " request  Turn on the lamp in the hall", "candidate ",
             "  margin ", "    pair ", "  losses ", "  before ", "   after "]
    places = [said.index(part) for part in parts]
    assert places == sorted(places) and "gold  " not in said and "\nrun  " not in said
    assert said.count("candidate ") == 2 and "set_lamp" in said and "ring" in said
    assert main([*asked, "--seed", "0"]) == 0               # nothing is computed a second time
    assert "kept: 1 of 1" in capsys.readouterr().out
    asked[1] = "Ring!"
    assert main(asked) == 0 and len(list(Path("runs").glob("ask-*"))) == 2


@pytest.mark.parametrize("flags, said", [
    (["--ask", "x"], "--ask needs --data FILE"), (["--ask", " ", "--data", "t.json"], "--ask"),
    (["--ask", "x", "--data", "t.json", "--bench", "sealtool"], "--ask needs --data FILE"),
    (["--ask", "x", "--data", "t.json"], "t.json, item 0: no tool to call"),
    (["--ask", "x", "--data", "gone.json"], "no file gone.json"),
    (["--rank", "100000000"], "--rank 100000000: must be at most the model's width, 192")])
def test_what_cannot_be_asked_or_does_not_fit_is_refused_before_anything_is_tried(
        tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    Path("t.json").write_text('{"tools": []}')
    assert main(["--model", "tiny", "--device", "cpu", *flags]) == 2
    assert said in capsys.readouterr().err and not Path("runs").exists()


def test_in_a_thread_as_of_a_notebook_a_program_runs_too(tmp_path):
    codes = []
    thread = Thread(target=lambda: codes.append(main(argv(tmp_path, limit=1, method="base"))))
    thread.start()
    thread.join()
    assert codes == [0] and len(found(tmp_path)) == 1


# -------------------------------------------------------------------------- adapters that are kept

def adapters_of(folder: Path) -> dict[str, int]:
    """The adapters in the run folder -> when their weights were written."""
    return {path.parent.name: path.stat().st_mtime_ns
            for path in folder.glob("run/adapters/*/adapter_model.safetensors")}


def test_with_peft_a_kept_adapter_answers_as_the_run_did(tmp_path, loaded):
    peft, (agent, (*_, x)) = pytest.importorskip("peft"), loaded
    config = fill_in(Config(**{**OPTIONS, "max_new_tokens": 32, "epochs": 5, "keep_adapters": True,
                               "out": str(tmp_path / "run")}))
    assert train.run(agent, [x], config) == 0
    record, = read_run(tmp_path / "run").records
    folder = tmp_path / "run" / "adapters" / x.id
    about = json.loads((folder / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"]) == (config.rank, config.alpha)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([sum(agent.tokenizer.chat(agent.task.prompt(x)), [])])
    written = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                              max_new_tokens=config.max_new_tokens, do_sample=False)
    text = agent.tokenizer.decode(written[0, ids.shape[1]:].tolist()).removesuffix("<|im_end|>")
    assert text == record.answer.text != record.base.text


def test_an_adapter_that_is_not_there_is_made_again_from_a_line_that_is(tmp_path, loaded):
    """A line that was kept without the flag, or whose run folder is gone, gives no run without
    its adapters; and what is there is not made twice."""
    assert run(loaded, tmp_path) == 0
    before = kept(tmp_path)
    assert run(loaded, tmp_path, keep_adapters=True) == 0 and kept(tmp_path) == before
    made = adapters_of(tmp_path)
    assert set(made) == {"apibank-0", "apibank-1", "apibank-2"}
    assert run(loaded, tmp_path, keep_adapters=True) == 0 and adapters_of(tmp_path) == made
    rmtree(tmp_path / "run" / "adapters" / "apibank-1")
    assert run(loaded, tmp_path, keep_adapters=True) == 0 and kept(tmp_path) == before
    again = adapters_of(tmp_path)
    assert {name for name in again if made[name] != again[name]} == {"apibank-1"}
    mark = tmp_path / "run" / "adapters" / "apibank-2" / "line"         # of another code's line
    mark.write_text(mark.read_text().replace("T-apibank", "X-apibank"))
    assert run(loaded, tmp_path, keep_adapters=True) == 0
    assert adapters_of(tmp_path)["apibank-2"] != again["apibank-2"]


def test_two_processes_keep_all_adapters_and_what_failed_has_none(tmp_path, loaded):
    flags = argv(tmp_path) + ["--keep-adapters"]
    processes = [start(tmp_path, flags, f"os.environ.update(RANK='{rank}', WORLD_SIZE='2')")
                 for rank in (0, 1)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(adapters_of(tmp_path)) == len(found(tmp_path)) == 3

    def full(module, args):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
    with loaded[0].model.register_forward_pre_hook(full):
        assert run(loaded, tmp_path / "full", limit=1, keep_adapters=True) == 0
    assert not adapters_of(tmp_path / "full") and len(found(tmp_path / "full")) == 1


@pytest.mark.parametrize("id, name", [("sealtool-7", "sealtool-7"), ("q1.5_a", "q1.5_a")])
def test_an_id_names_its_adapters_folder_where_it_can(tmp_path, id, name):
    assert train.adapter_folder(str(tmp_path), id) == tmp_path / "adapters" / name
    hostile = ["..", "../x", "a/b", "", "é", "a" * 300, "a\n", ".hidden"]
    folders = {train.adapter_folder(str(tmp_path), id) for id in hostile}
    assert len(folders) == len(hostile)
    assert all(folder.parent == tmp_path / "adapters" for folder in folders)


# ------------------------------------------------------------ what is kept, and who still reads it

def read_by(folder: Path) -> dict[str, list[str]]:
    """stage -> the names of the runs that read its kept lines, those of each key sorted."""
    found = {}
    for each in kept_files(folder):
        found.setdefault(each.path.name[0], []).append(sorted(path.name for path in each.readers))
    return {stage: sorted(readers) for stage, readers in found.items()}


def test_the_kept_stages_tell_who_reads_them_and_prune_deletes_what_nobody_does(
        tmp_path, loaded, capsys):
    for out, changes in {"a": {}, "b": {"lr": 1e-3}, "c": {"max_new_tokens": 15}}.items():
        assert run(loaded, tmp_path, limit=1, out=str(tmp_path / out), **changes) == 0
    torn = tmp_path / "stages" / "X-apibank-tiny-0123456789ab.01234567.jsonl"
    torn.write_text('{"key": {"sta')
    assert read_by(tmp_path) == {"H": [["a", "b"], ["c"]], "G": [["a", "b"], ["c"]],
                                 "T": [["a"], ["b"], ["c"]], "X": [[]]}
    before = kept(tmp_path)
    rmtree(tmp_path / "c")
    capsys.readouterr()
    assert evaluate.main([str(tmp_path), "--stages"]) == 0
    said = capsys.readouterr().out
    assert said.count("no run") == 3 and "a, b" in said and "torn" in said
    sizes = [path.stat().st_size for path in tmp_path.glob("stages/*.jsonl")]
    assert f"{sum(sizes) / 1e3:,.1f} kB in all" in said
    assert evaluate.main([str(tmp_path), "--prune"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 3
    assert torn.exists() and sum((before - kept(tmp_path)).values()) == 3
    with loaded[0].model.register_forward_pre_hook(never):      # what a run reads is still there
        assert run(loaded, tmp_path, limit=1, out=str(tmp_path / "b"), lr=1e-3) == 0
    assert prune(tmp_path) == []


def never(*_):
    raise AssertionError("the model was called")


def test_nothing_is_pruned_while_a_run_works_there_or_where_a_run_does_not_tell_what_it_reads(
        tmp_path, loaded):
    def pruned(batch, config, kept):
        outcomes = self_improve(batch, config, kept)
        if kept.computing:
            with pytest.raises(ValueError, match="a run works in .*: prune when it has ended"):
                prune(tmp_path)
        return outcomes
    assert run(loaded, tmp_path, pruned, limit=1) == 0
    lines = kept(tmp_path)
    for content in ("{", "{}", '{"facts": {}}'):            # damaged, or of an older version
        (tmp_path / "run" / "config.json").write_text(content)
        with pytest.raises(ValueError, match="config.json does not tell what its run reads"):
            prune(tmp_path)
    assert kept(tmp_path) == lines
    with pytest.raises(FileNotFoundError, match="give a folder of runs"):
        prune(tmp_path / "run")


def test_nothing_is_pruned_under_a_run_that_has_only_read_so_far(tmp_path, loaded):
    """As one that was killed, and now goes on: no run folder names its lines."""
    assert run(loaded, tmp_path, limit=1) == 0
    rmtree(tmp_path / "run")
    agent, samples = loaded
    own = fill_in(Config(**{**OPTIONS, "out": str(tmp_path / "run")}))
    reader = Kept(agent, own, computing=False)
    reader(train.assess, [replace(samples[0], answers=())])
    with pytest.raises(ValueError, match="a run works in"):
        prune(tmp_path)
    del reader
    assert len(prune(tmp_path)) == 3


def test_what_a_stage_has_seen_that_is_no_stage_does_not_hide_who_reads_it():
    """As the samples whose pairs another one learns (`--control other` of research/tasks)."""
    key = {"stage": "T", "code": "1", "seen": [{"others": "ab"}, {"stage": "H", "code": "2"}]}
    assert agrees(key, {}, {"T": "1", "H": "2"}) and not agrees(key, {}, {"T": "1", "H": "3"})


def test_fresh_forgets_also_what_saw_lines_without_a_key(tmp_path):
    """As those of research that see all samples of a benchmark."""
    config = Config(out=str(tmp_path / "run"), model="tiny")
    seen = Lines({"a": 1})
    for _ in range(2):
        COMPUTED.clear()
        Kept(SimpleNamespace(facts={}), config)(write_after, SAMPLES[:1], seen)
        assert COMPUTED == ["a"]
        forget(config, {})


@stage("Y", Found, "seed")
def write_after(agent, samples, config, seen) -> list[Found]:
    return write_letters(agent, samples, config)


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
    ({"repetition_penalty": 0}, "--repetition-penalty 0: must be in (0, 10]"),
    ({"repetition_penalty": "much"}, "--repetition-penalty much"),
    ({"max_new_tokens": 0}, "--max-new-tokens 0"), ({"method": "ttd"}, "--teacher"),
    ({"teacher": "tiny"}, "--method ttd"), ({"method": "ttd", "teacher": "https://x/v1"}, "URL"),
    ({"model": "./nowhere"}, "nowhere"), ({"device": "nonsense"}, "--device nonsense"),
    ({"data": "nowhere.json"}, "nowhere.json"), ({"data": "VOID"}, "VOID"),
    ({"data": "ODD"}, "\\x1b[2Jf"),
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
    assert not (tmp_path / "run").exists() and not kept(tmp_path)       # nor do its lines count


def nested():
    def prompt(x): return []
    return prompt


def test_code_that_a_key_cannot_tell_is_refused(loaded):
    """Two nested functions of one name would share their lines."""
    with pytest.raises(ValueError, match="prompt in .*test_runs.py: .* top level"):
        replace(train.CALLING, prompt=nested())
    exec(compile("def prompt(x): return []", "<stdin>", "exec"), typed := {})
    with pytest.raises(ValueError, match="prompt has no file, .*: put it into a .py file"):
        replace(train.CALLING, prompt=typed["prompt"])      # typed at a prompt
    other = replace(train.CALLING, action_end="'")
    assert other.code["asks"] != train.CALLING.code["asks"]     # where an action ends is part of it


def test_a_sample_that_is_too_long_is_counted_and_not_the_end_of_the_run(tmp_path, capsys):
    path = tmp_path / "two.json"
    items = json.loads(FILES["LONG"]) + json.loads(ITEM % ("hi", "f", ""))
    path.write_text(json.dumps(items))
    assert main(argv(tmp_path, data=path)) == 0
    assert [record["outcome"] for record in found(tmp_path)][0] == "too long"
    assert "too long for the model's context: 1" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_named_before_the_first_sample(tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    path = write_checkpoint(tmp_path / "model") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path)
    assert main(argv(tmp_path, model=path.parent)) == 2
    assert "model.norm.weight holds numbers that are not finite" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named_before_anything_is_read(tmp_path, capsys, monkeypatch):
    def never(*_): raise AssertionError("the samples were looked for")
    monkeypatch.setattr(train.data, "load", never)
    assert main(argv(tmp_path, device="cuda")) == 2
    assert "--device cuda:0: torch finds no GPU here" in capsys.readouterr().err


def test_under_torchrun_a_gpu_for_each_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert fill_in(Config(device="cuda")).device == "cuda:3"
    assert fill_in(Config(device="cuda:1")).device == "cuda:1"
