#!/usr/bin/env bash
# Two clients of the OpenAI-compatible API, one base URL: do they ask the same address?
#
# Guess, written before the run: yes. Both add /chat/completions to the base URL that they are given.
# So it is: openai does; huggingface_hub's InferenceClient adds /v1/chat/completions to any base URL
#   that does not end in /v1 (and /chat/completions alone to one that does, or nothing to one that
#   ends in /chat/completions). A bare host works with huggingface_hub alone, a path such as
#   /api/paas/v4 with openai alone.
# Why it matters: providers publish one base URL, often with another path than /v1. The same URL in
#   the two clients then gives 404 in one of them, which looks like a wrong key or model name. Who
#   takes a base URL from a user should build the whole address and pass that.
# Versions: huggingface-hub 1.2.3, openai 2.9.0. Date: 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huggingface-hub==1.2.3 openai==2.9.0
HF_HUB_DISABLE_TELEMETRY=1 "$folder/venv/bin/python" - <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version

from huggingface_hub import InferenceClient
from openai import OpenAI

REPLY = json.dumps({
    "id": "1", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop",
                 "message": {"role": "assistant", "content": "Hello."}}]}).encode()
asked = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(REPLY)))
        self.end_headers()
        self.wfile.write(REPLY)

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
host = f"http://127.0.0.1:{server.server_port}"
messages = [{"role": "user", "content": "Hi."}]
seen = {}
for path in ("", "/v1", "/api/paas/v4"):
    OpenAI(base_url=host + path, api_key="none").chat.completions.create(
        model="m", messages=messages)
    InferenceClient(base_url=host + path, api_key="none").chat_completion(messages, model="m")
    seen[path or "(bare host)"] = asked[-2:]
for name in ("huggingface-hub", "openai"):
    print(name, version(name))
print(f"{'base URL':16}{'openai asks':34}huggingface_hub asks")
for path, (one, other) in seen.items():
    print(f"{path:16}{one:34}{other}")
assert seen == {
    "(bare host)": ["/chat/completions", "/v1/chat/completions"],
    "/v1": ["/v1/chat/completions", "/v1/chat/completions"],
    "/api/paas/v4": ["/api/paas/v4/chat/completions", "/api/paas/v4/v1/chat/completions"]}, seen
print("as described")
PYTHON
