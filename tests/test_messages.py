"""Turns, typed parts, tool calls and weights -> messages as chat templates take them."""

import pytest

from prift.errors import DataError
from prift.text.formats import Chat, choose_format, read_row

CALL = {"type": "function", "function": {"name": "area", "arguments": {"side": 3}}}


def auto(row):
    return read_row(choose_format("auto", row), row)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def test_sharegpt_with_tool_calls():
    row = {
        "conversations": [
            {"from": "human", "value": "How big?"},
            {"from": "function_call", "value": '{"name": "area", "arguments": {"side": 3}}'},
            {"from": "observation", "value": '{"area": 9}'},
            {"from": "gpt", "value": "9"},
        ],
        "tools": '[{"name": "area", "parameters": {}}]',
        "system": "Be brief.",
    }
    assert auto(row) == Chat(
        [
            turn("system", "Be brief."),
            turn("user", "How big?"),
            turn("assistant", "", tool_calls=[CALL]),
            turn("tool", '{"area": 9}'),
            turn("assistant", "9"),
        ],
        [None, None, True, None, True],
        [{"type": "function", "function": {"name": "area", "parameters": {}}}],
    )


def test_content_as_typed_parts():
    parts = [
        {"type": "reasoning", "value": "Let me "},
        {"type": "reasoning", "value": "think."},
        {"type": "text", "text": "One "},
        {"type": "text", "value": "moment."},
        {"type": "tool_call", "value": '{"name": "area", "arguments": "{\\"side\\": 3}"}'},
        {"type": "tool_call", "value": {"name": "area", "arguments": {"side": 3}}},
    ]
    row = {"messages": [turn("user", [{"type": "text", "value": "a"}]), turn("assistant", parts)]}
    message = auto(row).messages[1]
    assert message == turn(
        "assistant", "One moment.", reasoning_content="Let me think.", tool_calls=[CALL, CALL]
    )


def test_messages_in_openai_spelling():
    call = {"id": "c1", "type": "function", "function": {"name": "area", "arguments": '{"side":3}'}}
    row = {
        "messages": [
            turn("developer", "Be brief."),
            turn("user", "a"),
            turn("assistant", None, tool_calls=[call]),
            turn("tool", "9", tool_call_id="c1", name="area"),
            turn("assistant", "b", reasoning_content="hm", weight=0),
            turn("assistant", "c", tool_calls=None, weight=1),
        ],
        "tools": [{"type": "function", "function": {"name": "area"}}],
    }
    item = auto(row)
    assert item.messages == [
        turn("system", "Be brief."),
        turn("user", "a"),
        turn("assistant", "", tool_calls=[{**CALL, "id": "c1"}]),
        turn("tool", "9", tool_call_id="c1", name="area"),
        turn("assistant", "b", reasoning_content="hm"),
        turn("assistant", "c"),
    ]
    assert item.trained == [None, None, True, None, False, True]
    assert item.tools == [{"type": "function", "function": {"name": "area"}}]


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools(tools):
    assert auto({"messages": [turn("assistant", "a")], "tools": tools}).tools is None


@pytest.mark.parametrize(
    ("weights", "trained"),
    [((0, 1), [False, True]), ((0.0, 0.0), [False, False]), ((None, None), [None, True])],
)
def test_loss_weight_says_which_turns_are_trained(weights, trained):
    roles = ("user", "assistant")
    turns = [turn(role, "a", loss_weight=w) for role, w in zip(roles, weights, strict=True)]
    assert auto({"messages": turns}).trained == trained


def chat_row(*turns, **more):
    return {"messages": list(turns), **more}


ASK = turn("user", "a")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat_row(), r"'messages' should be a list of turns; found \[\]"),
        (chat_row("hello"), "turn 1: a turn should be an object; found 'hello'"),
        (chat_row(turn("wizard", "a")), "turn 1: unknown role 'wizard'; known are system, devel"),
        (chat_row(ASK, {"role": "assistant"}), "turn 2: it has no content; its keys are role"),
        (chat_row(turn("user", 7)), "turn 1: content should be a string; found 7"),
        (chat_row(turn("user", "a", images=["x"])), "turn 1: it carries 'images', which prift doe"),
        (
            chat_row(turn("user", [{"type": "image_url", "image_url": "x"}])),
            "turn 1: it has a part of type 'image_url', which prift does not read",
        ),
        (
            chat_row(
                turn(
                    "assistant",
                    [{"type": "text", "text": "a"}, {"type": "reasoning", "value": "b"}],
                )
            ),
            "a 'reasoning' part comes too late: chat templates can only render the order reasoning",
        ),
        (
            chat_row(turn("user", [{"type": "reasoning", "value": "b"}])),
            "a user turn cannot hold reasoning or tool calls",
        ),
        (
            chat_row(turn("assistant", "a", loss_weight=0.5)),
            "loss_weight is 0.5; a turn is",
        ),
        (chat_row(turn("user", "a", loss_weight=1)), "loss_weight 1 on a user turn: only assistan"),
        (chat_row(turn("function_call", "area(3)")), r"a tool call should be JSON .* 'area\(3\)'"),
        (chat_row(turn("function_call", '{"f": 1}')), "a tool call should have a name; found {'f'"),
        (
            chat_row(turn("function_call", '{"name": "f", "arguments": [1]}')),
            r"a tool call's arguments should be an object; found \[1\]",
        ),
        (chat_row(ASK, tools="area"), "'tools' should be JSON"),
        (chat_row(ASK, tools='{"name": "f"}'), "'tools' should be a list of function schemas"),
        (chat_row(turn("system", "a"), system="b"), "both a 'system' column and a system turn"),
    ],
)
def test_a_bad_turn_says_what_is_wrong_with_it(row, message):
    with pytest.raises(DataError, match=message):
        auto(row)
