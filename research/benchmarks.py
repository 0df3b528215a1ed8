"""What does a benchmark give away, and what can nobody know of it? Rules, without a model.

    python -m research.benchmarks --data DIR                        # the table, of all files
    python -m research.benchmarks --data DIR --bench sealtool --list value      # what a rule found
    python -m research.benchmarks --data FILE --write       # for the notes under a run's table

Each rule is a function, and its docstring is the rule. What a rule found was read by hand for the
samples in benchmarks.json: there stands, by a digest of the sample, whether its gold calls can be
known nevertheless, and why. The answer stands in research/RESULTS.md, "What the benchmarks give
away, and what nobody can know".
"""
import argparse
import contextlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

if not __package__:
    print("Call it in the project's folder as: python -m research.benchmarks", file=sys.stderr)
    sys.exit(2)

import data
from augment import stands_in
from data import Sample
from data.calls import (Call, Spelled, as_json, call_text, parse_calls, type_of, value_key)
from data.runs import digest
from evaluate import KNOWN, exact_match
from research.scores import numbered, show
from train import exit_codes

HAND_READ = Path(__file__).with_suffix(".json")     # digest: [can be known, why]
NUMBERS = {word: i for i, word in enumerate("""zero one two three four five six seven eight nine
    ten eleven twelve""".split())}
MONTHS = """january february march april may june july august september october november
    december""".split()
STOP = frozenset("""a about an and are as at be by can could do does for from get give has have how
    i if in is it me my need of on or please should that the this to want was what will with would
    you your""".split())


# --- What is read of a sample ---------------------------------------------------------------------

def dialogue(x: Sample) -> str:
    """All that is said before the answer, results of earlier calls too."""
    return "\n".join([message["content"] for message in x.messages])


def gold_arguments(x: Sample) -> Iterator[tuple[str, object, dict | None, dict]]:
    """(argument, value, its schema or None, its tool) of the gold calls of offered tools."""
    tools = {tool["name"]: tool for tool in x.tools}
    for call in x.answers or ():
        tool = tools.get(call.name, {"parameters": {}})
        for name, value in call.arguments.items() if call.name in tools else ():
            yield name, value, tool["parameters"].get(name), tool


def leaves(value: object) -> Iterator[object]:
    """The plain values in a value; a list or object that is written as a text is read."""
    kind, content = value_key(value, {"type": "list"}) if isinstance(value, str) else ("", None)
    if kind == "array":
        value = [each for _, each in content]
    if isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from leaves(each)
    elif isinstance(value, frozenset):              # an object, as value_key has it
        yield from leaves([each for _, (_, each) in value])
    else:
        yield value.number if isinstance(value, Spelled) else value


def called(x: Sample) -> list[Call]:
    """The calls that the dialogue has made already."""
    said = [message["content"] for message in x.messages if message["role"] == "assistant"]
    return [call for text in said for call in parse_calls(text).calls]


# --- Rules of what cannot be known: sample -> what was found --------------------------------------

def tool(x: Sample) -> list[str]:
    """A gold call is of a tool that is not offered."""
    offered = {tool["name"] for tool in x.tools}
    return [f"{call.name} is not offered" for call in x.answers or () if call.name not in offered]


def argument(x: Sample) -> list[str]:
    """A gold argument is not in its tool's schema."""
    return [f"{tool['name']} has no {name}" for name, _, schema, tool in gold_arguments(x)
            if schema is None]


def value(x: Sample) -> list[str]:
    """A gold value is neither said in the dialogue (as whole words, whatever case and quotation
    marks; a number also as a word or with other zeros; a date by its month and day) nor, as a text,
    in its tool's schema. true, false, null and "" need no spelling, nor do midnight and a year."""
    found, said = [], dialogue(x).replace('"', "")
    for name, whole, schema, tool in gold_arguments(x):
        for each in leaves(whole):
            in_schema = isinstance(each, str) and stands_in(each, as_json(tool))
            free = each in ("", None) or isinstance(each, bool) or str(each) in ("True", "False")
            if not (free or in_schema or is_said(each, said)) and schema is not None:
                found.append(f"{name} = {each}")
    return found


def key(x: Sample) -> list[str]:
    """Such a value is a key: its argument's name says so."""
    return [each for each in value(x) if re.match(r"(\w+_)?key\b|appid|token", each)]


def year(x: Sample) -> list[str]:
    """A gold value is a date whose year nobody says, so it is guessed."""
    said = dialogue(x)
    found = [(name, each) for name, whole, _, _ in gold_arguments(x) for each in leaves(whole)]
    return [f"{name} = {each}" for name, each in found
            if re.match(r"\d{4}-\d\d-\d\d\b", str(each)) and str(each)[:4] not in said]


