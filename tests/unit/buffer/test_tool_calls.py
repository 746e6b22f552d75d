"""Tools as text: a call is complete, or it is a part of the response's text."""

from __future__ import annotations

import json

import pytest

from buffer.data.tool_calls import ToolCall, calls_in, described, result


@pytest.mark.parametrize(
    ("response", "text", "calls"),
    [
        ("no call", "no call", []),
        (
            'so\n<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call> and '
            '<tool_call>\n{"name": "b"}\n</tool_call>',
            "so",
            [ToolCall("a", '{"x": 1}'), ToolCall("b", "{}")],
        ),
        ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ('<tool_call>{"name": "a"', '<tool_call>{"name": "a"', []),
        (
            '<tool_call>{"name": "a"}</tool_call><tool_call>{"name": "a", "arguments": 1}'
            "</tool_call>",
            '<tool_call>{"name": "a"}</tool_call><tool_call>{"name": "a", "arguments": 1}'
            "</tool_call>",
            [],
        ),
    ],
)
def test_calls_are_complete(response: str, text: str, calls: list[ToolCall]) -> None:
    assert calls_in(response) == (text, calls)


def test_a_description_holds_each_tool_on_a_line() -> None:
    tools = [{"name": name, "description": "does\nit", "parameters": {}} for name in "ab"]
    assert [json.loads(line) for line in described(tools).splitlines()[1:3]] == tools


def test_a_result_is_tagged() -> None:
    assert result("3") == "<tool_response>\n3\n</tool_response>"
