#!/usr/bin/env bash
# BFCL's checker for several calls: is a right answer right in any order of its calls?
#
# Guess, written before the run: yes, in any order, as the checker's own name says. (That it takes
#   the first call that fits was known from its code, but not that a published sample meets it.)
# So it is: not where one gold call accepts more than another. Each gold call takes the first call
#   of the answer that fits it, and never gives it back; the last gold call may then find none,
#   though there is a way to serve all. This meets one published sample: of the 24 orders of its
#   right answer 12 are wrong.
# Why it matters: a model's score, and a reward made of it, depend on the order in which the model
#   writes its calls; and who widens a gold call by another accepted value can turn a right answer
#   into a wrong one. A matching of calls to gold calls (scipy has one) has neither fault.
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
from itertools import permutations
from pathlib import Path

# The table of models imports the library of every vendor. The checker reads one flag of it.
table = types.ModuleType("bfcl_eval.constants.model_config")
table.MODEL_CONFIG_MAPPING = {"any": types.SimpleNamespace(underscore_to_dot=False)}
sys.modules[table.__name__] = table
from bfcl_eval.constants.enums import Language
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker


def right(functions, calls, gold):
    return ast_checker(functions, calls, gold, Language.PYTHON, "parallel", "any")["valid"]


def first_values(gold):
    """The gold calls, each argument with the first of its accepted values."""
    calls = []
    for call in gold:
        (called, arguments), = call.items()
        calls.append({called: {key: value for key, (value, *_) in arguments.items()
                               if value != ""}})
    return calls


weather = [{"name": "weather", "description": "", "parameters": {
    "type": "dict", "properties": {"city": {"type": "string", "description": ""}},
    "required": ["city"]}}]
print("bfcl-eval", version("bfcl-eval"))
seen = []
for gold in ([["Bern"], ["Basel"]], [["Bern", "Basel"], ["Basel"]]):
    for cities in (["Bern", "Basel"], ["Basel", "Bern"]):
        calls = [{"weather": {"city": city}} for city in cities]
        wanted = [{"weather": {"city": accepted}} for accepted in gold]
        seen.append(right(weather, calls, wanted))
        print(f"accepted {gold!s:32} answer {cities!s:20} right: {seen[-1]}")

data, found, samples = Path(find_spec("bfcl_eval").submodule_search_locations[0], "data"), {}, 0
for category in ("parallel", "parallel_multiple", "live_parallel", "live_parallel_multiple"):
    name = f"BFCL_v4_{category}.json"
    golds = [json.loads(line)["ground_truth"] for line in (data / "possible_answer" / name).open()]
    for line, gold in zip((data / name).open(), golds):
        sample, calls = json.loads(line), first_values(gold)
        if any(isinstance(value, (dict, list)) for call in gold for arguments in call.values()
               for values in arguments.values() for value in values) or len(calls) > 6:
            continue                        # lists and objects are not needed to see it
        if right(sample["function"], calls, gold):
            orders = [right(sample["function"], list(order), gold) for order in permutations(calls)]
            samples += 1
            if not all(orders):
                found[sample["id"]] = (orders.count(False), len(orders))
print(f"published samples tried in every order: {samples}; orders that are wrong: {found}")
assert seen == [True, True, True, False], seen
assert samples > 300 and found == {"parallel_178": (12, 24)}, (samples, found)
print("as described")
PYTHON
