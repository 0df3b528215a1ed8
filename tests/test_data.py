"""The loaders: five published files, the user's own, and every way in which a file can be wrong."""
import hashlib
import http.server
import json
import threading

import pytest

import data
from data.calls import Call

TOOL = {"name": "f", "description": "d", "parameters": {"x": {"type": "string", "required": True}}}
ANSWER = {"name": "f", "arguments": {"x": "1"}}
ITEM = {"query": "q", "tools": [TOOL], "answers": [ANSWER]}
GOLD = (Call("f", {"x": "1"}),)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No test sees the user's own folders, or the network."""
    monkeypatch.delenv("TTSI_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "URL", "http://127.0.0.1:9/")
    return tmp_path


def write(path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


def loaded(tmp_path, item) -> data.Sample:
    return data.load("sealtool", data=write(tmp_path / "own.json", [item]))[0]


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine in the place of GitHub; `server.body` is what it sends, None for a 404."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.send_response(404 if self.server.body is None else 200)
            self.end_headers()
            self.wfile.write(self.server.body or b"")

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.asked = json.dumps([ITEM]).encode(), []
        monkeypatch.setattr(data, "URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        blob = hashlib.sha1(b"blob %d\0" % len(server.body) + server.body).hexdigest()
        monkeypatch.setitem(data.PUBLISHED, "sealtool", ("sealtool.json", blob))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# ----------------------------------------------------------------------------------------------- where a file is from

def test_a_file_is_downloaded_once_and_then_read_from_the_cache(server, tmp_path):
    assert [s.id for s in data.load("sealtool")] == ["sealtool-0"]
    assert [s.answers for s in data.load("sealtool", offline=True)] == [GOLD] and server.asked == ["/sealtool.json"]
    assert [p.name for p in (tmp_path / "cache" / "ttsi").iterdir()] == ["sealtool.json"]     # and nothing half-written


def test_a_corrupted_download_is_refused_and_not_kept(server, tmp_path):
    server.body = server.body[:-1] + b" "
    with pytest.raises(ValueError, match="git blob id.*--data"):
        data.load("sealtool")
    assert not (tmp_path / "cache").exists()


def test_a_corrupted_cache_is_refused_offline_and_mended_online(server, tmp_path):
    write(tmp_path / "cache" / "ttsi" / "sealtool.json", b"[]")
    with pytest.raises(FileNotFoundError, match="offline.*blob id differs.*--data"):
        data.load("sealtool", offline=True)
    assert len(data.load("sealtool")) == 1


def test_without_network_the_error_names_the_flag(server):
    server.body = None
    with pytest.raises(ConnectionError, match="404.*--data"):
        data.load("sealtool")
    with pytest.raises(FileNotFoundError, match="offline.*--data"):
        data.load("apibank", offline=True)


def test_a_closed_port_is_a_connection_error():
    with pytest.raises(ConnectionError, match="cannot download"):
        data.load("nexusraven")


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", write(tmp_path / "file", b""))
    with pytest.raises(FileNotFoundError, match="cannot write.*XDG_CACHE_HOME"):
        data.load("sealtool")


def test_the_users_files_come_first_and_are_not_checked(tmp_path, monkeypatch):
    own = write(tmp_path / "own" / "NexusRaven.json", [ITEM, ITEM])
    for path in (own, str(tmp_path / "own")):
        assert [s.id for s in data.load("nexusraven", data=path)] == ["nexusraven-0", "nexusraven-1"]
    monkeypatch.setenv("TTSI_DATA", str(tmp_path / "own"))
    assert len(data.load("nexusraven", offline=True)) == 2
    with pytest.raises(FileNotFoundError, match="offline"):      # the folder lacks this one: on to the cache
        data.load("sealtool", offline=True)
    with pytest.raises(FileNotFoundError, match="no file .*sealtool.json"):
        data.load("sealtool", data=str(tmp_path / "own"))
    for path in ("x" * 5000, "~nobody-of-this-name/x"):
        with pytest.raises(FileNotFoundError, match="no file"):
            data.load("sealtool", data=path)
    monkeypatch.setenv("TTSI_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="TTSI_DATA=.*nowhere"):
        data.load("sealtool")


def test_unknown_and_unbundled_benchmarks_are_named():
    with pytest.raises(ValueError, match="unknown benchmark 'x'; choose one of toolalpaca"):
        data.load("x")
    with pytest.raises(FileNotFoundError, match="no bundled samples for apibank_l2.*--data"):
        data.load("apibank_l2", bundled=True)


def test_blob_id_is_gits():
    assert data.blob_id(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


# ---------------------------------------------------------------------------------------------- what a sample becomes

def test_a_plain_request_is_one_user_turn(tmp_path):
    sample = loaded(tmp_path, ITEM)
    assert sample == data.Sample("sealtool-0", ({"role": "user", "content": "q"},), (TOOL,), GOLD)
    assert sample.without_answers().answers == ()


def test_sealtools_answers_and_required_list(tmp_path):
    tool = {"name": "f", "parameters": {"x": {"type": "str"}}, "required": ["x"]}
    sample = loaded(tmp_path, ITEM | {"tools": [tool], "answers": [{"tool": "f", "parameters": {"x": "1"}}]})
    assert sample.answers == GOLD and sample.tools == (tool | {"description": ""},)


def test_a_full_json_schema_is_flattened(tmp_path):
    schema = {"type": "object", "properties": TOOL["parameters"], "required": ["x"]}
    assert loaded(tmp_path, ITEM | {"tools": [TOOL | {"parameters": schema}]}).tools == (TOOL | {"required": ["x"]},)
    odd = {"type": {"type": "string"}, "properties": {"type": "string"}}        # parameters that bear these names
    assert loaded(tmp_path, ITEM | {"tools": [TOOL | {"parameters": odd}]}).tools[0]["parameters"] == odd


def test_what_is_no_candidate_is_left_out(tmp_path):
    tools = [TOOL | {"return": {}, "desc_for_search": "d"}, {"name": "components", "parameters": {}},
             {"name": "note", "description": "no parameters at all"}, {"name": "g", "parameters": {}}]
    kept = loaded(tmp_path, ITEM | {"tools": tools}).tools
    assert [tool["name"] for tool in kept] == ["f", "g"] and kept[0] == TOOL


def test_api_banks_turns(tmp_path):
    turns = [("user", "a"), ("agent", "b"), ("assistant", '```[{"name": "f", "arguments": {"x": "1"}}]```'),
             ("tool", "ok"), ("user", "c"), ("agent", "Sure.\nGenerate API Request:")]
    query = [{"role": role, "content": content} for role, content in turns]
    messages = loaded(tmp_path, ITEM | {"query": query}).messages
    assert [m["role"] for m in messages] == ["user", "assistant", "assistant", "tool", "user", "assistant"]
    assert messages[2] == {"role": "assistant", "content": "", "tool_calls": [ANSWER]}
    assert messages[-1]["content"] == "Sure."
    query[-1]["content"] = "Generate API Request:"
    assert loaded(tmp_path, ITEM | {"query": query}).messages == messages[:-1]
    assert data.call_prompt(loaded(tmp_path, ITEM | {"query": query[:4]}))[-1]["role"] == "user"


@pytest.mark.parametrize("content", ["```[1]```", "```[{]```", "plain", "```[]```", '```[{"name": "f"}]```'])
def test_an_assistants_turn_that_is_no_list_of_calls_stays_text(content, tmp_path):
    query = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", content), ("user", "b"))]
    assert loaded(tmp_path, ITEM | {"query": query}).messages[1] == {"role": "assistant", "content": content}


def test_text_beyond_ascii_and_a_byte_order_mark_are_kept(tmp_path):
    content = "\ufeff" + json.dumps([ITEM | {"query": "Zürich 😀"}], ensure_ascii=False)
    samples = data.load("sealtool", data=write(tmp_path / "f", content.encode()))
    assert samples[0].messages[0]["content"] == "Zürich 😀"


# ---------------------------------------------------------------------------------------------------- what can be wrong

def without(key: str) -> dict:
    return {k: v for k, v in ITEM.items() if k != key}


@pytest.mark.parametrize("item, message", [
    (7, "item 1: not an object"),
    (without("query"), "item 1: 'query' is missing"),
    (without("tools"), "item 1: 'tools' is missing"),
    (without("answers"), "item 1: 'answers' is missing"),
    (ITEM | {"query": 7}, "item 1: 'query' is missing or of a wrong type"),
    (ITEM | {"query": " "}, "item 1: the query is empty"),
    (ITEM | {"query": []}, "item 1: the query is empty"),
    (ITEM | {"query": [{"role": "alien", "content": ""}]}, "item 1: turn 0 of the query"),
    (ITEM | {"query": [{"role": "user", "content": None}]}, "item 1: turn 0 of the query"),
    (ITEM | {"tools": {}}, "item 1: 'tools' is missing or of a wrong type"),
    (ITEM | {"tools": []}, "item 1: no tool that can be called"),
    (ITEM | {"tools": ["f"]}, "item 1, tool 0: no name"),
    (ITEM | {"tools": [TOOL, {"parameters": {}}]}, "item 1, tool 1: no name"),
    (ITEM | {"tools": [TOOL | {"name": ["f"]}]}, "item 1, tool 0: no name"),
    (ITEM | {"tools": [TOOL, TOOL]}, "item 1: two tools of one name among f, f"),
    (ITEM | {"tools": [TOOL | {"parameters": []}]}, r"item 1, tool 0 \(f\): 'parameters' is not an object"),
    (ITEM | {"tools": [TOOL | {"parameters": {"x": "string"}}]}, r"tool 0 \(f\): parameter 'x' is not an object"),
    (ITEM | {"tools": [TOOL | {"parameters": {"type": "object", "properties": 7}}]}, "'properties' is not an object"),
    (ITEM | {"tools": [TOOL | {"required": "x"}]}, "'required' is not a list of names"),
    (ITEM | {"tools": [TOOL | {"description": 7}]}, "'description' is not a string"),
    (ITEM | {"answers": {}}, "item 1: 'answers' is missing or of a wrong type"),
    (ITEM | {"answers": ["f"]}, "item 1, answer 0: not an object"),
    (ITEM | {"answers": [ANSWER, {"name": "f"}]}, "item 1, answer 1: neither"),
    (ITEM | {"answers": [{"arguments": {}}]}, "item 1, answer 0: neither"),
    (ITEM | {"answers": [{"name": "f", "arguments": "x"}]}, "item 1, answer 0: neither"),
    (ITEM | {"query": "\ud800"}, "item 1: .*surrogates"),
    (ITEM | {"answers": [{"name": "f", "arguments": {"x": float("nan")}}]}, "item 1: .*JSON"),
])
def test_a_faulty_item_is_named_with_its_file_and_index(item, message, tmp_path):
    with pytest.raises(ValueError, match=rf"faulty\.json, .*{message.removeprefix('item 1')}.*--data") as error:
        data.load("sealtool", data=write(tmp_path / "faulty.json", [ITEM, item]))
    assert "faulty.json, item 1" in str(error.value)


@pytest.mark.parametrize("content, message", [
    (b'[\n{"query": "q",\n}]', "line 3: not JSON"),
    (b"", "line 1: not JSON"),
    (b"{}", "not a list of samples"),
    (b"[]", "not a list of samples, or an empty one"),
    (b"\xff[]", "cannot be stored as JSON .*utf-8"),
    (b"[" * 200_000, "cannot be stored as JSON .*recursion"),
    (b"[" + b"9" * 5000 + b"]", "cannot be stored as JSON .*digits"),
])
def test_a_faulty_file_is_named(content, message, tmp_path):
    with pytest.raises(ValueError, match=rf"faulty\.json.*{message}.*--data"):
        data.load("sealtool", data=write(tmp_path / "faulty.json", content))


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.json"
    with open(path, "wb") as file:
        file.truncate(data.MAX_BYTES + 1)           # sparse: takes no space
    with pytest.raises(ValueError, match="larger than .*--data"):
        data.load("sealtool", data=str(path))
