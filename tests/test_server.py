"""A teacher behind an OpenAI-compatible API: a real server on loopback that follows a script."""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate

import pytest
from huggingface_hub import constants

from augment import Form, Prompt, ServerWriter

KEY = "sk-secret-1234"


def completion(text) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Server:
    """Each request takes the script's next reply, (status, headers, body), or seconds of silence.
    After the script, a reply repeats the user's last message, a "slow" one after 0.1 s."""

    def __init__(self):
        self.script, self.seen, self.times, self.busy = [], [], [], []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.times.append(time.monotonic())
                server.seen.append((self.path, self.headers, json.loads(body or b"{}")))
                server.busy.append(1)
                status, headers, content = self.reply(body)
                server.busy.append(-1)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            do_GET = do_POST                    # what a client makes of a POST that is redirected

            def reply(self, body):
                reply = server.script.pop(0) if server.script else 0.1 if b"slow" in body else 0
                if isinstance(reply, tuple):
                    return reply
                time.sleep(reply)
                return 200, {}, completion(json.loads(body)["messages"][-1]["content"])

            def log_message(self, *_): pass
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def other():
    other = Server()
    yield other
    other.close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)     # the library asks nobody else then
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server()
    yield server
    server.close()


def ask(server, start="", form=Form(("",), ()), temperature=0.7, top_p=1.0, wait=0.001,
        timeout=5.0) -> str:
    prompt = Prompt([{"role": "user", "content": "hello"}], start, form)
    writer = ServerWriter(server.url, "big", wait, timeout)
    return writer([prompt], 10, temperature, top_p, [[(0, "id")]])[0][0]


def test_texts_keep_the_order_of_the_keys_with_at_most_eight_requests_at_a_time(server):
    said = ["slow" if i % 2 else f"quick {i}" for i in range(20)]       # some overtake others
    prompts = [Prompt([{"role": "user", "content": text}]) for text in said]
    keys = [[(0, i, j) for j in range(i % 3)] for i in range(20)]       # 0, 1 or 2 texts a prompt
    texts = ServerWriter(server.url, "big")(prompts, 10, 0.7, 0.9, keys)
    assert texts == [[text] * len(own) for text, own in zip(said, keys)]
    assert 2 <= max(accumulate(server.busy)) <= 8
    assert len({body["seed"] for _, _, body in server.seen}) == len(server.seen)


def test_a_request_has_the_key_the_sampling_and_a_seed(server):
    assert ask(server, top_p=0.9) == ask(server, temperature=1.0) == "hello"
    (path, headers, body), (_, _, again) = server.seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["top_p"]) == ("big", 0.7, 0.9)
    assert body["seed"] == again["seed"] and 0 <= body["seed"] < 2 ** 31


@pytest.mark.parametrize("reply", ['warm?"', '2. "warm?"', '"warm?"', '1. "Hot?"\n2. "warm?"'])
def test_a_start_is_asked_for_and_cut_off_where_the_reply_repeats_it(server, reply):
    server.script = [(200, {}, completion(reply))]
    assert ask(server, start='1. "Hot?"\n2. "') == 'warm?"'
    asked = server.seen[0][2]["messages"][-1]["content"]
    assert asked.startswith("hello\n\nThe answer begins") and asked.endswith('\n1. "Hot?"\n2. "')


def test_of_a_form_the_beginning_is_asked_for_and_what_was_written_follows_it(server):
    """A server cannot fill in blanks: it writes the rest as it likes, and the checks decide."""
    form = Form(('{"name": "f", "arguments": {"x": "', '"}}'), ('"',))
    for reply in ('5"}}', '{"name": "f", "arguments": {"x": "5"}}', '2. ' + form.parts[0] + '5"}}'):
        server.script = [(200, {}, completion(reply))]
        assert ask(server, start="2. ", form=form) == '{"name": "f", "arguments": {"x": "5"}}'
        assert server.seen[-1][2]["messages"][-1]["content"].endswith("\n2. " + form.parts[0])


