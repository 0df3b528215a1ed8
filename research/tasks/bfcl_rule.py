"""When is an answer right by the Berkeley Function Calling Leaderboard (v4, Patil et al. 2025)?

As many calls as gold calls, in any order. A gold call has for each argument the values that are
accepted, of which "" says that it may be left out; what stands in an object has such lists, too. A
call has all arguments that are required, and no others than the gold's. A value has the declared
type or the accepted value's; a whole number counts as a float. Case, the kind of quotes, and commas
or white space in a row make no difference between texts.

Its source is the checker of bfcl-eval 2026.3.23, from which it differs on purpose in three points.
It matches calls to gold calls as well as possible, where the checker gives each gold call the first
call that fits, and may find none for the last. It does not delete the characters ` ,./-_*^` from
texts, by which "1.5" is "15"; `loose` counts right what is right with them deleted. It compares
types and case alike at any depth, where the checker does one level deep. The cases in which the two
part are counted in research/RESULTS.md, "BFCL's rule".
"""
import re
from collections import Counter
from collections.abc import Callable, Sequence

from scipy.optimize import linear_sum_assignment

from data import Sample
from data.calls import Call, items_of, parse_calls
from data.runs import Verdict

TYPES = {"integer": int, "number": float, "boolean": bool, "array": list, "object": dict}


def verdict(text: str, x: Sample) -> Verdict:
    """Are the calls the gold calls, by the rule above? Beside it, each 0 or 1: `parsed` (a call
    could be read), `name_correct` (the functions are right), `loose` (right if texts lose their
    punctuation, as in the published checker)."""
    calls = parse_calls(text).calls
    names = Counter([call.name for call in calls])
    golds = Counter([gold.name for gold in x.answers])
    reason = difference(calls, x, plain) if calls else "unparsable"
    loose = bool(calls) and not difference(calls, x, without_punctuation)
    return Verdict(text, not reason, reason, {
        "parsed": float(bool(calls)), "name_correct": float(names == golds), "loose": float(loose)})


def difference(calls: Sequence[Call], x: Sample, same_text: Callable[[str], str]) -> str:
    """What is wrong first in the best assignment of calls to gold calls; "" if nothing is."""
    if len(calls) != len(x.answers):
        return f"wrong number of calls: {len(calls)} for {len(x.answers)}"
    tools, faults = {tool["name"]: tool for tool in x.tools}, []
    for call in calls:
        faults.append([call_fault(call, gold, tools[gold.name], same_text) for gold in x.answers])
    costs = [[bool(fault) + fault.startswith("wrong name") for fault in row] for row in faults]
    found = [faults[i][j] for i, j in zip(*linear_sum_assignment(costs))]
    return next(filter(None, found), "")


def call_fault(call: Call, gold: Call, tool: dict, same_text: Callable[[str], str]) -> str:
    """What is wrong first with a call beside a gold call; "" if nothing is."""
    if call.name != gold.name:
        return f"wrong name: {call.name:.40} for {gold.name}"
    for name in tool.get("required", ()):
        if name not in call.arguments:
            return f"missing argument: {name}"
    for name in call.arguments:
        if name not in tool["parameters"]:
            return f"extra argument: {name:.40}"
    return object_fault(call.arguments, gold.arguments, tool["parameters"], same_text)


def object_fault(given: dict, accepted: dict, schemas: dict, same_text: Callable) -> str:
    """What is wrong first with names and values beside the lists of accepted values."""
    for name, values in accepted.items():
        if name not in given and "" not in values:
            return f"missing argument: {name}"
    for name, value in given.items():
        if name not in accepted:
            return f"extra argument: {name:.40}"
        schema = schemas.get(name, {})
        if not any([accepts(each, value, schema, same_text) for each in accepted[name]]):
            return f"wrong value: {name}"
    return ""


def accepts(accepted: object, value: object, schema: dict, same_text: Callable) -> bool:
    """Whether a value is the accepted one, by its declared type or by that of the accepted one."""
    declared = TYPES.get(schema.get("type"), str)
    if accepted == "":                              # it may be left out, or be given as empty
        given = same_text(value) if isinstance(value, str) else value
        return type(value) is declared and given in ("", [])
    if isinstance(accepted, str) and isinstance(value, str):
        return same_text(accepted) == same_text(value)
    if isinstance(accepted, list) and isinstance(value, list):
        pairs, items = zip(accepted, value), items_of(schema)
        return len(accepted) == len(value) and all([accepts(*pair, items, same_text)
                                                    for pair in pairs])
    if isinstance(accepted, dict) and isinstance(value, dict):
        lists = {name: each if isinstance(each, list) else [each]       # one stands alone
                 for name, each in accepted.items()}
        return not object_fault(value, lists, schema.get("properties", {}), same_text)
    if {type(accepted), type(value)} == {int, float}:
        return accepted == value and (isinstance(value, int) or declared is float)
    return type(accepted) is type(value) and accepted == value


def plain(text: str) -> str:
    """A text without what makes no difference: case, the kind of quotes, what parts its words."""
    parted = re.sub(r"[\s,]+", " ", text.lower().replace("'", '"')).strip()
    return re.sub(r" ?([^\w\s]) ?", r"\1", parted) or text


def without_punctuation(text: str) -> str:
    """A text as the published checker compares it."""
    return re.sub(r"[ ,./_*^-]", "", text).lower().replace("'", '"')
