"""The loaders: the published files, the user's own, and every way in which a file can be wrong."""
import json
from dataclasses import replace

import pytest

import data
from data import Sample, blob_id, cached_file, load, request_text
from data.calls import Call, call_text, required_arguments
from evaluate import exact_match

TOOL = {"name": "f", "description": "d", "parameters": {"x": {"type": "string", "required": True}}}
ANSWER = {"name": "f", "arguments": {"x": "1"}}
ITEM = {"query": "q", "tools": [TOOL], "answers": [ANSWER]}
GOLD = (Call("f", {"x": "1"}),)
PAST = f"```[{json.dumps(ANSWER)}]```"
BODY = json.dumps([ITEM]).encode()
NOWHERE = "http://127.0.0.1:9/sealtool.json"


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


def loaded(tmp_path, *items: dict) -> list[Sample]:
    return load("sealtool", data=write(tmp_path / "own.json", [ITEM | item for item in items]))


def loaded_file(tmp_path, items: list[dict]) -> list[Sample]:
    return load("mine", data=write(tmp_path / "own.json", items))


def turns(*pairs: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in pairs]


# --- Where a file is from -------------------------------------------------------------------------

def test_a_file_is_downloaded_once_checked_and_then_read_from_the_cache(tmp_path):
    url = "file://" + write(tmp_path / "web" / "sealtool.json", BODY)
    with pytest.raises(ValueError, match="git blob id.*--data"):
        cached_file(url, blob_id(b"something else"), offline=False)
    assert not (tmp_path / "cache").exists()
    path = cached_file(url, blob_id(BODY), offline=False)
    assert path == tmp_path / "cache" / "ttsi" / "sealtool.json" and path.read_bytes() == BODY
    assert list(path.parent.iterdir()) == [path]                    # and nothing half-written
    assert cached_file(NOWHERE, blob_id(BODY), offline=True) == path
    path.write_bytes(b"corrupted")
    assert cached_file(url, blob_id(BODY), offline=False).read_bytes() == BODY


def test_a_file_that_cannot_be_had_is_refused_and_the_error_names_the_flag(tmp_path):
    with pytest.raises(ConnectionError, match=f"cannot download {NOWHERE} .*--data"):
        cached_file(NOWHERE, blob_id(BODY), offline=False)
    with pytest.raises(FileNotFoundError, match="offline.*sealtool.json is missing.*--data"):
        load("sealtool", offline=True)
    write(tmp_path / "cache" / "ttsi" / "sealtool.json", b"corrupted")
    with pytest.raises(FileNotFoundError, match="offline.*or not as published.*--data"):
        load("sealtool", offline=True)
    with pytest.raises(ValueError, match="unknown benchmark 'x'; choose one of toolalpaca"):
        load("x")


def test_the_users_files_come_first_and_are_not_checked(tmp_path, monkeypatch):
    with_mark = "\ufeff" + json.dumps([ITEM, ITEM])             # a byte order mark
    own = write(tmp_path / "own" / "NexusRaven.json", with_mark.encode())
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


# --- What a sample becomes ------------------------------------------------------------------------

def test_a_plain_request_is_one_user_turn_and_another_request_has_no_label(tmp_path):
    sample, sealtool = loaded(tmp_path, {"query": "Zürich 😀"}, {
        "answers": [{"tool": "f", "parameters": {"x": "1"}}]})
    asked = ({"role": "user", "content": "Zürich 😀"},)
    assert sample == Sample("sealtool-0", asked, (TOOL,), GOLD) and sealtool.answers == GOLD
    unlabelled = Sample("sealtool-0", asked, (TOOL,))
    assert data.with_request(sample, "Zürich 😀") == unlabelled


def test_a_full_json_schema_is_flattened_but_not_parameters_of_its_names(tmp_path):
    schema = {"type": "object", "properties": TOOL["parameters"], "required": ["x"]}
    odd = {"type": {"type": "string"}, "properties": {"type": "string"}}
    flat, kept = loaded(tmp_path, *({"tools": [TOOL | {"parameters": p}]} for p in (schema, odd)))
    assert flat.tools == (TOOL | {"required": ["x"]},) and kept.tools[0]["parameters"] == odd


BARE = {"name": "g", "parameters": {"y": {"type": "string"}}}


@pytest.mark.parametrize("marked", [
    TOOL, TOOL | {"parameters": {"x": {}}, "required": ["x"]}, TOOL | {"parameters": {"x": {}}}])
