"""What a benchmark gives away: each rule on samples that are made by hand."""
import json
from dataclasses import replace

import pytest

from data import Sample, load
from data.calls import Call, call_text
from data.runs import digest
from research import benchmarks
from research.benchmarks import FOUND, listed, main
from research.scores import numbered

TOOLS = ({"name": "bookHotel", "description": "Book a room.", "parameters": {
    "city": {"type": "string"}, "nights": {"type": "integer"}, "day": {"type": "string"},
    "kind": {"type": "string", "enum": ["twin", "suite"]}, "tags": {"type": "list(str)"},
    "paid": {"type": "boolean"}, "api_key": {"type": "string"}}},
    {"name": "list_rooms", "description": "All rooms of a hotel.", "parameters": {}},
    {"name": "cancel", "description": "Cancel what was booked.", "parameters": {}})


def sample(*turns: str, gold=(), tools=TOOLS, id="a") -> Sample:
    """A dialogue that the user begins, and gold calls."""
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": text}
                     for i, text in enumerate(turns))
    return Sample(id, messages, tools, tuple(gold))


def booked(said: str, **arguments) -> Sample:
    return sample(said, gold=[Call("bookHotel", arguments)])


@pytest.mark.parametrize("rule, x, found", [
    ("tool", sample("x", gold=[Call("list_rooms", {}), Call("gone", {})]), ["gone is not offered"]),
    ("argument", booked("for 3", nights=3, beds=3), ["bookHotel has no beds"]),
    ("value", booked("in paris", city="Paris"), []),
    ("value", booked("the 'Old \"Inn\" of' it", city="Old Inn of"), []),
    ("value", booked("in Parisot", city="Paris"), ["city = Paris"]),
    ("value", booked("a room", kind="suite"), []),              # the schema says it
    ("value", booked("three nights", nights=3), []), ("value", booked("for $3.00", nights=3), []),
    ("value", booked("token 'a3b'", nights=3), ["nights = 3"]),
    ("value", booked("13 or 2,345", nights=2345), []),
    ("value", booked("x", paid=True, city="", day=None), []),
    ("value", booked("May 3rd", day="2023-05-03"), []), ("value", booked("May 3", day="05-03"), []),
    ("value", booked("Sept 4", day="2023-09-04"), []),
    ("value", booked("on 2023-5-3", day="2023-05-03 00:00"), []),
    ("value", booked("May 3rd", day="2023-05-04"), ["day = 2023-05-04"]),
    ("value", booked("May 3rd, 2pm", day="2023-05-03 14:00:00"), []),
    ("value", booked("May 3 at 2:30 PM", day="2023-05-03 14:30:00"), []),
    ("value", booked("May 3 at 2 PM", day="2023-05-03 14:30:00"), ["day = 2023-05-03 14:30:00"]),
    ("value", booked("May 3", day="2023-05-03 00:00"), []),
    ("value", booked("May 3 at noon", day="2023-05-03 12:00"), []),
    ("value", booked("May 3", day="2023-05-03 16:00"), ["day = 2023-05-03 16:00"]),
    ("value", booked("December", day="13-45"), ["day = 13-45"]),       # no month, so no date
    ("value", booked("December", day="00-45"), ["day = 00-45"]),
    ("value", booked("a and b", tags=["a", "b", "c"]), ["tags = c"]),
    ("value", booked("a and b", tags="['a', 'b', 'c']"), ["tags = c"]),
    ("value", booked("1", tags="[{'n': '1', 'm': '2'}]"), ["tags = 2"]),
    ("key", booked("x", api_key="K7", city="Rome"), ["api_key = K7"]),
    ("key", booked("my key is K7", api_key="K7"), []),
    ("year", booked("May 3", day="2023-05-03"), ["day = 2023-05-03"]),
    ("year", booked("May 3, 2023", day="2023-05-03"), []),
    ("kind", booked("3", nights="3", city=3, paid="true"),
     ["nights: string for integer", "city: integer for string", "paid: string for boolean"]),
    ("kind", booked("3", nights=3, tags=[], day=None), []),
    ("text", booked("in Rome", city="Rome", day="Paris", nights=9), ["day = Paris"])])
def test_a_rule_finds_what_its_docstring_says(rule, x, found):
    assert FOUND[rule](x) == found


PAST = call_text([Call("list_rooms", {})])


