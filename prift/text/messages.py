"""The turns of a conversation, in the spellings that datasets use -> messages for chat templates.

A message that leaves here has `role` (system, user, assistant or tool) and `content` (a string),
and where the data has them `reasoning_content`, `tool_calls`, `name` and `tool_call_id`. What a
message cannot carry is an error, never dropped. Errors do not name file and line; callers do.
"""

import json

from prift.errors import DataError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_CALLS = ("function_call", "tool_call")  # as a role: the turn's text is the call, as JSON
_TEXT_PARTS = {"text": "content", "reasoning": "reasoning", "thinking": "reasoning"}
_PART_VALUES = ("value", "text", "reasoning", "thinking")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "input_audio", "image_url")


def read_turns(turns, column: str) -> tuple[list[dict], list[bool | None]]:
    """All messages, and for each whether its tokens are labels: True, False where the row says so,
    None where only --labels all makes them labels. Assistant turns are, unless the row says not.

    Raises DataError for anything that is not a list of turns which a chat template can render.
    """
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{column!r} should be a list of turns; found {_shown(turns)}")
    messages, trained = [], []
    for number, turn in enumerate(turns, start=1):
        try:
            if not isinstance(turn, dict):
                raise DataError(f"a turn should be an object; found {_shown(turn)}")
            message = _message(turn)
            messages.append(message)
            trained.append(_is_trained(turn, message))
        except DataError as error:
            raise DataError(f"{column!r}, turn {number}: {error}") from error
    return messages, trained


def _message(turn: dict) -> dict:
    said = turn.get("role") or turn.get("from")
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise DataError(f"unknown role {said!r}; known are {', '.join(ROLES)}")
    for key in (*_MEDIA, "function_call"):
        if turn.get(key):
            raise DataError(f"it carries {key!r}, which prift does not read")
    content = turn["content"] if "content" in turn else turn.get("value")
    message = {"role": role, "content": ""}
    if said in _CALLS:
        message["tool_calls"] = read_calls(content)
    elif isinstance(content, list):
        message |= _from_parts(content)
    elif content is not None:
        message["content"] = text(content, "content")
    elif not turn.get("tool_calls"):
        raise DataError(f"it has no content; its keys are {', '.join(turn)}")
    if turn.get("tool_calls"):
        message["tool_calls"] = message.get("tool_calls", []) + read_calls(turn["tool_calls"])
    if reasoning := turn.get("reasoning_content") or turn.get("reasoning") or turn.get("thinking"):
        message["reasoning_content"] = text(reasoning, "reasoning")
    message |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key) is not None}
    if role != "assistant" and not message.keys().isdisjoint({"tool_calls", "reasoning_content"}):
        raise DataError(f"a {role} turn cannot hold reasoning or tool calls")
    return message


def _from_parts(parts: list) -> dict:
    """Typed parts. Templates write reasoning, then text, then calls, so that order is demanded."""
    texts: dict[str, list[str]] = {"reasoning": [], "content": []}
    calls, seen = [], 0
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        kind = kind if isinstance(kind, str) else None
        if kind in _TEXT_PARTS:
            slot = _TEXT_PARTS[kind]
            texts[slot].append(text(_part_value(part), f"a part of type {kind!r}"))
        elif kind in _CALLS:
            slot = "calls"
            calls += read_calls(part["function"] if "function" in part else _part_value(part))
        elif kind in ("tool_result", *(role for role in ROLES if ROLES[role] == "tool")):
            slot = "content"
            texts[slot].append(text(_part_value(part), f"a part of type {kind!r}"))
        else:
            raise DataError(f"it has a part of type {kind!r}, which prift does not read")
        rank = ("reasoning", "content", "calls").index(slot)
        if rank < seen:
            raise DataError(
                f"a {kind!r} part comes too late: chat templates can only render the order "
                "reasoning, text, tool calls"
            )
        seen = rank
    message: dict = {"content": "".join(texts["content"])}
    if texts["reasoning"]:
        message["reasoning_content"] = "".join(texts["reasoning"])
    if calls:
        message["tool_calls"] = calls
    return message


def _part_value(part: dict):
    return next((part[key] for key in _PART_VALUES if part.get(key) is not None), None)


def read_calls(value) -> list[dict]:
    """Tool calls from an object, a list of them, or either as JSON text; arguments as an object.

    -> [{"type": "function", "function": {"name": str, "arguments": dict}, ["id": str]}, ...]
    """
    value = _from_json(value, "a tool call")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise DataError(f"a tool call should have a name; found {_shown(call)}")
        arguments = _from_json(inner.get("arguments") or {}, "a tool call's arguments")
        if not isinstance(arguments, dict):
            raise DataError(
                f"a tool call's arguments should be an object; found {_shown(arguments)}"
            )
        function = {"name": inner["name"], "arguments": arguments}
        ident = {"id": call["id"]} if call.get("id") else {}
        calls.append({"type": "function", "function": function, **ident})
    return calls


def read_tools(value) -> list[dict] | None:
    """A list of function schemas, or that as JSON text; None where there are none.

    Bare schemas are wrapped as {"type": "function", "function": schema}, as templates expect.
    """
    if value is None or value == "":
        return None
    tools = _from_json(value, "'tools'")
    if not isinstance(tools, list) or not all(map(_is_tool, tools)):
        raise DataError(f"'tools' should be a list of function schemas; found {_shown(tools)}")
    wrapped = [tool if "function" in tool else _wrapped(tool) for tool in tools]
    return wrapped or None


def _is_tool(tool) -> bool:
    return isinstance(tool, dict) and isinstance(tool.get("function", {}), dict)


def _wrapped(tool: dict) -> dict:
    schema = {key: value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": schema}


def _from_json(value, what: str):
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{what} should be JSON ({error}); found {_shown(value)}") from error


def _is_trained(turn: dict, message: dict) -> bool | None:
    weight = turn.get("loss_weight")
    weight = turn.get("weight") if weight is None else weight
    if weight is None:
        return True if message["role"] == "assistant" else None
    if not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise DataError(f"loss_weight is {weight!r}; a turn is trained (1) or not (0)")
    if weight and message["role"] != "assistant":
        raise DataError(f"loss_weight 1 on a {message['role']} turn: only assistant turns can be")
    return bool(weight)


def text(value, what: str) -> str:
    """The value itself, if it is a string that can be encoded."""
    if not isinstance(value, str):
        raise DataError(f"{what} should be a string; found {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds half a surrogate pair (character {error.start})") from error
    return value


def _shown(value) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
