"""Tools as text: their description before a prompt, the calls in a response, and their results.

The form is that of Hermes and Qwen: one JSON object in a <tool_call> tag, and results in
<tool_response> tags. Knows no tokens and no chat templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
HOW_TO_CALL = (
    "To call a function, write <tool_call>\n"
    '{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}\n'
    "</tool_call>. Its result follows in <tool_response> tags."
)


class ToolCall(NamedTuple):
    name: str
    arguments: str  # a JSON object


def described(tools: Iterable[dict[str, Any]]) -> str:
    """A system message that offers `tools`, each with name, description and parameters."""
    functions = [json.dumps(tool, ensure_ascii=False) for tool in tools]
    return "\n".join(["You can call these functions:", *functions, HOW_TO_CALL])


def calls_in(response: str) -> tuple[str, list[ToolCall]]:
    """The text before the first call, and the calls.

    If one of them is malformed, all of the response is text.
    """
    calls = [_call(written) for written in CALL.findall(response)]
    complete = [call for call in calls if call is not None]
    if not complete or len(complete) < len(calls):
        return response, []
    return response[: response.index("<tool_call>")].strip(), complete


def result(content: str) -> str:
    return f"<tool_response>\n{content}\n</tool_response>"


def _call(written: str) -> ToolCall | None:
    try:
        call = json.loads(written)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict):
        return None
    fields = cast("dict[str, Any]", call)
    name, arguments = fields.get("name"), fields.get("arguments", {})
    if isinstance(name, str) and isinstance(arguments, dict):
        return ToolCall(name, json.dumps(arguments))
    return None
