"""A teacher behind an OpenAI-compatible API: a real server on loopback that follows a script."""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

import augment
import train
from augment import Form, Prompt, ServerWriter
from data import Sample

KEY = "sk-secret-1234"


def completion(text, finish: str = "stop") -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode()


class Handler(BaseHTTPRequestHandler):
    """Gives the script's next reply, (status, headers, body), or is late by so many seconds. Behind
    the script it repeats the user's last message, a "slow" one after 0.1 s."""

    def do_POST(self):
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(sent or b"{}")
        self.server.seen.append((time.monotonic(), self.path, self.headers, body))
        self.server.busy.append(1)
        reply = self.server.script.pop(0) if self.server.script else 0.1 * (b"slow" in sent)
        if not isinstance(reply, tuple):
            time.sleep(reply)
            reply = 200, {}, completion(body["messages"][-1]["content"])
        status, headers, content = reply
        self.server.busy.append(-1)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
    do_GET = do_POST                    # what a client makes of a POST that is redirected

    def log_message(self, *_): pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)     # the library asks nobody else then
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\r\n")          # as it is read from a file
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.script, server.seen, server.busy = [], [], []
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def ask(url: str, start: str = "", first: str = "", texts: int = 1, wait: float = 0.001,
        timeout: float = 5.0) -> str:
    """The first of so many texts for one prompt."""
    prompt = Prompt([{"role": "user", "content": "hello"}], start, Form(first))
    keys = [(0, "id", i) for i in range(texts)]
    return ServerWriter(url, "big", wait, timeout)([prompt] * texts, 10, 0.7, 0.9, keys)[0]


def test_texts_keep_the_order_of_the_keys_with_at_most_eight_requests_at_a_time(server):
    said = ["slow" if i % 2 else f"quick {i}" for i in range(20)]       # some overtake others
    prompts = [Prompt([{"role": "user", "content": text}]) for text in said]
    keys = [(0, i) for i in range(20)]
    assert ServerWriter(server.url, "big")(prompts, 10, 0.7, 0.9, keys) == said
    assert 2 <= max(accumulate(server.busy)) <= 8


def test_a_request_has_the_key_the_sampling_and_a_seed_of_its_own(server):
    ask(server.url, texts=2)
    (_, path, headers, body), (*_, other) = server.seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["top_p"]) == ("big", 0.7, 0.9)
    assert body["max_tokens"] == 10
    assert body["seed"] != other["seed"] and 0 <= body["seed"] < 2 ** 31


@pytest.mark.parametrize("start, first", [('1. "Hot?"\n2. "', ""), ("2. ", '{"name": "f", "x": "')])
def test_a_beginning_is_asked_for_and_cut_off_where_the_reply_repeats_it(server, start, first):
    """A server cannot fill in blanks: it writes the rest as it likes, and the checks decide."""
    begun = start + first
    for repeated in ("", begun[-1:], begun[3:], begun):
        server.script = [(200, {}, completion(repeated + 'warm?"'))]
        assert ask(server.url, start, first) == first + 'warm?"'
    asked = server.seen[0][3]["messages"][-1]["content"]
    assert asked.startswith("hello\n\nThe answer begins") and asked.endswith("\n" + begun)


def test_a_busy_broken_or_late_server_is_asked_again_after_ever_longer_waits(server):
    broken_off = (200, {"Content-Length": "99"}, b"{")
    server.script = [(429, {}, b""), (503, {}, b"busy"), (408, {}, b""), broken_off, 0.5]
    assert ask(server.url, wait=0.02, timeout=0.2) == "hello"
    times = [at for at, *_ in server.seen]
    gaps = [after - before for before, after in zip(times, times[1:])]
    assert len(gaps) == 5 and all(gap >= 0.02 * 2 ** i for i, gap in enumerate(gaps))


@pytest.mark.parametrize("status, content", [
    (503, b""), *((200, body) for body in (b"{}", b"[1]", b'{"choices": []}', b"<html>", b"\xff",
                                           b'{"choices": [{"message": null}]}', completion([1])))])
def test_a_server_that_stays_busy_or_writes_nonsense_is_named(server, status, content):
    server.script = [(status, {}, content)] * 9
    with pytest.raises(ConnectionError, match=f"{server.url}: no chat completion after 6 tries"):
        ask(server.url)
    assert len(server.seen) == 6


