"""Calls near to BFCL's gold ones, each changed in one way, and the published checker's word on
them. Used by test_bfcl.py; the checker and its files are those of the package bfcl-eval."""
import copy
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from random import Random

from data import Sample
from data.calls import Call

CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple",
              "live_multiple", "live_parallel", "live_parallel_multiple")


def published_checker() -> tuple[Callable, Path]:
    """(functions, calls as {name: arguments}, gold calls, category) -> whether the published
    checker finds them right; and its folder of data. ModuleNotFoundError without the package."""
    found = importlib.util.find_spec("bfcl_eval")
    if not found:
        raise ModuleNotFoundError("bfcl_eval")
    # its table of a hundred models' clients imports each client's library; of a model it tells the
    # checker one thing: whether the dots in a function's name became underscores
    table = types.ModuleType("bfcl_eval.constants.model_config")
    table.MODEL_CONFIG_MAPPING = {"model": types.SimpleNamespace(underscore_to_dot=False)}
    sys.modules[table.__name__] = table
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    def check(functions, calls, gold, category) -> bool:
        args = copy.deepcopy((functions, calls, gold))
        return ast_checker(*args, Language.PYTHON, category, "model")["valid"]
    return check, Path(found.submodule_search_locations[0]) / "data"


# --- The gold calls, with the first of each argument's accepted values ----------------------------

def first_calls(x: Sample) -> list[Call]:
    """The gold calls with the first accepted values; an argument that may be left out is, if
    nothing else is accepted."""
    return [Call(gold.name, first_values(gold.arguments)) for gold in x.answers]


def first_values(accepted: dict) -> dict:
    kept = {name: [each for each in values if each != ""] if isinstance(values, list) else [values]
            for name, values in accepted.items()}
    return {name: first_value(values[0]) for name, values in kept.items() if values}


def first_value(value: object) -> object:
    if isinstance(value, dict):
        return first_values(value)
    return [first_value(each) for each in value] if isinstance(value, list) else value


# --- Mutations: (calls, sample, random) -> changed calls, or None where it does not apply ---------

def one(r: Random, calls: list[Call], kinds: tuple = (object,)) -> tuple[Call, str] | None:
    """One of the arguments with a value of these kinds."""
    there = [(call, name) for call in calls for name, value in call.arguments.items()
             if type(value) in kinds or object in kinds]
    return r.choice(there) if there else None


def changed(*kinds):
    """A mutation that maps a value of one of these kinds."""
    def mark(function):
        def mutate(calls, x, r):
            found = one(r, calls, kinds or (object,))
            if not found:
                return None
            call, name = found
            call.arguments[name] = function(call.arguments[name], r)
            return calls
        mutate.__name__ = function.__name__
        MUTATIONS.append(mutate)
        return mutate
    return mark


def of_calls(function):
    MUTATIONS.append(function)
    return function


MUTATIONS: list[Callable] = []


@of_calls
def drop_an_argument(calls, x, r):
    found = one(r, calls)
    if not found:
        return None
    call, name = found
    del call.arguments[name]
    return calls


@of_calls
def add_an_argument(calls, x, r):
    call = r.choice(calls)
    tool = next(tool for tool in x.tools if tool["name"] == call.name)
    call.arguments[r.choice([*tool["parameters"], "more"])] = r.choice(["", "more", 1, 0, True, []])
    return calls


@of_calls
def give_what_may_be_left_out(calls, x, r):
    return with_an_accepted_value(calls, x, r, lambda values: "" in values)


@of_calls
def take_another_accepted_value(calls, x, r):
    return with_an_accepted_value(calls, x, r, lambda values: len(values) > 1)


def with_an_accepted_value(calls, x, r, applies):
    """The calls where one of the arguments to which this applies has any of its accepted values."""
    there = [(call, name, values) for call, gold in zip(calls, x.answers)
             for name, values in gold.arguments.items() if applies(values)]
    if not there:
        return None
    call, name, values = r.choice(there)
    call.arguments[name] = first_value(r.choice(values))
    return calls


@of_calls
def take_the_first_values_of_another_call(calls, x, r):
    if len(calls) < 2:
        return None
    i, j = r.sample(range(len(calls)), 2)
    calls[i] = copy.deepcopy(calls[j])
    return calls


@of_calls
def swap_two_values(calls, x, r):
    there = [call for call in calls if len(call.arguments) > 1]
    if not there:
        return None
    call = r.choice(there)
    a, b = r.sample([*call.arguments], 2)
    call.arguments[a], call.arguments[b] = call.arguments[b], call.arguments[a]
    return calls


@of_calls
def call_another_function(calls, x, r):
    i = r.randrange(len(calls))
    calls[i] = Call(r.choice([tool["name"] for tool in x.tools] + ["other"]), calls[i].arguments)
    return calls


@of_calls
def leave_a_call_out(calls, x, r):
    return calls[1:] or None


@of_calls
def write_a_call_twice(calls, x, r):
    return [*calls, copy.deepcopy(r.choice(calls))]


@of_calls
def write_them_in_another_order(calls, x, r):
    return r.sample(calls, len(calls)) if len(calls) > 1 else None


@of_calls
def leave_all_optional_ones_out(calls, x, r):
    for call, gold in zip(calls, x.answers):
        for name, values in gold.arguments.items():
            if "" in values:
                call.arguments.pop(name, None)
    return calls


@changed(str)
def another_case(value, r): return r.choice([value.upper(), value.lower(), value.title()])


@changed(str)
def another_text(value, r): return r.choice([value + "s", "x" + value, value[:-1], "other"])


@changed(str)
def a_character_more(value, r):
    i = r.randint(0, len(value))
    return value[:i] + r.choice(" ,./-_*^'\"") + value[i:]


@changed(str)
def a_character_less(value, r):
    i = r.randrange(len(value)) if value else 0
    return value[:i] + value[i + 1:]


@changed(str)
def without_spaces(value, r): return value.replace(" ", r.choice(["", "_", "-", ",", "  "]))


@changed(int)
def an_int_as_float(value, r): return float(value)


@changed(float)
def a_float_as_int(value, r): return int(value) if r.random() < 0.7 else str(value)


@changed(int, float)
def another_number(value, r): return value + r.choice([1, -1, 0.5, 1e-9])


@changed(int, float, bool)
def as_text(value, r): return str(value)


@changed(bool)
def another_truth(value, r): return r.choice([not value, int(value), str(value).lower()])


@changed()
def nothing(value, r): return r.choice([None, "", [], {}, 0, False, "."])


@changed()
def in_a_list(value, r): return [value] if not isinstance(value, list) else value[0] if value else 0


@changed(list)
def items_in_another_order(value, r): return r.sample(value, len(value))


@changed(list)
def other_items(value, r):
    return r.choice([value[1:], [*value, value[0] if value else 1], [str(each) for each in value],
                     [another_kind(each) for each in value]])


@changed(dict)
def other_parts(value, r):
    new = dict(value)
    key = r.choice([*value]) if value else "more"
    how = r.randrange(4)
    if how == 0:
        new.pop(key, None)
    elif how == 1:
        new["more"] = 1
    else:
        new[key] = another_kind(value.get(key))
    return new


def another_kind(value: object) -> object:
    """The same in another type, or nearly so."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return float(value)
    if isinstance(value, float):
        return int(value)
    if isinstance(value, str):
        return value.upper()
    if isinstance(value, list):
        return [another_kind(each) for each in value]
    return {name: another_kind(each) for name, each in value.items()} if value else value
