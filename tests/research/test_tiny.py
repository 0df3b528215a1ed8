"""The tiny model's world: what its training never sees, what its tasks always hold, and that it
learns."""
import json
import random
from dataclasses import replace

import pytest
import torch

import data
from data.calls import check_call
from model import ModelConfig, Tokenizer
from research import tiny


@pytest.fixture(scope="module")
def training() -> dict[str, list[dict]]:
    return {bench: tiny.generate(bench, "train", 7, 1000) for bench in tiny.BENCHES}


def bundled(bench: str) -> list[dict]:
    return json.loads((tiny.ROOT / "data" / "samples" / f"{bench}.json").read_text())


def said(item: dict) -> str:
    query = item["query"]
    return query if isinstance(query, str) else "\n".join(turn["content"] for turn in query)


def values(item: dict) -> list:
    """What an item's calls pass, in either form of a call; flags are said in words."""
    calls = [answer.get("arguments", answer.get("parameters")) for answer in item["answers"]]
    return [v for call in calls for v in call.values() if not isinstance(v, bool)]


@pytest.mark.parametrize("bench", tiny.BENCHES)
def test_the_bundled_samples_can_be_made_again(bench):
    assert bundled(bench) == tiny.generate(bench, "held_out", tiny.SAMPLES_SEED, tiny.SAMPLES)


def test_no_tool_noun_or_phrase_of_the_bundled_samples_is_ever_in_training(training):
    tools = {tool["name"] for items in training.values() for x in items for tool in x["tools"]}
    for bench in tiny.BENCHES:
        assert tools.isdisjoint(tool["name"] for x in bundled(bench) for tool in x["tools"])
    for part, phrases in tiny.PHRASES["train"].items():
        assert set(phrases.split("|")).isdisjoint(tiny.PHRASES["held_out"][part].split("|")), part
    for kind in tiny.KINDS.values():
        assert kind.held_out not in kind.train.split("|")
    nouns = {}
    for split, domains in tiny.DOMAINS.items():
        security = "/".join(tiny.SECURITY[split].values()).split("/")
        lines = domains.strip().splitlines()
        nouns[split] = {noun for line in lines for noun in line.split(" | ")[0].split()}
        nouns[split].update(security)
    assert len(nouns["held_out"]) > 30 and nouns["train"].isdisjoint(nouns["held_out"])


@pytest.mark.parametrize("bench", tiny.BENCHES)
def test_gold_calls_fit_their_tools_and_each_value_stands_in_the_request(bench, training):
    for item in bundled(bench) + training[bench][:300]:
        sample = data.parse_sample(item, "x", "generated")
        assert not any(check_call(call, sample.tools) for call in sample.answers)
        assert all(str(value) in said(item) for value in values(item)), item


def test_a_similar_task_calls_the_same_tools_with_other_words(training):
    for items in training.values():
        for i, item in enumerate(items[:100]):
            new = tiny.similar(item, random.Random(i))
            before, after = (data.parse_sample(x, "x", "generated").answers for x in (item, new))
            assert [call.name for call in before] == [call.name for call in after]
            assert new["query"] not in said(item) and new["tools"] == item["tools"]
            assert all(str(value) in new["query"] for value in values(new))


SMALL = replace(ModelConfig.from_folder(tiny.TINY), num_hidden_layers=1, hidden_size=48,
                intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)


def test_a_few_steps_lower_the_loss(tmp_path):
    model, stage = tiny.new_model(SMALL, 0), replace(tiny.STAGES[0], steps=10, peak=4e-2)
    losses = tiny.fit(model, Tokenizer(tiny.TINY), tmp_path, stage, "0")
    assert sum(losses[-2:]) < sum(losses[:2]) - 1 and (tmp_path / "model.safetensors").is_file()


@torch.no_grad()
def test_padding_changes_no_loss():
    model, short, long = tiny.new_model(SMALL, 0), ([5, 6], [7, 8, 9]), ([5] * 40, [7] * 9)
    alone, other = (tiny.batch_loss(model, [row])[1] for row in (short, long))
    both = tiny.batch_loss(model, [short, long])[1]
    assert both == pytest.approx((3 * alone + 9 * other) / 12, abs=1e-5)
