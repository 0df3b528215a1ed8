"""Call the right functions, by the Berkeley Function Calling Leaderboard's own rule.

    python -m research.tasks.bfcl                           # bundled samples and model
    python -m research.tasks.bfcl --data BFCL_v4_parallel.json --model DIR --adapt answer

Samples are asked, actions chosen and pairs written as train.py does; an answer is right by the rule
of bfcl_rule.py. FILE is the published form, {"id", "question", "function"} a line, with its
"ground_truth" in the line, or in the file of the same name in the folder possible_answer beside it.
The Python categories of one turn are read: simple, multiple, parallel, parallel_multiple, and the
live ones.
"""
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import data
import train
from augment import try_call_first, try_joint
from data import Sample, Task
from data.calls import Call, call_start, call_text
from data.formats import read_items, read_tools, read_turns
from research.tasks import TaskConfig, program, read_samples
from research.tasks.bfcl_rule import verdict

KINDS = {"string": "string", "integer": "integer", "float": "number", "boolean": "boolean",
         "array": "array", "tuple": "array", "dict": "object", "any": "any"}     # -> JSON schema's


def load(name: str, path: Path, read: Callable) -> list[Sample]:
    """The samples of a file, with the gold calls that stand beside it."""
    beside, golds = path.parent / "possible_answer" / path.name, {}
    if beside.is_file():
        for each in read_items(beside):
            if isinstance(each, dict):
                golds[str(each.get("id"))] = each.get("ground_truth")
    return read_samples(name, path, partial(read, golds=golds))


def read(item: dict, golds: dict) -> list[Sample]:
    """The sample of a line; ValueError says what is wrong with it. golds: by id, from beside."""
    id, turns, functions = str(item.get("id", "")), item.get("question"), item.get("function")
    gold = item.get("ground_truth", golds.get(id))
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], list):
        raise ValueError("'question' is not one turn, a list in a list: only such are read")
    if not isinstance(functions, list) or not all([isinstance(each, dict) for each in functions]):
        raise ValueError("'function' is not a list of objects")
    if not isinstance(gold, list) or not gold:
        raise ValueError("no 'ground_truth', and none with its id in possible_answer/ beside")
    typed = [{**each, "parameters": json_schema(each.get("parameters"))} for each in functions]
    tools, answers = read_tools(typed), []
    for each in gold:
        name, accepted = next(iter(each.items())) if isinstance(each, dict) and each else ("", 0)
        if name not in [tool["name"] for tool in tools] or not isinstance(accepted, dict) \
                or not all([isinstance(values, list) for values in accepted.values()]):
            raise ValueError(f"gold call {name!r:.40}: no such function, or no lists of values")
        answers.append(Call(name, accepted))
    return [Sample(id, read_turns(turns[0]), tools, tuple(answers))]


def json_schema(schema: object) -> dict:
    """The schema of an argument, at any depth, with JSON schema's names for the types."""
    if not isinstance(schema, dict) or not isinstance(schema.get("properties", {}), dict):
        raise ValueError("the schema of an argument, or of its parts, is not an object")
    new, kind = dict(schema), str(schema.get("type"))
    if kind not in KINDS:
        raise ValueError(f"type {kind!r:.40} is none of BFCL's for Python: {', '.join(KINDS)}")
    new["type"] = KINDS[kind]
    if kind == "any":
        del new["type"]
    if "properties" in schema:
        new["properties"] = {name: json_schema(each) for name, each in schema["properties"].items()}
    if "items" in schema:
        new["items"] = json_schema(schema["items"])
    return new


BFCL = Task(data.call_prompt, data.call_names, call_start, '"',
            {"call": try_call_first, "joint": try_joint}, verdict, call_text)


@train.exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """The program; gives its exit code."""
    return program(argv, "bfcl", BFCL, read, TaskConfig, __doc__, load=load)


if __name__ == "__main__":
    sys.exit(main())
