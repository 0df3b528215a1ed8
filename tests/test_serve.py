"""A real OpenAI-compatible server as the teacher: `transformers serve` with a small checkpoint, on
the loopback. Skipped where it is not installed."""
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import write_checkpoint
from huggingface_hub import constants

import train
from augment import Form, Prompt, ServerWriter
from data.runs import read_run

LACKING = [name for name in ("transformers", "fastapi", "uvicorn", "openai")
           if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"no transformers serve: {LACKING} lack")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The URL of a server, which ends with the tests, and the name of its model."""
    folder = write_checkpoint(tmp_path_factory.mktemp("teacher"), max_position_embeddings=8192)
    template = (Path(__file__).parent / "qwen2.5_chat_template.jinja").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={
            **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)     # the library asks nobody else then
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_a_text_ends_at_the_limit_that_was_asked_for_and_says_so(teacher):
    prompts = [Prompt([{"role": "user", "content": text}]) for text in ("Hello.", "What now?")]
    texts = ServerWriter(*teacher)(prompts, 6, 0.7, 0.9, [(0, "a"), (0, "b")])
    assert all(text.problem == "cut at 6 tokens" and 0 < len(text) < 200 for text in texts)
    begun, = ServerWriter(*teacher)([Prompt(prompts[0].messages, "", Form("begun"))], 6, 0.7, 0.9,
                                    [(0, "a")])
    assert begun.startswith("begun")


def test_tt_d_runs_against_it_from_end_to_end(teacher, tmp_path):
    """This teacher writes nonsense, which is rejected; the run is whole and says so."""
    url, name = teacher
    assert train.main(["--bench", "sealtool", "--model", "tiny", "--device", "cpu", "--limit", "2",
                       "--tau", "1", "--method", "ttd", "--teacher", url, "--teacher-model", name,
                       "--teacher-option", "max_tokens=9", "--out", str(tmp_path / "run")]) == 0
    run = read_run(tmp_path / "run")
    assert [record.outcome for record in run.records] == ["no pair"] * 2
    assert all(len(record.rejected) == 3 for record in run.records)
    assert run.config["facts"]["writer"] == f"{name} at {url} max_tokens=9"
