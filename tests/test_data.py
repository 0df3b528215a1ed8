"""The loaders: the published files, the user's own, and every way in which a file can be wrong."""
import http.server
import json
import threading

import pytest

import data
from data import Sample, blob_id, cached_file, load
from data.calls import Call, required_arguments

TOOL = {"name": "f", "description": "d", "parameters": {"x": {"type": "string", "required": True}}}
ANSWER = {"name": "f", "arguments": {"x": "1"}}
ITEM = {"query": "q", "tools": [TOOL], "answers": [ANSWER]}
GOLD = (Call("f", {"x": "1"}),)
PAST = f"```[{json.dumps(ANSWER)}]```"
BODY = json.dumps([ITEM]).encode()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No test sees the user's own folders, or a network beyond this machine."""
    monkeypatch.delenv("TTSI_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def write(path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


def loaded(tmp_path, **changes) -> Sample:
    return load("sealtool", data=write(tmp_path / "own.json", [ITEM | changes]))[0]


def turns(*pairs: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.fixture
def url():
    """Where a web server on this machine serves BODY as sealtool.json, and nothing else."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/sealtool.json" else 404)
            self.end_headers()
            self.wfile.write(BODY)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/sealtool.json"
        server.shutdown()
        thread.join()


# --- Where a file is from -------------------------------------------------------------------------

def test_a_file_is_downloaded_once_and_then_read_from_the_cache(url, tmp_path):
    path = cached_file(url, blob_id(BODY), offline=False)
    assert path == tmp_path / "cache" / "ttsi" / "sealtool.json" and path.read_bytes() == BODY
    assert list(path.parent.iterdir()) == [path]                    # and nothing half-written
    assert cached_file("http://127.0.0.1:9/sealtool.json", blob_id(BODY), offline=False) == path
    assert cached_file(url, blob_id(BODY), offline=True) == path


def test_a_corrupted_download_is_refused_and_not_kept(url, tmp_path):
    with pytest.raises(ValueError, match="git blob id.*--data"):
        cached_file(url, blob_id(b"something else"), offline=False)
    assert not (tmp_path / "cache").exists()


def test_a_corrupted_cache_is_refused_offline_and_mended_online(url, tmp_path):
    write(tmp_path / "cache" / "ttsi" / "sealtool.json", b"[]")
    with pytest.raises(FileNotFoundError, match="offline.*sealtool.json.*not as published.*--data"):
        load("sealtool", offline=True)
    assert cached_file(url, blob_id(BODY), offline=False).read_bytes() == BODY


def test_without_network_the_error_names_the_flag(url):
    for address, why in ((url + "x", "404"), ("http://127.0.0.1:9/x", "refused")):
        with pytest.raises(ConnectionError, match=f"cannot download {address} .*{why}.*--data"):
            cached_file(address, blob_id(BODY), offline=False)
    with pytest.raises(FileNotFoundError, match="offline.*apibank_l1.json is missing.*--data"):
        load("apibank", offline=True)


def test_the_users_files_come_first_and_are_not_checked(tmp_path, monkeypatch):
    own = write(tmp_path / "own" / "NexusRaven.json", [ITEM, ITEM])
    for path in (own, str(tmp_path / "own")):
        assert [s.id for s in load("nexusraven", data=path)] == ["nexusraven-0", "nexusraven-1"]
    monkeypatch.setenv("TTSI_DATA", str(tmp_path / "own"))
    assert len(load("nexusraven", offline=True)) == 2
    with pytest.raises(FileNotFoundError, match="offline"):     # the folder lacks it: to the cache
        load("sealtool", offline=True)
    with pytest.raises(FileNotFoundError, match="no file .*own.* sealtool.json"):
        load("sealtool", data=str(tmp_path / "own"))
    for path in (str(tmp_path / "nowhere"), "x" * 5000, "~nobody-of-this-name/x"):
        monkeypatch.setenv("TTSI_DATA", path)
        with pytest.raises(FileNotFoundError, match="no file .*TTSI_DATA"):
            load("sealtool")


def test_unknown_and_unbundled_benchmarks_are_named():
    with pytest.raises(ValueError, match="unknown benchmark 'x'; choose one of toolalpaca"):
        load("x")
    with pytest.raises(FileNotFoundError, match="no file .*samples/apibank_l2.*--data"):
        load("apibank_l2", bundled=True)


# --- What a sample becomes ------------------------------------------------------------------------

def test_a_plain_request_is_one_user_turn(tmp_path):
    sample = loaded(tmp_path)
    assert sample == Sample("sealtool-0", ({"role": "user", "content": "q"},), (TOOL,), GOLD)
    assert sample.without_answers() == Sample("sealtool-0", sample.messages, (TOOL,))
    sealtool = loaded(tmp_path, answers=[{"tool": "f", "parameters": {"x": "1"}}])
    assert sealtool == sample


def test_a_full_json_schema_is_flattened(tmp_path):
    schema = {"type": "object", "properties": TOOL["parameters"], "required": ["x"]}
    assert loaded(tmp_path, tools=[TOOL | {"parameters": schema}]).tools \
        == (TOOL | {"required": ["x"]},)
    odd = {"type": {"type": "string"}, "properties": {"type": "string"}}    # parameters so named
    assert loaded(tmp_path, tools=[TOOL | {"parameters": odd}]).tools[0]["parameters"] == odd


@pytest.mark.parametrize("marked, required", [
    (TOOL, set()), (TOOL | {"parameters": {"x": {}}, "required": ["x"]}, set()),
    (TOOL | {"parameters": {"x": {}}}, {"y"})])
def test_a_tool_without_marks_requires_nothing_beside_tools_with_marks(marked, required, tmp_path):
    bare = {"name": "g", "parameters": {"y": {"type": "string"}}}
    items = [ITEM | {"tools": [bare]}, ITEM | {"tools": [marked]}]          # of one file
    first, second = load("sealtool", data=write(tmp_path / "own.json", items))
    assert required_arguments(first.tools[0]) == required
    assert required_arguments(second.tools[0]) == {"x"}


def test_what_is_no_candidate_is_left_out(tmp_path):
    tools = [TOOL | {"return": {}, "desc_for_search": "d"}, {"name": "note", "description": "-"},
             {"name": "components", "parameters": {}}, {"name": "g", "parameters": {}}]
    kept = loaded(tmp_path, tools=tools).tools
    assert [tool["name"] for tool in kept] == ["f", "g"] and kept[0] == TOOL


def test_api_banks_turns(tmp_path):
    query = turns(("user", "a"), ("agent", "b"), ("assistant", PAST), ("tool", "ok"), ("user", "c"))
    result = "<tool_response>\nok\n</tool_response>"
    expected = turns(("user", "a"), ("assistant", "b"), ("assistant", data.call_text(GOLD)),
                     ("user", result), ("user", "c"))
    assert list(loaded(tmp_path, query=query).messages) == expected
    for role, said, kept in (("agent", "Sure.\nGenerate API Request:", [("assistant", "Sure.")]),
                             ("user", "Yes.\nGenerate API Request:", [("user", "Yes.")]),
                             ("agent", "Generate API Request:", [])):
        messages = loaded(tmp_path, query=query + turns((role, said))).messages
        assert list(messages) == expected + turns(*kept)


def test_the_prompt_asks_in_the_last_turn_of_the_user(tmp_path):
    query = turns(("user", "a"), ("agent", "b"))
    plain = data.call_prompt(loaded(tmp_path))
    assert [m["role"] for m in plain] == ["system", "user"] and json.dumps(TOOL) in str(plain[0])
    assert plain[-1]["content"] == "q" + data.ASK_CALL
    asked = data.call_prompt(loaded(tmp_path, query=query))
    assert asked[-1] == {"role": "user", "content": data.ASK_CALL.strip()} and len(asked) == 4
    result = data.call_prompt(loaded(tmp_path, query=query + turns(("tool", "ok"))))
    assert result[-1] == asked[-1] and "ok" in result[-2]["content"]    # a tool asks for nothing


@pytest.mark.parametrize("content", [
    "```[1]```", "```[{]```", "plain", '```[{"name": "f"}]```', f"I did {PAST}", PAST.strip("`")])
def test_an_assistants_turn_that_is_no_list_of_calls_stays_text(content, tmp_path):
    query = turns(("user", "a"), ("assistant", content), ("user", "b"))
    assert loaded(tmp_path, query=query).messages[1] == {"role": "assistant", "content": content}


def test_text_beyond_ascii_and_a_byte_order_mark_are_kept(tmp_path):
    content = "\ufeff" + json.dumps([ITEM | {"query": "Zürich 😀"}], ensure_ascii=False)
    samples = load("sealtool", data=write(tmp_path / "f", content.encode()))
    assert data.request_text(samples[0]) == "Zürich 😀"


def test_of_a_dialogue_the_request_is_what_the_user_says_on_one_line(tmp_path):
    query = turns(("user", "Book it.\nPlease"), ("agent", "For when?"),
                  ("assistant", PAST), ("tool", "ok"), ("user", "Monday"))
    sample = loaded(tmp_path, query=query)
    assert data.request_text(sample) == "Book it. Please Monday"
    assert data.request_text(loaded(tmp_path, query=" a\n b ")) == "a b"


def test_a_sample_with_another_request_keeps_the_tools_and_no_label(tmp_path):
    new = data.with_request(loaded(tmp_path, query=turns(("user", "a"), ("agent", "b"))), "new")
    assert new == Sample("sealtool-0", ({"role": "user", "content": "new"},), (TOOL,))


# --- What can be wrong ----------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    ({"query": None}, ": 'query' is missing"), ({"query": 7}, ": 'query' is .* wrong type"),
    ({"tools": {}}, ": 'tools' is .* wrong type"), ({"answers": {}}, ": 'answers' is .* type"),
    ({"query": " "}, ": the query is empty"), ({"query": []}, ": the query is empty"),
    ({"query": turns(("alien", ""))}, ": turn 0: no role"), ({"query": [7]}, ": turn 0: no role"),
    ({"query": turns(("user", None))}, ": turn 0: no role"),
    ({"tools": []}, ": no tool to call"), ({"tools": [TOOL, TOOL]}, "two tools of one name"),
    ({"tools": ["f"]}, ", tool 0: no name"), ({"tools": [TOOL, {"name": ""}]}, ", tool 1: no name"),
    ({"tools": [TOOL | {"name": ["f"]}]}, ", tool 0: no name"),
    ({"tools": [TOOL | {"parameters": []}]}, ", tool 0: f: 'parameters' is of a wrong type"),
    ({"tools": [TOOL | {"parameters": {"x": "string"}}]}, "f: parameter 'x' is not an object"),
    ({"tools": [TOOL | {"parameters": {"type": "object", "properties": 7}}]}, "f: 'parameters' is"),
    ({"tools": [TOOL | {"required": "x"}]}, "f: 'required' is of a wrong type"),
    ({"tools": [TOOL | {"description": 7}]}, "f: 'description' is of a wrong type"),
    ({"answers": ["f"]}, ", answer 0: not an object"),
    ({"answers": [ANSWER, {"name": "f"}]}, ", answer 1: no name or no arguments"),
    ({"answers": [{"arguments": {}}]}, ", answer 0: no name or no arguments"),
    ({"answers": [{"name": "f", "arguments": "x"}]}, ", answer 0: no name or no arguments")])
def test_a_faulty_item_is_named_with_its_file_and_index(changes, message, tmp_path):
    item = {key: value for key, value in (ITEM | changes).items() if value is not None}
    with pytest.raises(ValueError, match=rf"faulty\.json, item 1.*{message}.*--data"):
        load("sealtool", data=write(tmp_path / "faulty.json", [ITEM, item]))


@pytest.mark.parametrize("content, message", [
    (b"[7]", "item 0: 'query' is missing"), (b'[\n{"query": "q",\n}]', "as JSON .*line 3"),
    (b"", "as JSON .*line 1"), (b"{}", "not a list of samples"), (b"[]", ", or an empty one"),
    (b"\xff[]", "read and written as JSON .*utf-8"), (b'["\\ud800"]', "as JSON .*surrogates"),
    (b"[NaN]", "read and written as JSON"),
    (b"[" * 200_000, "read and written as JSON .*recursion"),
    (b"[" + b"9" * 5000 + b"]", "read and written as JSON .*digits")])
def test_a_faulty_file_is_named(content, message, tmp_path):
    with pytest.raises(ValueError, match=rf"faulty\.json.*{message}.*--data"):
        load("sealtool", data=write(tmp_path / "faulty.json", content))
