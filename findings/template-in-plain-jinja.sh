#!/usr/bin/env bash
# A checkpoint's chat template rendered by transformers, and by Jinja alone: is the prompt the same?
#
# Guess, written before the run: yes, a template is a text for Jinja, and transformers calls Jinja.
# So it is: not where it says `tojson`, as templates do for tools and calls. transformers puts another
#   filter in its place. Jinja's own is meant for web pages: it sorts the keys of every object, so that
#   a call begins with its "arguments" and not with its "name", and writes ' & < > and letters such as
#   ü as \u escapes.
# Why it matters: a program that renders the template itself, with Jinja's sandbox as it comes, shows
#   the model tools and past calls in another form than the template's author saw in transformers. A
#   checkpoint's figures on two servers then differ for a reason that stands in neither's settings.
#   Who renders by hand sets env.filters["tojson"] to json.dumps with ensure_ascii=False.
# Versions: jinja2 3.1.6, transformers 5.24.0 (without torch). Date: 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jinja2==3.1.6 transformers==5.24.0
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATE = """{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% for message in messages %}{% for call in message.tool_calls %}{{ call | tojson }}
{% endfor %}{% endfor %}"""
TOOLS = [{"name": "book", "description": "A guest's room & breakfast in Zürich",
          "parameters": {"nights": {"type": "integer"}, "city": {"type": "string"}}}]
MESSAGES = [{"role": "assistant", "content": "",
             "tool_calls": [{"name": "book", "arguments": {"nights": 2, "city": "Bern"}}]}]

theirs = render_jinja_template(conversations=[MESSAGES], tools=TOOLS, chat_template=TEMPLATE)[0][0]
plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
    TEMPLATE).render(messages=MESSAGES, tools=TOOLS)
for name in ("jinja2", "transformers"):
    print(name, version(name))
print("transformers:", theirs, "Jinja alone:", plain, sep="\n")
assert '{"name": "book", "arguments": {"nights": 2, "city": "Bern"}}' in theirs
assert "A guest's room & breakfast in Zürich" in theirs
assert '{"arguments": {"city": "Bern", "nights": 2}, "name": "book"}' in plain
assert r"A guest\u0027s room \u0026 breakfast in Z\u00fcrich" in plain
print("as described")
PYTHON
