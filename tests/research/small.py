"""What tests of research share: a small agent, and lines of H, G and S that are made by hand."""
import json
from dataclasses import replace

import pytest
import torch
from hand_made import ONE, OTHER

from augment import Found
from data import Sample, request_text
from data.chat import Tokenizer
from data.runs import OUT_OF_MEMORY, Kept, Lines
from model import fingerprint, load_model
from train import CALLING, Agent, Assessed
from uncertainty import PrefixCaches

MISFIT, NONSENSE = ONE.replace("x", "y"), "no idea"
FACTS = dict.fromkeys(("weights", "shape", "tokenizer", "numerics", "asks", "tries", "writer",
                       "everyone", "split", "penalty", "order"), "")
OPTIONS = {"model": "small", "tau": 0.95, "max_new_tokens": 6, "epochs": 2, "lr": 1e-2}
TOOLS = [tuple({"name": name, "description": f"{i}", "parameters": {"x": {"type": "integer"}}}
               for name in "fgh") for i in range(3)]
SAMPLES = [Sample(f"toolalpaca-{i}", ({"role": "user", "content": f"Do {i}."},), TOOLS[i])
           for i in range(3)]


def assessed(id: str, text: str, margin: float = 0.0, nll: float = 0.0) -> Assessed:
    """A line of H."""
    request = next((request_text(x) for x in SAMPLES if x.id == id), "")
    return Assessed(id=id, request=request, candidates={"f": -1.0, "g": -9.0, "h": 0.0},
                    margin=margin, prompt_tokens=9, text=text, ids=[1], log_p=[-nll], entropy=[0.0])


def lost(id: str) -> Assessed:
    """A line of H for which the memory was too little."""
    return Assessed(id, OUT_OF_MEMORY)


def found(*pairs: list) -> dict[str, Found]:
    """Lines of G."""
    return {x.id: Found(x.id, pairs=own) for x, own in zip(SAMPLES, pairs)}


class Made(Kept):
    """Lines of stages that are made by hand; the others are computed. Nothing is written."""

    def __init__(self, agent, config, **made):
        super().__init__(agent, config)
        self.made = made

    def __call__(self, function, samples, *seen):
        name = function.stage.name
        if name not in self.made:
            return super().__call__(function, samples, *seen)
        return Lines({x.id: self.made[name][x.id] for x in samples})

    def read(self, stage, name): return {}

    def append(self, name, lines): pass


def keep(kept: Kept, function, samples, lines: list, *seen: Lines) -> Lines:
    """Keep lines that are made by hand as those of a stage."""
    def by_hand(agent, samples, config, *seen):
        return [line for line in lines if line.id in {x.id for x in samples}]
    by_hand.stage = function.stage
    return kept(by_hand, samples, *seen)


@pytest.fixture
def agent(checkpoint):
    """Whose weights and caches are theta_0's after the test, too."""
    model = load_model(checkpoint)
    model.config = replace(model.config, max_position_embeddings=2048)      # for examples, too
    agent = Agent(CALLING, model, Tokenizer(checkpoint), PrefixCaches(model), None, {**FACTS}, 1)
    weights = fingerprint(model)
    yield agent
    assert fingerprint(model) == weights
    for ids, cache in agent.prefixes.caches.items():
        fresh = PrefixCaches(model).read(ids)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fresh.values, cache.values))


def write_data(path, *requests, **arguments) -> str:
    """A file of samples in ToolAlpaca's form."""
    path.write_text(json.dumps([{"query": request, "tools": TOOLS[0], "answers": [
        {"name": "f", "arguments": arguments}]} for request in requests]))
    return str(path)


@pytest.fixture
def flags(checkpoint, tmp_path):
    """Of a run over three samples, whose gold calls are f(x=1)."""
    path = write_data(tmp_path / "data.json", "Do one.", "Do two.", "Do three.", x=1)
    return ["--bench", "toolalpaca", "--model", str(checkpoint), "--data", path, "--device", "cpu",
            "--max-new-tokens", "8", "--out", str(tmp_path / "run"), "--lr", "0.01"]
