#!/usr/bin/env bash
# Constrained decoding: one tool's schema, two libraries. Do they let the same calls through?
#
# Guess, written before the run: yes, those that the schema allows, save for the order of the keys.
# So it is: each lets through what the other keeps back, and neither is the schema. outlines-core drops
#   minimum and maximum of an integer in silence (month 13, month -5), while it keeps those of lengths
#   and of arrays; it takes `pattern` for the whole text, where JSON Schema looks for it anywhere; it
#   allows no argument beside the declared ones, and no 1e5 for a number. llguidance keeps the bounds
#   and the pattern, and lets undeclared arguments through, as the schema does.
# Why it matters: "the decoding was constrained by the schema" does not say what could be written. A
#   figure such as "share of valid calls" moves with the library, as does an agent that makes up
#   arguments: in one library it cannot, in the other it can.
# Versions: outlines-core 0.2.14, llguidance 1.9.1, jsonschema 4.26.0. Date: 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q outlines-core==0.2.14 llguidance==1.9.1 jsonschema==4.26.0
"$folder/venv/bin/python" - <<'PYTHON'
import json
import re
from importlib.metadata import version

from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer
from outlines_core.json_schema import build_regex_from_schema

BYTES = LLTokenizer("byte")
CASES = [       # the schema of the argument x, a call's arguments, what each lets through
    ({"type": "integer", "minimum": 1, "maximum": 12}, '{"x": 12}', (True, True, True)),
    ({"type": "integer", "minimum": 1, "maximum": 12}, '{"x": 13}', (False, True, False)),
    ({"type": "integer", "minimum": 1, "maximum": 12}, '{"x": -5}', (False, True, False)),
    ({"type": "string", "maxLength": 2}, '{"x": "abc"}', (False, False, False)),
    ({"type": "array", "items": {"type": "string"}, "minItems": 1}, '{"x": []}',
     (False, False, False)),
    ({"type": "string", "pattern": "[0-9]"}, '{"x": "room 7"}', (True, False, True)),
    ({"type": "string", "pattern": "[0-9]"}, '{"x": "7"}', (True, True, True)),
    ({"type": "number"}, '{"x": 1e5}', (True, False, True)),
    ({"type": "integer"}, '{"x": 1, "made_up": 2}', (True, False, True))]


def let_through(schema: dict, text: str) -> tuple[bool, bool, bool]:
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    ids = BYTES.tokenize_str(text)
    read = matcher.try_consume_tokens(ids)
    return (Draft202012Validator(schema).is_valid(json.loads(text)),
            bool(re.fullmatch(build_regex_from_schema(json.dumps(schema)), text)),
            read == len(ids) and matcher.is_accepting())


for name in ("outlines-core", "llguidance", "jsonschema"):
    print(name, version(name))
print(f"{'x':52}{'arguments':26}schema  outlines  llguidance")
for x, text, seen in CASES:
    found = let_through({"type": "object", "properties": {"x": x}, "required": ["x"]}, text)
    print(f"{json.dumps(x)[:50]:52}{text:26}{'   '.join(str(each) for each in found)}")
    assert found == seen, (x, text, found)
print("as described")
PYTHON