def test_a_server_that_is_not_there_is_named(server):
    with pytest.raises(ConnectionError, match="http://127.0.0.1:1/v1: .* after 6 tries"):
        ask("http://127.0.0.1:1/v1")


@pytest.mark.parametrize("status, said", [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"),
                                          (404, "--teacher-model"), (405, "HTTP 405")])
def test_what_will_not_pass_ends_the_work_at_once_and_shows_no_key(server, status, said):
    """Of the eight requests that may be under way none is followed by another."""
    server.script = [(status, {}, f"wrong key: {KEY}".encode())] * 300
    with pytest.raises(ConnectionError, match=said) as error:
        ask(server.url, texts=300)
    assert len(server.seen) <= 8 and "\n" not in str(error.value) and KEY not in str(error.value)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_refused_prompt_is_one_rejection_and_the_others_get_what_they_get(server, status):
    """With the server's reason, on one line and without the key, which some servers repeat."""
    error = {"error": {"message": f"prompt too long:\nkey {KEY} " + "x" * 300}}
    server.script = [(200, {}, completion("one")), (status, {}, json.dumps(error).encode()),
                     (200, {}, completion("three"))]
    writer = ServerWriter(server.url, "big", 0.001)
    prompts = [Prompt([{"role": "user", "content": str(i)}]) for i in range(3)]
    texts = [writer([prompt], 10, 0.7, 0.9, [(0, "id", i)])[0] for i, prompt in enumerate(prompts)]
    assert texts == ["one", "", "three"] and len(server.seen) == 3
    said = texts[1].problem
    assert said.startswith(f"refused by the server, HTTP {status} prompt too long, key ... xx")
    assert len(said) < 200 and "\n" not in said and ":" not in said
    assert rejected(texts[1]) == [f"{said}: no call could be read"]
    server.script = [(status, {}, b"x" * 95 + KEY.encode())]        # where the line is cut
    said = writer([prompts[0]], 10, 0.7, 0.9, [(0, "id", 9)])[0].problem
    assert KEY[:3] not in said


def rejected(text: str) -> list[str]:
    """Why the tries of one sample are rejected whose first text is this."""
    tool = {"name": "f", "description": "", "parameters": {}}
    sample = Sample("id", ({"role": "user", "content": "Hi."},), (tool,))
    h = {"id": train.Assessed("id", candidates={"f": 0.0}, request="Hi.")}

    def writer(*_): return [text]
    agent = SimpleNamespace(task=train.CALLING, writer=writer)
    found, = augment.synthesize(agent, [sample], train.Config(seed=1), h)
    return [one.reason for one in found.rejected][:1]


def test_a_text_that_was_cut_says_so_where_it_is_rejected(server):
    server.script = [(200, {}, completion('{"name": "f", "argu', "length"))]
    text = ask(server.url)
    assert text == '{"name": "f", "argu' and text.problem == "cut at 10 tokens"
    assert rejected(text) == ["cut at 10 tokens: no call could be read"]
    server.script = [(200, {}, completion("whole"))]
    assert ask(server.url).problem == ""


def test_without_a_key_no_token_for_the_hub_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setenv("HF_TOKEN", "hf_the_users_own")
    assert ask(server.url) == "hello" and "hf_the_users_own" not in str(server.seen[0][2])


@pytest.mark.parametrize("url", ["ftp://host/v1", "https://user:word@host/v1", "https:///v1",
                                 "https://host:word/v1", "https://host/v1?key=word",
                                 "https://host/v1#word", "https://host/v1\n"])
def test_a_url_with_a_secret_is_refused_and_not_shown(url):
    with pytest.raises(ValueError, match="no user name, no key and no query") as error:
        ServerWriter(url, "big")
    assert "word" not in str(error.value)


@pytest.mark.parametrize("path, asked", [
    ("", "/v1"), ("/v1", "/v1"), ("/v1/", "/v1"), ("/api/paas/v4", "/api/paas/v4"),
    ("/api/v3/chat/completions", "/api/v3")])
