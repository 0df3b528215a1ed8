"""The tiny model's world: what its training never sees, what its tasks always hold, and that it
learns."""
import json
import random
from dataclasses import replace

import pytest
import torch

from data import Sample
from data.calls import check_call
from data.chat import Tokenizer
from model import ModelConfig
from research import tiny

BUNDLED = {bench: json.loads((tiny.ROOT / "data" / "samples" / f"{bench}.json").read_text())
           for bench in tiny.BENCHES}
SMALL = replace(ModelConfig.from_folder(tiny.TINY), num_hidden_layers=1, hidden_size=48,
                intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def training() -> list[dict]:
    return [x for bench in tiny.BENCHES for x in tiny.generate(bench, "train", 7, 1000)]


@pytest.mark.parametrize("bench", tiny.BENCHES)
def test_the_bundled_samples_can_be_made_again(bench):
    assert BUNDLED[bench] == tiny.generate(bench, "held_out", tiny.SAMPLES_SEED, tiny.SAMPLES)


def test_no_tool_noun_or_phrase_of_the_bundled_samples_is_ever_in_training(training):
    tools = {tool["name"] for x in training for tool in x["tools"]}
    for items in BUNDLED.values():
        assert tools.isdisjoint(tool["name"] for x in items for tool in x["tools"])
    for part, phrases in tiny.PHRASES["train"].items():
        assert set(phrases.split("|")).isdisjoint(tiny.PHRASES["held_out"][part].split("|")), part
    for kind in tiny.KINDS.values():
        assert kind.held_out not in kind.train.split("|")
    nouns = {}
    for split, domains in tiny.DOMAINS.items():
        lines = domains.strip().splitlines()
        nouns[split] = {noun for line in lines for noun in line.split(" | ")[0].split()}
        nouns[split].update("/".join(tiny.SECURITY[split].values()).split("/"))
    assert len(nouns["held_out"]) > 30 and nouns["train"].isdisjoint(nouns["held_out"])


def checked(item: dict) -> Sample:
    """The sample, whose gold calls fit its tools, and of whose values each stands in its request;
    flags are said in words."""
    sample = tiny.sample_of(item)
    said = " ".join(message["content"] for message in sample.messages)
    for call in sample.answers:
        assert not check_call(call, sample.tools), item
        values = [v for v in call.arguments.values() if not isinstance(v, bool)]
        assert all(str(value) in said for value in values), item
    return sample


def test_tasks_hold_what_they_ask_and_so_do_similar_ones_in_other_words(training):
    for item in [x for items in BUNDLED.values() for x in items]:
        checked(item)
    for i, item in enumerate(training[::4]):
        new = tiny.similar(item, random.Random(i))
        before, after = checked(item), checked(new)
        assert [call.name for call in before.answers] == [call.name for call in after.answers]
        assert after.tools == before.tools and after.messages[0] not in before.messages


@torch.no_grad()
def test_padding_changes_no_loss():
    model, short, long = tiny.new_model(SMALL, 0), ([5, 6], [7, 8, 9]), ([5] * 40, [7] * 9)
    alone, other = (tiny.batch_loss(model, [row])[1] for row in (short, long))
    both = tiny.batch_loss(model, [short, long])[1]
    assert both == pytest.approx((3 * alone + 9 * other) / 12, abs=1e-5)


def test_a_few_steps_lower_the_loss(tmp_path):
    model, stage = tiny.new_model(SMALL, 0), replace(tiny.STAGES[0], steps=10, peak=4e-2)
    losses = tiny.fit(model, Tokenizer(tiny.TINY), tmp_path, stage, "0")
    assert sum(losses[-2:]) < sum(losses[:2]) - 1