def test_one_tools_marks_change_no_others(marked, tmp_path):
    """In the files of ToolAlpaca and NexusRaven, which mark what is required, else nothing is."""
    first, second = loaded(tmp_path, {"tools": [BARE]}, {"tools": [marked]})
    assert required_arguments(first.tools[0]) == {"y"}
    assert required_arguments(second.tools[0]) == {"x"}
    for bench, name in (("toolalpaca", "toolalpaca.json"), ("nexusraven", "NexusRaven.json")):
        theirs, = load(bench, write(tmp_path / name, [ITEM | {"tools": [BARE]}]))
        assert theirs.tools == ({**BARE, "description": "", "required": []},)


def test_a_tool_without_parameters_is_offered_and_only_toolalpacas_components_are_not(
        tmp_path, capsys):
    tools = [TOOL | {"return": {}, "desc_for_search": "d"}, {"name": "note", "description": None},
             {"name": "components", "parameters": {}}, {"name": "g", "parameters": {}}]
    kept = loaded(tmp_path, {"tools": tools})[0].tools
    assert [tool["name"] for tool in kept] == ["f", "note", "components", "g"]
    assert kept[:2] == (TOOL, {"name": "note", "description": "", "parameters": {}})
    assert capsys.readouterr().out == ""
    theirs, = load("toolalpaca", write(tmp_path / "t.json", [ITEM | {"tools": tools}]))
    assert [tool["name"] for tool in theirs.tools] == ["f", "note", "g"]
    assert "t.json: `components` is no tool (1 times)" in capsys.readouterr().out


DIALOGUE = turns(("user", "Book it.\nPlease"), ("agent", "When?"), ("assistant", PAST),
                 ("tool", "ok"), ("user", "Monday"))


def test_api_banks_turns_are_those_of_a_chat_without_its_way_of_asking(tmp_path):
    ask = "Generate API Request:"
    plain, sure, yes, empty = loaded(tmp_path, *({"query": [*DIALOGUE, *more]} for more in (
        [], turns(("agent", f"Sure.\n{ask}")), turns(("user", f"Yes.\n{ask}")),
        turns(("agent", ask)))))
    result = "<tool_response>\nok\n</tool_response>"
    assert list(plain.messages) == list(empty.messages) == turns(
        ("user", "Book it.\nPlease"), ("assistant", "When?"), ("assistant", call_text(GOLD)),
        ("user", result), ("user", "Monday"))
    assert sure.messages == (*plain.messages, {"role": "assistant", "content": "Sure."})
    assert yes.messages == (*plain.messages, {"role": "user", "content": "Yes."})
    assert data.request_text(yes) == "Book it. Please Monday Yes."      # the user's, on one line


def test_the_prompt_asks_in_the_last_turn_of_the_user(tmp_path):
    agent, tool = DIALOGUE[:2], DIALOGUE[:4]
    plain, *others = map(data.call_prompt, loaded(tmp_path, {}, {"query": agent}, {"query": tool}))
    assert plain == [plain[0], {"role": "user", "content": "q" + data.ASK_CALL}]
    assert plain[0]["role"] == "system" and json.dumps(TOOL) in plain[0]["content"]
    for chat, before in zip(others, (2, 4)):                        # nor does a tool ask anything
        assert chat[1 + before:] == [{"role": "user", "content": data.ASK_CALL.strip()}]


def test_tools_are_shuffled_by_seed_and_id_whatever_their_order_was(tmp_path):
    tools = [TOOL | {"name": name} for name in "abcde"]
    one, other = loaded(tmp_path, {"tools": tools}, {"tools": tools[::-1]})
    twin = replace(one, tools=one.tools[::-1])
    orders = []
    for seed in range(40):
        assert data.shuffled(one, seed) == data.shuffled(twin, seed)
        assert replace(data.shuffled(one, seed), tools=one.tools) == one    # nothing else differs
        for x in (one, other):
            orders.append("".join([tool["name"] for tool in data.shuffled(x, seed).tools]))
    assert {"".join(sorted(order)) for order in orders} == {"abcde"} and len(set(orders)) > 40
    firsts = [order[0] for order in orders]
    assert all(8 <= firsts.count(name) <= 24 for name in "abcde")       # 16 of 80 each, by chance


