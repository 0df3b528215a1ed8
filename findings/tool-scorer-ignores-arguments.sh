#!/usr/bin/env bash
# A scorer called "tool correctness": what is a call with wrong arguments worth, and a call too many?
#
# Guess, written before the run: neither is right. The metric takes the calls and the expected calls,
#   both with their arguments, so a wrong argument, or a surplus call, lowers the score.
# So it is: by default only names are compared, so a call with other arguments, or with none, has 1.
#   Told to compare arguments, it still gives 1 to the right call beside any others, and to the right
#   call made three times: what is not expected is not looked at. Only should_exact_match sees it, and
#   that also wants the order, so two calls that may run in any order have 0 where they are turned.
#   True counts as 1, "5" does not as 5.
# Why it matters: an agent that calls every tool it has is perfect by this score. Two reports of "tool
#   correctness" by this library may mean three different things.
# Versions: deepeval 4.3.1. Date: 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q deepeval==4.3.1
cd "$folder"
DEEPEVAL_TELEMETRY_OPT_OUT=YES OPENAI_API_KEY=none venv/bin/python -W ignore - <<'PYTHON'
from importlib.metadata import version

from deepeval.metrics import ToolCorrectnessMetric
from deepeval.test_case import LLMTestCase, ToolCall, ToolCallParams

ARGUMENTS = {"evaluation_params": [ToolCallParams.INPUT_PARAMETERS]}
WAYS = {"default": {}, "arguments": ARGUMENTS,
        "exact": {**ARGUMENTS, "should_exact_match": True}}


def f(**arguments):
    return ToolCall(name="f", input_parameters=arguments)


g = ToolCall(name="g", input_parameters={})
CASES = {       # what was called, what was expected, and the scores seen
    "the right call": ([f(x=1)], [f(x=1)], (1, 1, 1)),
    "another value": ([f(x=2)], [f(x=1)], (1, 0, 0)),
    "no arguments": ([f()], [f(x=1)], (1, 0, 0)),
    "three times": ([f(x=1)] * 3, [f(x=1)], (1, 1, 0)),
    "and another tool": ([f(x=1), g], [f(x=1)], (1, 1, 0)),
    "two, turned": ([g, f(x=1)], [f(x=1), g], (1, 1, 0)),
    "True for 1": ([f(x=True)], [f(x=1)], (1, 1, 1)),
    '"5" for 5': ([f(x="5")], [f(x=5)], (1, 0, 0))}
print("deepeval", version("deepeval"))
print(f"{'':18}{'  '.join(WAYS)}")
for name, (called, expected, seen) in CASES.items():
    scores = []
    for options in WAYS.values():
        metric = ToolCorrectnessMetric(include_reason=False, async_mode=False, **options)
        case = LLMTestCase(input="-", actual_output="-", tools_called=called,
                           expected_tools=expected)
        scores.append(metric.measure(case, _show_indicator=False))
    print(f"{name:18}", *[f"{score:8.2f}" for score in scores])
    assert tuple(scores) == seen, (name, scores)
print("as described")
PYTHON
