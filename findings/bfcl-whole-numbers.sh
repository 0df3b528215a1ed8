#!/usr/bin/env bash
# BFCL's checker, and whole numbers where a float is declared: 12 for 12.0, alone and in a list.
#
# Guess, written before the run: the checker takes an int wherever a float is declared, since JSON
#   has but one kind of number and its code says that it allows Python's own conversion.
# So it is: it does for an argument that is a number (all of 134 published samples). In a list of
#   floats (array or tuple) an int is of a wrong type, unless the gold happens to spell its first
#   item as an int. Six published samples ask for whole numbers and have a gold with points: an
#   answer that repeats the numbers as the user wrote them is wrong (none of 6 is right).
# Why it matters: JavaScript and many others write 12.0 as 12, and a schema for a model's API says
#   "number" for BFCL's "float". A model loses these samples by its writer of JSON, not by its
#   answer. Who scores with this checker should turn ints into floats in such lists first. (One of
#   the six was reported to its project in 2025.)
# Versions: bfcl-eval 2026.3.23. Date: 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps bfcl-eval==2026.3.23
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys
import types
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# The table of models imports the library of every vendor. The checker reads one flag of it.
table = types.ModuleType("bfcl_eval.constants.model_config")
table.MODEL_CONFIG_MAPPING = {"any": types.SimpleNamespace(underscore_to_dot=False)}
sys.modules[table.__name__] = table
from bfcl_eval.constants.enums import Language
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker


def right(functions, calls, gold, category):
    return ast_checker(functions, calls, gold, Language.PYTHON, category, "any")["valid"]


def function(schema):
    return [{"name": "f", "description": "", "parameters": {
        "type": "dict", "properties": {"x": schema}, "required": ["x"]}}]


FLOAT = {"type": "float", "description": ""}
FLOATS = {"type": "array", "items": FLOAT, "description": ""}
print("bfcl-eval", version("bfcl-eval"))
print(f"{'declared':18}{'accepted':14}{'answer':14}right")
seen = []
for what, schema, accepted, answer in (
        ("float", FLOAT, 12.0, 12), ("array of float", FLOATS, [12.0, 15.0], [12.0, 15.0]),
        ("array of float", FLOATS, [12.0, 15.0], [12, 15]),
        ("array of float", FLOATS, [12, 15], [12, 15]),
        ("array of float", FLOATS, [12, 15], [12.0, 15.0])):
    is_right = right(function(schema), [{"f": {"x": answer}}], [{"f": {"x": [accepted]}}], "simple")
    print(f"{what:18}{accepted!s:14}{answer!s:14}{is_right}")
    seen.append(is_right)


def rewritten(gold, change):
    """The gold calls with the first accepted values; objects are left out."""
    calls = []
    for call in gold:
        (called, arguments), = call.items()
        first = {key: next((each for each in values if each != ""), "")
                 for key, values in arguments.items()}
        calls.append({called: {key: change(value) for key, value in first.items()
                               if value != "" and not isinstance(value, dict)}})
    return calls


def same(value):
    return value


def whole(value):
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole_items(value):
    return list(map(whole, value)) if isinstance(value, list) else value


counts, lost = {whole: [0, 0], whole_items: [0, 0]}, []
data = Path(find_spec("bfcl_eval").submodule_search_locations[0], "data")
for category in ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple",
                 "live_multiple", "live_parallel", "live_parallel_multiple"):
    name = f"BFCL_v4_{category}.json"
    golds = [json.loads(line)["ground_truth"] for line in (data / "possible_answer" / name).open()]
    for line, gold in zip((data / name).open(), golds):
        sample, calls = json.loads(line), rewritten(gold, same)
        if not right(sample["function"], calls, gold, category):
            continue                        # it needs an object, or nothing is right
        for change, count in counts.items():
            changed = rewritten(gold, change)
            if json.dumps(changed) != json.dumps(calls):
                is_right = right(sample["function"], changed, gold, category)
                count[0] += 1
                count[1] += is_right
                lost += [sample["id"]] * (not is_right)
alone, in_lists = counts.values()
print(f"published samples whose gold has a whole float as an argument: {alone[0]};"
      f" right if it is written as an int: {alone[1]}")
print(f"published samples whose gold has one in a list: {in_lists[0]}; right if so: {in_lists[1]}")
print(*lost)
assert seen == [True, True, False, True, True], seen
assert alone == [134, 134] and in_lists == [6, 0], (alone, in_lists)
print("as described")
PYTHON