@pytest.mark.parametrize("content", [
    "```[1]```", "```[{]```", "plain", '```[{"name": "f"}]```', f"I did {PAST}", PAST.strip("`")])
def test_an_assistants_turn_that_is_no_list_of_calls_stays_text(content, tmp_path):
    query = turns(("user", "a"), ("assistant", content), ("user", "b"))
    sample, = loaded(tmp_path, {"query": query})
    assert sample.messages[1] == {"role": "assistant", "content": content}


# --- The shapes of files that people have: the table of data/README.md ----------------------------

LAMP = {"type": "object", "required": ["room"], "additionalProperties": False, "properties": {
    "room": {"type": "string"}, "level": {"type": ["integer", "null"]}}}
SET, OFF = {"name": "set", "description": "Sets.", "parameters": LAMP}, {"name": "all off/v2: x"}
SHOWN = ({"name": "set", "description": "Sets.", "parameters": LAMP["properties"],
          "required": ["room"]}, {"name": "all off/v2: x", "description": "", "parameters": {}})
OPENAI = [{"type": "function", "function": tool} for tool in (SET, OFF)]
MCP = [{"name": "set", "description": "Sets.", "inputSchema": LAMP}, OFF]
ANTHROPIC = [{"name": "set", "description": "Sets.", "input_schema": LAMP}, OFF]
KITCHEN, HALL = ({"name": "set", "arguments": {"room": room}} for room in ("kitchen", "hall"))
USED = [{"id": "c", "type": "function", "function": {**KITCHEN, "arguments": json.dumps(
    KITCHEN["arguments"])}}]
ASK = {"role": "user", "content": "The kitchen, please."}
ANSWERED = {"role": "assistant", "content": None, "tool_calls": USED}
SAYS = "Tools:\n[{\"name\": \"all off/v2: x\"}, %s]. Put it as [func(name=value)]." % (
    json.dumps(SET))
HERMES = "You help. They are in <tools></tools> tags.\n<tools> %s </tools>"
GPT = "<tool_call>\n{'name': 'set', 'arguments': {'room': 'kitchen'}}\n</tool_call>"


def sharegpt(system: str, answer: str, **more) -> dict:
    turns = [("system", system), ("human", ASK["content"]), ("gpt", answer)]
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


TOOLS_OF = {"bare": [SET, OFF], "OpenAI": OPENAI, "MCP": MCP, "Anthropic": ANTHROPIC,
            "JSON as text": json.dumps([SET, OFF])}
FILES = {       # a shape: its item, the system text shown beside ours
    **{f"query, tools: {kind}": (
        {"query": ASK["content"], "tools": tools, "answers": [KITCHEN]}, "")
       for kind, tools in TOOLS_OF.items()},
    "xLAM": ({"id": "7", "query": ASK["content"], "tools": json.dumps(OPENAI),
              "answers": json.dumps([KITCHEN])}, ""),
    "OpenAI's answers": ({"query": ASK["content"], "tools": OPENAI, "answers": USED}, ""),
    "OpenAI's chat": ({"tools": OPENAI, "messages": [
        {"role": "system", "content": "You run a house."}, ASK, ANSWERED]}, "You run a house."),
    "parts": ({"tools": OPENAI, "messages": [
        {"role": "user", "content": [{"type": "text", "text": ASK["content"]}]}, ANSWERED]}, ""),
    "a list in the system text": ({"tools": OPENAI, "messages": [
        {"role": "system", "content": SAYS}, ASK, ANSWERED]}, SAYS),
    "functions": ({"functions": [SET, OFF], "messages": [
        ASK, {"role": "assistant", "content": "", "function_call": USED[0]["function"]}]}, ""),
    "Anthropic": ({"system": "Be kind.", "tools": ANTHROPIC, "messages": [
        ASK, {"role": "assistant", "content": [
            {"type": "text", "text": "Yes."},
            {"type": "tool_use", "name": "set", "input": {"room": "kitchen"}}]}]}, "Be kind."),
    "turns and answers": ({"tools": OPENAI, "messages": [ASK], "answers": [KITCHEN]}, ""),
    "behind the call": ({"tools": OPENAI, "messages": [
        ASK, ANSWERED, {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "Done."}]}, ""),
    "Hermes": (sharegpt(HERMES % json.dumps(OPENAI), GPT), HERMES[:-21]),
    "Hermes, a tool a line": (sharegpt(
        HERMES % f"\n{json.dumps(SET)}\n{json.dumps(OFF)}\n", GPT), HERMES[:-21]),
    "tools beside": (sharegpt(HERMES % "", GPT, tools=json.dumps(OPENAI)), HERMES % ""),
    "ToolACE": (sharegpt(SAYS, "[set(room='kitchen')]"), ""),
    "function_call": ({"tools": json.dumps([SET, OFF]), "conversations": [
        {"from": "human", "value": ASK["content"]},
        {"from": "function_call", "value": json.dumps(KITCHEN)}]}, "")}