def kind(x: Sample) -> list[str]:
    """A gold value is of another JSON type than its schema declares."""
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array",
             dict: "object"}
    found = []
    for name, each, schema, _ in gold_arguments(x):
        declared, given = type_of(schema or {})[0], names.get(type(each), "")
        fits = declared in ("", given) or (declared, given) == ("number", "integer")
        if not fits and given:
            found.append(f"{name}: {given} for {declared}")
    return found


def text(x: Sample) -> list[str]:
    """A gold text is not spelled in the request (or dialogue)."""
    said = dialogue(x)
    return [f"{name} = {each}" for name, each, _, _ in gold_arguments(x)
            if isinstance(each, str) and each and not stands_in(each, said)]


def is_said(each: object, said: str) -> bool:
    """Whether a dialogue says a value, as the rule `value` has it."""
    if stands_in(each, said):
        return True
    words = set(re.findall(r"[a-z]+|(?<![a-z0-9])\d+(?:\.\d+)?(?=\b|st|nd|rd|th|am|pm)",
                           re.sub(r"(?<=\d),(?=\d)", "", said.lower())))
    numbers = {Decimal(word) for word in words if word[0].isdecimal()}
    numbers |= {Decimal(NUMBERS[word]) for word in words & NUMBERS.keys()}
    date = re.fullmatch(r"(?:\d{4}-)?(\d\d)-(\d\d)(?:[ T](\d\d):(\d\d)(?::00)?)?", str(each))
    if date and 1 <= int(date[1]) <= 12:
        month, day, hour, minute = [int(part or 0) for part in date.groups()]
        names = {MONTHS[month - 1], MONTHS[month - 1][:3], MONTHS[month - 1][:4]}
        named = bool(words & names) or re.search(rf"\b0?{month}-0?{day}\b", said)
        noon = hour == 12 and "noon" in words
        timed = hour == minute == 0 or noon or {hour, hour % 12 or 12} & numbers
        return bool(named and day in numbers and timed and (not minute or minute in numbers))
    is_number = re.fullmatch(r"-?\d+(\.\d+)?", str(each))
    return bool(is_number) and Decimal(str(each)) in numbers


# --- Rules that answer without a model: sample -> calls -------------------------------------------

def words(text: str) -> set[str]:
    """The words of a text without the commonest, `getUserById` as four; a plural's s is dropped."""
    apart = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", text).lower()
    found = set(re.findall(r"[a-z0-9]+", apart)) - STOP
    return {word[:-1] if len(word) > 3 and word[-1] == "s" else word for word in found}


def most_shared(x: Sample, tools: Sequence[dict]) -> str:
    """The tool whose name and description share most words with the last two turns; of several the
    first."""
    said = words(" ".join([message["content"] for message in x.messages[-2:]]))
    shared = [len(said & words(f"{tool['name']} {tool['description']}")) for tool in tools]
    return tools[shared.index(max(shared))]["name"]


def first(x: Sample) -> list[Call]:
    """The first tool."""
    return [Call(x.tools[0]["name"])]


def shared(x: Sample) -> list[Call]:
    """The tool that shares most words with the last two turns, with no arguments."""
    return [Call(most_shared(x, x.tools))]


def fresh(x: Sample) -> list[Call]:
    """The same among the tools that the dialogue has not called yet."""
    before = {call.name for call in called(x)}
    return [Call(most_shared(x, [t for t in x.tools if t["name"] not in before] or x.tools))]


def again(x: Sample) -> list[Call]:
    """The last call of the dialogue once more."""
    return called(x)[-1:]


# --- Rules over a file ----------------------------------------------------------------------------

def double(samples: Sequence[Sample]) -> dict[str, list[str]]:
    """The dialogue, the tools and the gold calls of a sample before."""
    seen, found = {}, {}
    for x in samples:
        before = seen.setdefault(digest([x.messages, x.tools, x.answers]), x.id)
        found[x.id] = [before] * (before != x.id)
    return found


def held(samples: Sequence[Sample]) -> dict[str, list[str]]:
    """The gold calls stand word for word in another sample's dialogue."""
    found, told = {}, {x.id: dialogue(x) for x in samples}
    for x in samples:
        golds = [call_text([call]) for call in x.answers or ()]
        found[x.id] = [id for id in told if golds and id != x.id
                       and all([gold in told[id] for gold in golds])][:1]
    return found


def dialogues(samples: Sequence[Sample]) -> list[int]:
    """For each sample the number of its dialogue: where one's turns begin another's, it is one."""
    return numbered([[as_json(turn) for turn in x.messages] for x in samples])


# --- The table ------------------------------------------------------------------------------------

UNKNOWN = (tool, argument, value)
FOUND = {rule.__name__: rule for rule in (*UNKNOWN, key, year, kind, text)}
ANSWERS = {rule.__name__: rule for rule in (first, shared, fresh, again)}
WHOLE = {rule.__name__: rule for rule in (double, held)}


