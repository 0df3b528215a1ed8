"""What tests of research share: a small agent, and lines of H, G and S that are made by hand."""
import json

import pytest
from hand_made import ONE, OTHER

from augment import Found
from data import Sample
from model import Tokenizer, fingerprint, load_model
from train import Agent, Assessed, PrefixCaches

MISFIT, NONSENSE = ONE.replace("x", "y"), "no idea"
OPTIONS = {"model": "small", "tau": 0.95, "max_new_tokens": 6, "epochs": 2, "lr": 1e-2}
TOOLS = [tuple({"name": name, "description": f"{i}", "parameters": {"x": {"type": "integer"}}}
               for name in "fgh") for i in range(3)]
SAMPLES = [Sample(f"toolalpaca-{i}", ({"role": "user", "content": f"Do {i}."},), TOOLS[i])
           for i in range(3)]


def assessed(id: str, text: str, margin: float = 0.0, nll: float = 0.0) -> Assessed:
    """A line of H."""
    return Assessed(id=id, request="", candidates={"f": -1.0, "g": -9.0, "h": 0.0}, margin=margin,
                    prompt_tokens=9, text=text, ids=[1], log_p=[-nll], entropy=[0.0])


def found(*pairs: list) -> dict[str, Found]:
    """Lines of G."""
    return {x.id: Found(x.id, own) for x, own in zip(SAMPLES, pairs)}


def made(**lines):
    """A Kept that holds the lines of these stages, and computes the others."""
    def kept(stage, samples, compute):
        if stage.name in lines:
            return {x.id: lines[stage.name][x.id] for x in samples}
        return {line.id: line for line in (compute(samples) if samples else [])}
    return kept


@pytest.fixture
def agent(checkpoint):
    """Whose weights and caches are theta_0's after the test, too."""
    model = load_model(checkpoint)
    agent = Agent(model, Tokenizer(checkpoint), PrefixCaches(model), None, {}, 1)
    weights = fingerprint(model)
    yield agent
    assert fingerprint(model) == weights
    for ids, cache in agent.prefixes.caches.items():
        fresh = PrefixCaches(model).read(ids)
        assert all((a == b).all() for a, b in zip(fresh.values, cache.values))


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