def test_apibanks_own_files_are_read_as_the_published_form_made_of_them_is(tmp_path):
    """A tool a line in the instruction, a turn a line, earlier calls with their results."""
    lamp = {"name": "SetLamp", "description": "Sets.", "input_parameters": {
        "room": {"type": "str"}, "level": {"type": "str"}}, "output_parameters": {}}
    said = ["User: The kitchen, please.", "API-Request: [SetLamp(room='kitchen')]->ok", "AI: Done.",
            "It is on.", "User: And the hall", "AI: Yes.", "Generate API Request:", ""]
    asked = f"Say it.\nAPI descriptions:\n{json.dumps(lamp)}"
    sample, = loaded_file(tmp_path, [{
        "id": 3, "file": "a.jsonl", "instruction": asked, "input": "\n".join(said),
        "expected_output": "API-Request: [SetLamp(room='hall', level=2)]"}])
    other, = loaded_file(tmp_path, [{"id": 3, "tools": [{
        "name": "SetLamp", "description": "Sets.", "parameters": lamp["input_parameters"]}],
        "query": turns(("user", "The kitchen, please."), ("assistant", "```%s```" % json.dumps(
            [{"name": "SetLamp", "arguments": {"room": "kitchen"}}])), ("tool", "ok"),
            ("agent", "Done.\nIt is on."), ("user", "And the hall"),
            ("agent", "Yes.\nGenerate API Request:")),
        "answers": [{"name": "SetLamp", "arguments": {"room": "hall", "level": 2}}]}])
    assert sample == other


def test_seal_tools_own_conversations_are_read(tmp_path):
    tools = [{"api_name": "setLamp", "api_description": "Sets.", "field": "Home", "parameters": {
        "room": {"type": "str"}}, "required": ["room"], "responses": {}}]
    asked = f"Choose.\n\nInput:\napi_list = {tools}\n"
    asked += 'task_instruction = "The "old" hall"\nOutput:\n'
    calls = [{"api": "setLamp", "parameters": {"room": "hall"}, "responses": ["API_call_0"]}]
    talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": str(calls)}]
    sample, = loaded_file(tmp_path, [{"id": "dev-0", "conversations": talk}])
    assert (sample.id, request_text(sample)) == ("dev-0", 'The "old" hall')
    assert sample.tools == ({"name": "setLamp", "description": "Sets.", "required": ["room"],
                             "parameters": {"room": {"type": "str"}}},)
    assert sample.answers == (Call("setLamp", {"room": "hall"}),)
    assert loaded_file(tmp_path, [{"conversations": talk[:1]}])[0].answers is None
    for wrong, said in ((asked.replace("api_name", "title"), "tool 0: no name"),
                        (asked.replace("[{", "[{{"), "'tools' is a text that is no JSON")):
        with pytest.raises(ValueError, match=f"item 0: {said}"):
            loaded_file(tmp_path, [{"conversations": [{"from": "human", "value": wrong}]}])


@pytest.mark.parametrize("shape", FILES)
def test_a_shape_is_read_as_its_owner_means_it(shape, tmp_path):
    item, system = FILES[shape]
    for name, content in (("a.json", [item]), ("a.jsonl", f"{json.dumps(item)}\n\n".encode())):
        sample, = load("a", write(tmp_path / name, content))
        assert sorted(sample.tools, key=str) == sorted(SHOWN, key=str)
        assert sample.id == item.get("id", "a-0") and sample.answers == (Call(**KITCHEN),)
        assert required_arguments(sample.tools[sample.tools.index(SHOWN[0])]) == {"room"}
        first, asked = data.call_prompt(sample)
        assert first["content"].startswith(system or "You are a helpful assistant.")
        assert asked["content"] == ASK["content"] + data.ASK_CALL
        assert exact_match(call_text(sample.answers), sample).exact
        other = data.with_request(sample, "Again.")             # the system text is x's, too
        assert data.call_prompt(other)[0] == first and data.request_text(other) == "Again."


