"""The shape of a file of samples: {"query", "tools", "answers"}, as the benchmarks have it."""
import re

from data.calls import Call, call_text, parse_calls


def parse_item(item: object) -> tuple[tuple, tuple, tuple]:
    """An item of a file as messages, tools and gold calls; ValueError says what is wrong in it."""
    for key, kinds in {"query": (str, list), "tools": list, "answers": list}.items():
        if not isinstance(item, dict) or not isinstance(item.get(key), kinds):
            raise ValueError(f"{key!r} is missing or of a wrong type")
    tools, answers = {}, []
    for i, raw in enumerate(item["tools"]):
        tool = parse_tool(raw, f"tool {i}")
        if tool is not None and tool["name"] in tools:
            raise ValueError(f"two tools are named {tool['name']}")
        if tool is not None:
            tools[tool["name"]] = tool
    if not tools:
        raise ValueError("no tool to call")
    for i, raw in enumerate(item["answers"]):       # SealTool says "tool" and "parameters"
        if not isinstance(raw, dict):
            raise ValueError(f"answer {i}: not an object")
        call = Call(raw.get("name", raw.get("tool")), raw.get("arguments", raw.get("parameters")))
        if not isinstance(call.name, str) or not isinstance(call.arguments, dict):
            raise ValueError(f"answer {i}: no name or no arguments")
        answers.append(call)
    return parse_query(item["query"]), tuple(tools.values()), tuple(answers)


def parse_query(query: str | list) -> tuple[dict, ...]:
    """The dialogue so far, from a request or from API-Bank's turns, in a chat template's roles."""
    messages, text = [], ""
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else query
    for i, turn in enumerate(turns):
        fits = isinstance(turn, dict) and turn.get("role") in ("user", "agent", "assistant", "tool")
        if not fits or not isinstance(turn.get("content"), str):
            raise ValueError(f"turn {i}: no role or no text")
        role, content = turn["role"].replace("agent", "assistant"), turn["content"]
        if turn is turns[-1]:       # API-Bank's way of asking is left out; our prompt has its own
            content = re.sub(r"\s*Generate API Request:\s*$", "", content)
        if role == "tool":          # earlier calls and their results, as in Qwen2.5's template
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        elif role == "assistant" and re.fullmatch(r"\s*```(json)?\s*\[.*]\s*```\s*", content, re.S):
            content = call_text(parse_calls(content).calls) or content
        if content.strip() or role != "assistant":
            messages.append({"role": role, "content": content})
            text += content
    if not text.strip():
        raise ValueError("the query is empty")
    return tuple(messages)


def parse_tool(raw: dict, where: str) -> dict | None:
    """One tool; None for an entry that only documents something."""
    name = raw.get("name") if isinstance(raw, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: no name")
    parameters, required = raw.get("parameters"), raw.get("required")
    # ours: left out are entries without parameters and ToolAlpaca's `components` (the layout of the
    # results): no call of them answers a request. So are "return" and "desc_for_search".
    if parameters is None or (name == "components" and parameters == {}):
        return None
    if isinstance(parameters, dict) and isinstance(parameters.get("type"), str):
        required = parameters.get("required", required)             # a full JSON schema: flattened
        parameters = parameters.get("properties", {})
    tool = {"name": name, "description": raw.get("description", ""), "parameters": parameters}
    if required is not None:
        tool["required"] = required
    for key, kind in {"description": str, "parameters": dict, "required": list}.items():
        if not isinstance(tool.get(key, kind()), kind):
            raise ValueError(f"{where}: {name}: {key!r} is of a wrong type")
    for argument, schema in parameters.items():
        if not isinstance(schema, dict):
            raise ValueError(f"{where}: {name}: parameter {argument!r} is not an object")
    return tool
