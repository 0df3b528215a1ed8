"""A teacher behind an OpenAI-compatible API: a real server on loopback, whose replies come from a script."""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import augment
import evaluate
import train
from augment import RemoteWriter, synthesize
from data import Sample, call_text
from data.calls import Call

TOOLS = ({"name": "get_weather", "description": "", "parameters": {"city": {"type": "string", "required": True}}},
         {"name": "get_time", "description": "", "parameters": {"zone": {"type": "string", "required": True}}})
SAMPLE = Sample("s-0", ({"role": "user", "content": "What is the weather in Rome?"},), TOOLS, (Call("get_weather", {"city": "Rome"}),))
PARIS = call_text((Call("get_weather", {"city": "Paris"}),))
KEY = "sk-secret-1234"


class Server:
    """POST /v1/chat/completions. `reply` gives the text for a request's body, or (status, headers) to fail with."""

    def __init__(self):
        self.seen, self.failures, self.reply = [], [], lambda body: PARIS
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, dict(self.headers), body))
                status, headers = outer.failures.pop(0) if outer.failures else (200, {})
                text = outer.reply(body) if status == 200 else "no"
                content = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode() if isinstance(text, str) else text
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_): pass
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(augment, "WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def asks_for_a_request(body) -> bool:
    return "Write two requests" in body["messages"][-1]["content"]


def ask(server, text="hello", **sampling) -> str:
    return RemoteWriter(server.url, "big")([([{"role": "user", "content": text}], "")], 10, sampling.get("temperature", 0.7),
                                           sampling.get("top_p", 1.0), [[(0, "id")]])[0][0]


def test_a_pair_is_written_by_request_and_majority_of_calls(server):
    server.reply = lambda body: '2. "How warm is it in Paris?"' if asks_for_a_request(body) else PARIS
    found, = synthesize(RemoteWriter(server.url, "big"), [SAMPLE])
    assert [(p.request, p.text, p.votes) for p in found.pairs] == [("How warm is it in Paris?", PARIS, augment.LABELS)] and not found.rejected
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "big" and body["temperature"] == 0.7 and body["messages"][-1]["content"].endswith('1. "What is the weather in Rome?"\n2. "')
    assert len({body["seed"] for _, _, body in server.seen[1:]}) == augment.LABELS      # each draw is its own
    assert "Rome" not in json.dumps([m for _, _, b in server.seen[1:] for m in b["messages"]])


@pytest.mark.parametrize("reply", ['How warm?"', '"How warm?"', '2. "How warm?"', '1. "What is the weather in Rome?"\n2. "How warm?"', "How warm?"])
def test_what_a_teacher_repeats_of_the_beginning_is_cut_off(server, reply):
    server.reply = lambda body: reply if asks_for_a_request(body) else PARIS
    assert synthesize(RemoteWriter(server.url, "big"), [SAMPLE])[0].pairs[0].request == "How warm?"


def test_what_is_the_apis_default_is_not_sent(server):
    ask(server, temperature=1.0, top_p=1.0)
    assert "temperature" not in server.seen[0][2] and "top_p" not in server.seen[0][2]


def test_busy_and_broken_servers_are_asked_again_then_named(server):
    server.failures = [(429, {"Retry-After": "0"}), (503, {}), (500, {})]
    assert ask(server) == PARIS and len(server.seen) == 4
    server.failures = [(503, {})] * 10
    with pytest.raises(ConnectionError, match=f"{server.url}: no reply after 6 tries .HTTP 503"):
        ask(server)
    assert len(server.seen) == 10


def test_a_late_reply_is_a_failed_try(server, monkeypatch):
    monkeypatch.setattr(augment, "TIMEOUT", 0.2)
    calls = []

    def slow(body):
        calls.append(1)
        time.sleep(0.6 if len(calls) == 1 else 0)
        return PARIS
    server.reply = slow
    assert ask(server) == PARIS and len(calls) == 2


@pytest.mark.parametrize("status, said", [(401, "OPENAI_API_KEY"), (404, "--teacher-model"), (400, "HTTP 400")])
def test_what_will_not_pass_is_not_tried_again(server, status, said):
    server.failures = [(status, {})]
    with pytest.raises(ConnectionError, match=said):
        ask(server)
    assert len(server.seen) == 1


@pytest.mark.parametrize("content", [b"{}", b"[1]", b'{"choices": []}', b'{"choices": [{"message": null}]}'])
def test_a_reply_of_another_shape_is_named(server, content):
    server.reply = lambda body: content
    with pytest.raises(ConnectionError, match="none of /chat/completions"):
        ask(server)


def test_a_server_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(augment, "WAIT", 0.001)
    with pytest.raises(ConnectionError, match="no reply after 6 tries"):
        RemoteWriter("http://127.0.0.1:9", "big").post(b"{}")


def test_the_key_goes_to_no_other_host(server, monkeypatch):
    other = Server()
    server.failures = [(302, {"Location": other.url})]
    with pytest.raises(ConnectionError, match="HTTP 302"):
        ask(server)
    assert other.seen == []
    other.http.shutdown()
    with pytest.raises(ValueError, match="unencrypted"):
        RemoteWriter("http://example.org/v1", "big")
    for url in ("ftp://host/v1", "https://user:word@host/v1", "https://:word@host/v1", "https:///v1", "https://host/v1?key=word",
                "https://host/v1#word", "https://host:word/v1"):
        with pytest.raises(ValueError, match="--teacher: a URL") as error:
            RemoteWriter(url, "big")
        assert "word" not in str(error.value)


def test_the_key_goes_through_no_proxy_and_a_strange_one_is_not_shown(server, monkeypatch):
    proxy = Server()
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\r\n")           # as from a file
    assert ask(server) == PARIS and proxy.seen == [] and server.seen[0][1]["Authorization"] == f"Bearer {KEY}"
    proxy.http.shutdown()
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\r\nX: y")
    with pytest.raises(ValueError) as error:
        ask(server)
    assert "OPENAI_API_KEY" in str(error.value) and KEY not in str(error.value)


def test_a_run_with_such_a_teacher_writes_the_key_nowhere_and_shows_it_no_label(server, tmp_path, capsys):
    server.reply = lambda body: "Do something else with it" if asks_for_a_request(body) else "no call"
    flags = ["--bench", "toolalpaca", "--model", "tiny", "--device", "cpu", "--limit", "3", "--tau", "1", "--out", str(tmp_path / "run")]
    assert train.main([*flags, "--method", "ttd", "--teacher", server.url, "--teacher-model", "big", "--filter", "none"]) == 0
    records = evaluate.read_records(tmp_path / "run")
    assert all(r["outcome"] == "adapted" and r["pairs"][0]["text"] == "no call" for r in records if r["acted"]) and server.seen
    everything = capsys.readouterr().out + "".join(p.read_text() for p in (tmp_path / "run").glob("*.json*"))
    assert KEY not in everything and server.url in everything
    prompts = json.dumps([body for _, _, body in server.seen])
    assert all(json.dumps(json.dumps(r["gold"]))[3:-3] not in prompts for r in records)


@pytest.mark.parametrize("flags", [["--method", "ttd", "--teacher", "https://host/v1"], ["--method", "ttd", "--teacher", "tiny", "--teacher-model", "x"]])
def test_a_url_and_a_name_belong_together(flags, capsys):
    assert train.main(["--bench", "toolalpaca", *flags]) == 2 and "--teacher-model" in capsys.readouterr().err


def test_a_teacher_that_fails_leaves_what_is_finished(server, tmp_path, capsys):
    server.failures = [(401, {})]
    assert train.main(["--bench", "toolalpaca", "--model", "tiny", "--device", "cpu", "--limit", "8", "--tau", "1", "--out", str(tmp_path / "run"),
                       "--method", "ttd", "--teacher", server.url, "--teacher-model", "big"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: --teacher http://127.0.0.1") and "OPENAI_API_KEY" in error and KEY not in error