@pytest.mark.parametrize("earlier", [
    ANSWERED, {**ANSWERED, "content": ""}, {"role": "assistant", "content": [
        {"type": "tool_use", "name": "set", "input": {"room": "kitchen"}}]}])
def test_earlier_calls_are_shown_before_their_results(earlier, tmp_path):
    turns_ = [ASK, earlier, *turns(("tool", "done"), ("user", "Hall."))]
    said = turns(("user", ASK["content"]), ("assistant", call_text([Call(**KITCHEN)])),
                 ("user", "<tool_response>\ndone\n</tool_response>"), ("user", "Hall."))
    last = {"role": "assistant", "tool_calls": [{"function": HALL}]}
    for item in ({"query": turns_, "tools": OPENAI, "answers": [HALL]},
                 {"messages": [*turns_, last], "tools": OPENAI}):
        sample, = load("a", write(tmp_path / "a.json", [item]))
        assert list(sample.messages) == said and sample.answers == (Call(**HALL),)


def test_toolaces_names_may_hold_anything(tmp_path):
    said = """[all off/v2: x(), set(room="it's (a=b) [", level=2), set(room='y', level=None)]"""
    sample, = load("a", write(tmp_path / "a.json", [sharegpt(SAYS, said)]))
    assert sample.answers == (
        Call("all off/v2: x"), Call("set", {"room": "it's (a=b) [", "level": 2}),
        Call("set", {"room": "y", "level": None}))


@pytest.mark.parametrize("item, answers", [
    ({"query": "q", "tools": [SET]}, None), ({"query": "q", "tools": [SET], "answers": None}, None),
    ({"query": "q", "tools": [SET], "answers": []}, ()),
    ({"messages": [ASK], "tools": OPENAI}, None),
    ({"messages": [ASK, {"role": "assistant", "content": "No."}], "tools": OPENAI}, ())])
def test_no_gold_is_not_the_gold_of_no_call(item, answers, tmp_path):
    sample, = load("a", write(tmp_path / "a.json", [item]))
    assert sample.answers == answers
    assert exact_match("[]", sample).exact == (None if answers is None else True)


ROOM = {"type": "string", "enum": ["kitchen", "hall"]}
SCHEMAS = [     # what a tool's "parameters" are, what is shown of them, what is required
    ({"properties": {"room": {"type": "string"}}}, {"room": {"type": "string"}}, set()),
    ({"$schema": "x", "type": "object", "properties": {}}, {}, set()),
    ({"type": "object", "required": None, "properties": {"room": ROOM}}, {"room": ROOM}, set()),
    ({"type": "object"}, {}, set()), (None, {}, set()),
    ({"additionalProperties": False}, {}, set()),
    ({"type": "object", "$defs": {"Room": ROOM, "Two": {"type": "array", "items": {
        "$ref": "#/$defs/Room"}}}, "properties": {"room": {"$ref": "#/$defs/Two", "title": "t"}},
      "required": ["room"]}, {"room": {"type": "array", "items": ROOM, "title": "t"}}, {"room"}),
    ({"$ref": "#/definitions/All", "definitions": {"All": {
        "type": "object", "properties": {"room": ROOM}}}}, {"room": ROOM}, set()),
    ({"room": {"type": "str"}, "level": {"type": "int, optional"},
      "n": {"type": "int", "default": 1},
      "o": {"type": "Optional[int]"}}, None, {"room"}),
    ({"title": {"type": "str"}}, None, {"title"}),
    ({"type": {"type": "string"}, "properties": {"type": "string"}}, None, {"type", "properties"})]


@pytest.mark.parametrize("parameters, shown, required", SCHEMAS)
def test_a_schema_is_told_from_arguments_and_its_definitions_are_put_in(
        parameters, shown, required, tmp_path):
    sample, = loaded(tmp_path, {"tools": [{"name": "f", "parameters": parameters}]})
    assert sample.tools[0]["parameters"] == (parameters if shown is None else shown)
    assert required_arguments(sample.tools[0]) == required


