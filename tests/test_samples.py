"""The bundled samples: what the generator makes, unlike all that it trains on, and answerable from their own text."""
import json
import random

import pytest

import data
from data.calls import check_call
from data.tiny import make


@pytest.fixture(scope="module")
def training() -> dict[str, list[dict]]:
    return {bench: make.generate(bench, "train", 7, 5000) for bench in make.BENCHES}


def said(query: str | list[dict]) -> str:
    return query if isinstance(query, str) else "\n".join(turn["content"] for turn in query)


def bundled(bench: str) -> list[dict]:
    return json.loads((make.ROOT / "data" / "samples" / f"{bench}.json").read_text())


def gold(item: dict) -> list[tuple[str, dict]]:
    """(name, arguments) of an item's answers, in either form."""
    return [(a["tool"], a["parameters"]) if "tool" in a else (a["name"], a["arguments"]) for a in item["answers"]]


def every_value_is_said(item: dict, text: str) -> bool:
    """Whether each value stands in the text as it is; a flag's does in one of the words for it."""
    for _, arguments in gold(item):
        for value in arguments.values():
            words = [phrases[i][not value] for phrases in make.FLAGS.values() for i in (0, 1)]
            if not (any(w in text for w in words) if isinstance(value, bool) else str(value) in text):
                return False
    return True


@pytest.mark.parametrize("bench", make.BENCHES)
def test_bundled_file_is_what_the_generator_makes(bench):
    text = (make.ROOT / "data" / "samples" / f"{bench}.json").read_text()
    assert text == make.samples_text(bench)
    assert len(data.load(bench, bundled=True)) == make.SAMPLES


def test_held_out_tools_and_phrases_never_occur_in_training(training):
    names = {tool["name"] for items in training.values() for item in items for tool in item["tools"]}
    requests = {said(item["query"]) for items in training.values() for item in items}
    for bench in make.BENCHES:
        for item in bundled(bench):
            assert names.isdisjoint(tool["name"] for tool in item["tools"])
            assert said(item["query"]) not in requests
    for part, phrases in make.PHRASES["train"].items():
        assert set(phrases).isdisjoint(make.PHRASES["held_out"][part]), part
    for kind, row in make.KINDS.items():
        assert row[3] not in row[2].split("|"), kind
    nouns = [{noun for row in make.DOMAINS[split].values() for noun in row[0].split()} | set(make.SECURITY[split])
             for split in ("train", "held_out")]
    assert nouns[0].isdisjoint(nouns[1])


@pytest.mark.parametrize("bench", make.BENCHES)
def test_gold_calls_fit_their_tools_and_their_values_are_said(bench, training):
    for i, item in enumerate(bundled(bench) + training[bench][:500]):
        sample = data.parse_sample(item, f"{bench}-{i}", "generated")
        assert [check_call(call, sample.tools) for call in sample.answers] == [""] * len(sample.answers), item
        assert every_value_is_said(item, said(item["query"])), item


def test_a_similar_task_has_the_same_tools_and_calls_but_other_words(training):
    for bench in make.BENCHES:
        for i, item in enumerate(training[bench][:200]):
            new = make.similar(item, random.Random(i))
            assert new["tools"] == item["tools"] and isinstance(new["query"], str)
            assert new["query"] not in said(item["query"])
            assert [name for name, _ in gold(new)] == [name for name, _ in gold(item)]
            assert every_value_is_said(new, new["query"])
            sample = data.parse_sample(new, "new", "generated")
            assert not any(check_call(call, sample.tools) for call in sample.answers)


def test_one_seed_makes_one_sequence_of_tasks():
    assert make.generate("sealtool", "train", 3, 5) == make.generate("sealtool", "train", 3, 9)[:5]
    assert make.generate("sealtool", "train", 3, 5) != make.generate("sealtool", "train", 4, 5)
    with pytest.raises(ValueError, match="nothing_such"):
        make.generate("nothing_such", "train", 0, 1)


def test_no_verb_means_two_things_and_no_parameter_name_two_kinds():
    verbs = [verb for group in make.VERBS for verb in group]
    assert len(set(verbs)) == len(verbs)
    names = [alias for kind, row in make.KINDS.items() for alias in (kind, *row[4].split())]
    assert len(set(names)) == len(names) and set(names).isdisjoint(make.FLAGS)