def unknown(samples: Sequence[Sample]) -> tuple[dict[str, str], int]:
    """Why no one can know a sample's gold calls, by id, and how many of the rules' finds were read
    by hand."""
    read, found, by_hand = json.loads(HAND_READ.read_text(encoding="utf-8")), {}, 0
    for x in samples:
        whys = [why for rule in UNKNOWN for why in rule(x)]
        known, why = read.get(fingerprint(x), [not whys, "; ".join(whys)])
        by_hand += fingerprint(x) in read
        if not known:
            found[x.id] = why
    return found, by_hand


def fingerprint(x: Sample) -> str:
    """What a sample is called in benchmarks.json, whatever its place in a file."""
    return digest([x.messages, x.answers])[:12]


def listed(samples: Sequence[Sample], rule: str) -> dict[str, list[str]]:
    """What a rule found, by sample id. Of an answering rule: where it is right."""
    if rule == "unknown":
        return {id: [why] for id, why in unknown(samples)[0].items()}
    if rule in WHOLE:
        return WHOLE[rule](samples)
    if rule in FOUND:
        return {x.id: FOUND[rule](x) for x in samples}
    return {x.id: [call.name for call in ANSWERS[rule](x)] * names(x, rule) for x in samples}


def names(x: Sample, rule: str) -> bool:
    """Whether a rule names the gold calls' tools."""
    return Counter(c.name for c in ANSWERS[rule](x)) == Counter(c.name for c in x.answers or ())


def figures(bench: str, samples: Sequence[Sample]) -> dict:
    """One row of the table: shares in percent of the samples (of the values for `text`)."""
    never, by_hand = unknown(samples)
    count = {rule: sum(map(bool, listed(samples, rule).values())) for rule in (*FOUND, *WHOLE)}
    values = [v for x in samples for _, v, _, _ in gold_arguments(x) if isinstance(v, str) and v]
    row = {"file": bench, "n": len(samples), "known": len(samples) - len(never),
           "read by hand": by_hand, "key": count["key"], "year": count["year"]}
    for rule in ANSWERS:
        row[rule] = sum([names(x, rule) for x in samples])
    for rule in ("shared", "again"):
        right = [exact_match(call_text(ANSWERS[rule](x)), x).exact for x in samples]
        row[f"{rule}, exact"] = sum(filter(None, right))
    shares = {name: 100 * number / len(samples) for name, number in row.items()
              if name in ("known", *ANSWERS) or name.endswith("exact")}
    unspelled = sum([len(text(x)) for x in samples])
    return row | shares | {"other type": 100 * count["kind"] / len(samples),
                           "unspelled texts": 100 * unspelled / max(1, len(values)),
                           "doubles": count["double"], "held": count["held"],
                           "dialogues": max(dialogues(samples)) + 1}


def write(samples: Sequence[Sample], row: dict) -> None:
    """Put a file's figures where a run's table looks for them."""
    there = json.loads(KNOWN.read_text(encoding="utf-8"))
    there[digest(samples)] = [round(row["known"], 1), round(max(map(row.get, ANSWERS)), 1)]
    lines = ",\n".join([f"{json.dumps(name)}: {there[name]}" for name in sorted(there)])
    KNOWN.write_text("{" + lines + "}\n", encoding="utf-8")


# --- The program ----------------------------------------------------------------------------------

@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="a folder of the published files, or a file")
    parser.add_argument("--bench", default="", choices=[*data.PUBLISHED], help="one of them alone")
    parser.add_argument("--list", default="", metavar="RULE", help="what a rule found: unknown, "
                        + ", ".join([*FOUND, *WHOLE, *ANSWERS]))
    parser.add_argument("--write", action="store_true", help="keep the figures for runs' tables")
    args = parser.parse_args(argv)
    if args.list and args.list not in ("unknown", *FOUND, *WHOLE, *ANSWERS):
        raise ValueError(f"--list {args.list}: choose unknown, {', '.join([*FOUND, *WHOLE])} or "
                         f"{', '.join(ANSWERS)}")
    own = Path(args.data).expanduser()
    benches = [args.bench] if args.bench else [*data.PUBLISHED]
    if own.is_dir() and not args.bench:
        benches = [bench for bench in benches if (own / data.PUBLISHED[bench][0]).is_file()]
    elif own.is_file() and not args.bench:
        benches = [own.stem]
    rows = []
    for bench in benches:
        with contextlib.redirect_stdout(io.StringIO()):         # what it leaves out
            samples = data.load(bench, args.data)
        if args.list:
            for id, found in listed(samples, args.list).items():
                if found:
                    print(f"{id}: {'; '.join(found)}")
            continue
        rows.append(figures(bench, samples))
        if args.write:
            write(samples, rows[-1])
    if rows:
        show({"What a file gives away, in percent where not a count": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