def test_a_definition_within_itself_ends_and_one_that_is_not_there_is_named(tmp_path):
    tree = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Tree"}}}
    schema = {"type": "object", "properties": {"t": {"$ref": "#/$defs/Tree"}},
              "$defs": {"Tree": tree}}
    sample, = loaded(tmp_path, {"tools": [{"name": "f", "parameters": schema}]})
    assert sample.tools[0]["parameters"] == {"t": {**tree, "properties": {
        "next": {"$ref": "#/$defs/Tree"}}}}
    wide = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 9} for i in range(9)} | {"d9": {}}
    for defs, message in (({}, "there is no definition '#/\\$defs/d0'"), (wide, "too large")):
        schema = {"type": "object", "properties": {"t": {"$ref": "#/$defs/d0"}}, "$defs": defs}
        with pytest.raises(ValueError, match=message):
            loaded(tmp_path, {"tools": [{"name": "f", "parameters": schema}]})


def test_ids_of_ones_own_are_kept_if_each_is_another_and_what_is_not_read_is_said(tmp_path, capsys):
    assert [x.id for x in loaded(tmp_path, {"id": "home-17"}, {"id": 0}, {})] == [
        "home-17", "0", "sealtool-2"]
    assert capsys.readouterr().out == ""
    twice = loaded(tmp_path, {"id": 0, "task": "t"}, {"id": 0, "task": "u"})
    assert [x.id for x in twice] == ["sealtool-0", "sealtool-1"]
    said = capsys.readouterr().out
    assert "'task' is not read (2 times)" in said and "ids are not unique" in said


def test_a_table_of_text_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.csv: is a table of text; JSON and JSON Lines"):
        load("a", write(tmp_path / "a.csv", b"query,tools\nq,t"))


# --- What can be wrong ----------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    ({"query": 7}, ": 'query' is .* wrong type"), ({"answers": {}}, ": 'answers' is .* wrong type"),
    ({"query": []}, ": the query is empty"), ({"query": " "}, ": the query is empty"),
    ({"query": turns(("alien", ""))}, ": turn 0: no role"), ({"query": [7]}, ": turn 0: no role"),
    ({"query": turns(("user", None))}, ": turn 0: no role or no text"),
    ({"tools": []}, ": no tool to call"), ({"tools": [TOOL, TOOL]}, ": two tools are named f"),
    ({"tools": ["f"]}, ": tool 0: no name"), ({"tools": [TOOL, {"name": ""}]}, ": tool 1: no name"),
    ({"tools": [TOOL | {"parameters": []}]}, ": tool 0: f: 'parameters' is of a wrong type"),
    ({"tools": [TOOL | {"parameters": [{"$ref": "#"}]}]}, "f: 'parameters' is of a wrong type"),
    ({"tools": [TOOL | {"parameters": {"x": "string"}}]}, "f: parameter 'x' is not an object"),
    ({"tools": [TOOL | {"required": "x"}]}, "f: 'required' is of a wrong type"),
    ({"answers": ["f"]}, ": answer 0: not an object"),
    ({"answers": [ANSWER, {"arguments": {}}]}, ": answer 1: no name or no arguments")])
def test_a_faulty_item_is_named_with_its_file_and_index(changes, message, tmp_path):
    with pytest.raises(ValueError, match=rf"own\.json, item 1.*{message}.*--data"):
        loaded(tmp_path, {}, changes)


@pytest.mark.parametrize("content, message", [
    (b"[7]", "item 0: no known shape"), (b'{"question": "q", "function": []}',
     "no known shape: keys found: question, function; known are: query, tools; messages; conv"),
    (b'{"query": "q"}\n\n{"query"}', "as JSON .*line 3"), (b"PAR1\0", "is Parquet"),
    (b"\x1f\x8b\x08", "is gzip"), (b"\xff\xfe[\0", "is UTF-16"), (b"a,b\n1,2", "as JSON"),
    (b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
    (b'[\n{"query": "q",\n}]', "as JSON .*line 3"),
    (b"{}", "not a list of samples"), (b"[]", ", or an empty one"), (b"\xff[]", "as JSON .*utf-8"),
    (b'["\\ud800"]', "as JSON .*surrogates"), (b"[NaN]", "read and written as JSON"),
    (b"[" * 200_000, "as JSON .*recursion"), (b"[" + b"9" * 5000 + b"]", "as JSON .*digits")])
def test_a_faulty_file_is_named(content, message, tmp_path):
    with pytest.raises(ValueError, match=rf"faulty\.json.*{message}.*--data"):
        load("sealtool", data=write(tmp_path / "faulty.json", content))