def test_a_busy_broken_or_late_server_is_asked_again_after_ever_longer_waits(server):
    broken_off = (200, {"Content-Length": "99"}, b"{")
    server.script = [(429, {}, b""), (503, {}, b"busy"), (408, {}, b""), broken_off, 0.5]
    assert ask(server, wait=0.02, timeout=0.2) == "hello"
    gaps = [after - before for before, after in zip(server.times, server.times[1:])]
    assert len(gaps) == 5 and all(gap >= 0.02 * 2 ** i for i, gap in enumerate(gaps))


def test_a_server_that_stays_busy_or_is_not_there_is_named(server, other):
    server.script = [(503, {}, b"")] * 9
    said = f"{server.url}: no chat completion after 6 tries .HTTP 503"
    with pytest.raises(ConnectionError, match=said):
        ask(server)
    assert len(server.seen) == 6
    other.close()
    with pytest.raises(ConnectionError, match=f"{other.url}: no chat completion after 6 tries"):
        ask(other)


@pytest.mark.parametrize("status, said", [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"),
                                          (404, "--teacher-model"), (400, "HTTP 400")])
def test_what_will_not_pass_ends_the_work_at_once_and_shows_no_key(server, status, said):
    server.script = [(status, {}, f"wrong key: {KEY}".encode())] * 300
    prompt = Prompt([{"role": "user", "content": "hello"}])
    with pytest.raises(ConnectionError, match=said) as error:
        ServerWriter(server.url, "big")([prompt], 10, 0.7, 1.0, [[(0, i) for i in range(300)]])
    assert len(server.seen) < 300 and "\n" not in str(error.value) and KEY not in str(error.value)


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"7", b'{"choices": []}', b"<html>", b"\xff",
                                     b'{"choices": [{"message": null}]}', completion([1])])
def test_a_reply_that_is_no_chat_completion_is_named(server, content):
    server.script = [(200, {}, content)] * 6
    with pytest.raises(ConnectionError, match=f"{server.url}: no chat completion"):
        ask(server)


def test_without_a_key_no_token_for_the_hub_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setenv("HF_TOKEN", "hf_the_users_own")
    assert ask(server) == "hello"
    assert "hf_the_users_own" not in str(server.seen[0][1])


@pytest.mark.parametrize("url", ["ftp://host/v1", "https://user:word@host/v1", "https:///v1",
                                 "https://host:word/v1", "https://host/v1?key=word", "https://host",
                                 "https://host/v1#word", "https://host/api", "https://host/v1\n"])
def test_a_url_with_a_secret_or_without_v1_is_refused_and_not_shown(url):
    with pytest.raises(ValueError, match="ends in /v1") as error:
        ServerWriter(url, "big")
    assert "word" not in str(error.value)


def test_a_key_goes_over_plain_http_to_this_machine_only(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for host in ("example.org", "192.168.0.2", "localhost.example.org", "127.0.0.1.example.org"):
        with pytest.raises(ValueError, match="unencrypted"):
            ServerWriter(f"http://{host}/v1", "big")
    for url in ("https://example.org/api/v1", "http://localhost:8000/v1", "http://[::1]:8000/v1/"):
        assert KEY not in repr(ServerWriter(url, "big"))
    monkeypatch.setenv("OPENAI_API_KEY", "")
    ServerWriter("http://192.168.0.2:8000/v1", "big")


def test_a_key_from_a_file_loses_its_newline(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\r\n")
    assert ask(server) == "hello" and server.seen[0][1]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [302, 307])
def test_a_key_does_not_follow_a_redirect_to_another_host(server, other, status):
    elsewhere = other.url.replace("127.0.0.1", "localhost")
    server.script = [(status, {"Location": f"{elsewhere}/chat/completions"}, b"")]
    ask(server, wait=0)
    assert all(KEY not in str(headers) for _, headers, _ in other.seen)
