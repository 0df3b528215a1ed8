#!/usr/bin/env bash
# A tool of an MCP server takes a text or nothing. Does it get the text that the model wrote?
#
# Guess, written before the run: yes. The published schema says string or null, and a string is one.
# So it is: not if the text happens to be JSON. FastMCP decodes a string argument first wherever the
#   parameter is declared as anything but plain str. With `str | None` the text {"a": 1} becomes an
#   object, and the call is refused since that is no string; the text null becomes None, and the call
#   succeeds without its text. 5 and true stay texts. Declared as str, all are taken as they are.
# Why it matters: tools that save files, post messages or run code are given JSON as text, and an
#   optional text is the usual way to declare it. The model's call fits the schema and fails, or does
#   something else in silence; a harness that counts this as the model's mistake measures the server.
# Versions: mcp 1.26.0. Date: 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mcp==1.26.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import asyncio
import logging
from importlib.metadata import version

from mcp.server.fastmcp import FastMCP
from mcp.shared.memory import create_connected_server_and_client_session as connected

app = FastMCP("notes", log_level="ERROR")


@app.tool()
def required(text: str) -> str:
    return f"got {text!r}"


@app.tool()
def optional(text: str | None = None) -> str:
    return f"got {text!r}"


async def ask() -> dict:
    seen = {}
    async with connected(app._mcp_server) as client:
        for tool in (await client.list_tools()).tools:
            print(tool.name, "declares", tool.inputSchema["properties"]["text"])
        for text in ('{"a": 1}', "[1]", "null", "5", "true", "plain"):
            for name in ("required", "optional"):
                reply = await client.call_tool(name, {"text": text})
                seen[name, text] = "refused" if reply.isError else reply.content[0].text
    return seen

print("mcp", version("mcp"))
seen = asyncio.run(ask())
for (name, text), what in seen.items():
    print(f"{name:10} text = {text:10} {what}")
for text in ('{"a": 1}', "[1]", "null", "5", "true", "plain"):
    assert seen["required", text] == f"got {text!r}", text
assert seen["optional", '{"a": 1}'] == seen["optional", "[1]"] == "refused"
assert seen["optional", "null"] == "got None"
assert seen["optional", "5"] == "got '5'" and seen["optional", "true"] == "got 'true'"
print("as described")
PYTHON