@pytest.mark.parametrize("rule, turns, expected", [
    ("first", ["Cancel it."], "bookHotel"), ("shared", ["Cancel what you booked."], "cancel"),
    ("shared", ["All rooms of the hotel?"], "list_rooms"), ("shared", ["Hm."], "bookHotel"),
    ("shared", ["Cancel it.", PAST, "Now rooms of a hotel?"], "list_rooms"),
    ("fresh", ["Cancel it.", PAST, "Now rooms of a hotel?"], "bookHotel"),
    ("again", ["List.", PAST, "And?"], "list_rooms"), ("again", ["List."], None)])
def test_a_rule_answers_without_a_model(rule, turns, expected):
    x = sample(*turns)
    said = [call.name for call in benchmarks.ANSWERS[rule](x)]
    assert said == [expected] * bool(expected)
    gold = replace(x, answers=(Call("cancel", {}),))
    assert listed([gold], rule) == {"a": said * (expected == "cancel")}


def test_where_all_tools_were_called_any_may_be_called_again():
    x = sample("List.", PAST, "Again", tools=TOOLS[1:2])
    assert [call.name for call in benchmarks.fresh(x)] == ["list_rooms"]


def test_doubles_and_golds_that_stand_in_another_prompt():
    one = sample("List.", gold=[Call("list_rooms", {})])
    twin, later = replace(one, id="b"), sample("List.", PAST, "Cancel.", id="c")
    other = sample("List!", gold=[Call("cancel", {})], id="d")
    assert listed([one, twin, later, other], "double") == {"a": [], "b": ["a"], "c": [], "d": []}
    assert listed([one, twin, later, other], "held") == {"a": ["c"], "b": ["c"], "c": [], "d": []}


def test_turns_that_begin_anothers_are_of_one_dialogue():
    said = ["b c", "a", "b", "a b", "", "b c d", "bc"]
    assert numbered([text.split() for text in said[:4]]) == [1, 0, 1, 0]
    found = numbered([text.split() for text in [*said[:4], *said[5:]]])
    assert len(set(found)) == 3 and found[0] == found[2] == found[4] != found[5]
    assert benchmarks.dialogues([sample("a"), sample("a", "b", "c"), sample("ab")]) == [0, 0, 1]


def test_what_was_read_by_hand_counts_and_the_figures_are_kept_for_runs(
        tmp_path, monkeypatch, capsys):
    """Four samples: one can be known, one only by hand, one not, and one not although no rule says
    so."""
    items = [{"query": said, "tools": list(TOOLS),
              "answers": [{"name": "bookHotel", "arguments": {"city": city}}]}
             for said, city in (("to Rome", "Rome"), ("to Italy", "IT"), ("far", "Oslo"),
                                ("not to Rome", "Rome"))]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(items))
    samples = load("own", str(path))
    read = {benchmarks.fingerprint(samples[1]): [True, "a code"],
            benchmarks.fingerprint(samples[3]): [False, "it is denied"]}
    (tmp_path / "read.json").write_text(json.dumps(read))
    monkeypatch.setattr(benchmarks, "HAND_READ", tmp_path / "read.json")
    (tmp_path / "known.json").write_text("{}")
    monkeypatch.setattr(benchmarks, "KNOWN", tmp_path / "known.json")
    assert benchmarks.unknown(samples) == ({"own-2": "city = Oslo", "own-3": "it is denied"}, 2)
    assert main(["--data", str(path), "--list", "unknown"]) == 0
    assert capsys.readouterr().out == "own-2: city = Oslo\nown-3: it is denied\n"
    assert main(["--data", str(path), "--list", "nonsense"]) == 2
    assert main(["--data", str(path), "--write"]) == 0
    head, _, row = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:5]]
    shown = {name.strip(): cell.strip() for name, cell in zip(head, row)}
    assert (shown["n"], shown["known"], shown["read by hand"]) == ("4", "50.00", "2")
    assert (shown["first"], shown["again"], shown["dialogues"]) == ("100.00", "0.00", "4")
    assert json.loads((tmp_path / "known.json").read_text()) == {digest(samples): [50.0, 100.0]}


def test_each_sample_that_was_read_by_hand_has_its_reason():
    read = json.loads(benchmarks.HAND_READ.read_text(encoding="utf-8"))
    assert all(isinstance(known, bool) and why for known, why in read.values())