def test_a_base_url_may_have_any_path(server, path, asked):
    assert ask(server.url.removesuffix("/v1") + path) == "hello"
    assert server.seen[0][1] == f"{asked}/chat/completions"


@pytest.mark.parametrize("said", [
    '{CALL}\n"Oslo?"', '```json\n{CALL}\n"Oslo?"\n```', 'Sure, here it is:\n\n{CALL}\n"Oslo?"',
    '<think>\nA call: {"name": "g"}\n</think>\n\n{CALL}\n"Oslo?"', '2. {CALL}\n"Oslo?"',
    '{CALL}\n"Oslo?"\n\nLet me know if you need another.'])
def test_thinking_a_fence_and_remarks_around_what_was_asked_are_no_part_of_it(server, said):
    call, start = '{"name": "f", "arguments": {"x": "Oslo"}}', '1. {"name": "f"}\n"Rome?"\n2. '
    server.script = [(200, {}, completion(said.replace("{CALL}", call)))]
    text = ask(server.url, start, '{"name": "f", "arguments": {"x": "')
    assert text.split("\n")[:2] == [call, '"Oslo?"']


def test_a_call_that_a_server_moves_out_of_the_text_is_put_back(server):
    """As `transformers serve` does with <tool_call> blocks; before the text where a call comes
    first, behind it where the request does."""
    moved = json.loads(completion("Oslo?"))
    moved["choices"][0]["message"]["tool_calls"] = [{"id": "1", "type": "function", "function": {
        "name": "f", "arguments": '{"x": "Oslo"}'}}]
    server.script = [(200, {}, json.dumps(moved).encode())] * 2
    call = '{"name": "f", "arguments": {"x": "Oslo"}}'
    assert ask(server.url) == f"Oslo?\n<tool_call>\n{call}\n</tool_call>"
    assert ask(server.url, "2. ", '{"name": "f", "arguments": {"x": "') == f"{call}\nOslo?"


def test_after_a_failure_of_the_servers_own_another_seed_is_drawn(server):
    """A server that cannot read what it wrote itself writes the same again for the same seed."""
    server.script = [(500, {}, b"no JSON"), (503, {}, b""), (500, {}, b"no JSON")]
    assert ask(server.url) == "hello"
    seeds = [body["seed"] for *_, body in server.seen]
    assert seeds[1] == seeds[2] and len(set(seeds)) == 3


def test_what_a_server_refuses_can_be_left_out_and_renamed(server):
    options = "temperature=none,max_tokens=none,max_completion_tokens=320,effort=low"
    prompt = Prompt([{"role": "user", "content": "hello"}])
    ServerWriter(server.url, "big", options=options)([prompt], 10, 0.7, 0.9, [(0,)])
    body = server.seen[0][3]
    assert not {"temperature", "max_tokens"} & set(body) and body["top_p"] == 0.9
    assert (body["max_completion_tokens"], body["effort"]) == (320, "low")
    with pytest.raises(ValueError, match="--teacher-option temperature: must be NAME=VALUE"):
        ServerWriter(server.url, "big", options="temperature")


def test_offline_mode_of_the_library_is_named_at_once(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        ask(server.url, wait=5.0)
    assert time.monotonic() - began < 5


def test_a_key_goes_over_plain_http_to_this_machine_only(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for host in ("example.org", "192.168.0.2", "localhost.example.org", "127.0.0.1.example.org"):
        with pytest.raises(ValueError, match="unencrypted"):
            ServerWriter(f"http://{host}/v1", "big")
    for url in ("https://example.org/api/v1", "http://localhost:8000/v1", "http://[::1]:8000/v1/"):
        assert KEY not in repr(ServerWriter(url, "big"))
    monkeypatch.setenv("OPENAI_API_KEY", "")
    ServerWriter("http://192.168.0.2:8000/v1", "big")


@pytest.mark.parametrize("status", [302, 307])
def test_a_key_does_not_follow_a_redirect_to_another_host(server, status):
    other = f"localhost:{server.server_port}"           # another host to a client; the same server
    server.script = [(status, {"Location": f"http://{other}/v1/chat/completions"}, b"")]
    ask(server.url)
    there = [headers for _, _, headers, _ in server.seen if headers["Host"] == other]
    assert there and not any("Authorization" in headers for headers in there)
