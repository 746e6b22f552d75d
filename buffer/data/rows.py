"""Turns a row of a table into a prompt, or says in one line why it cannot be one.

Owns the meaning of columns: the prompt, the reference answer, and the metadata, which is everything
else and reaches the verifier as JSON. Never reads a file. Driven by `buffer.data.tables`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

from buffer.data.identity import identity
from buffer.wire.messages import PromptPayload
from configs.errors import one_line
from configs.schema import DataConfig

CALLS = ("tool_calls", "function_call")  # of a message: they cannot be rendered from its text


class BadRow(Exception):
    """A row that is no prompt. One sentence with the reason and the fix."""


class WrittenFloat(float):
    """A number that remembers how it is written, so that an answer of 1.50 stays "1.50"."""

    __slots__ = ("written",)

    def __new__(cls, written: str) -> WrittenFloat:
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str

    def __str__(self) -> str:
        return self.written


def parsed(line: bytes) -> Any:
    """The value of a line of JSON. Raises `BadRow`."""
    try:
        return json.loads(
            line.decode("utf-8-sig"),
            parse_float=WrittenFloat,
            object_pairs_hook=_without_repetitions,
        )
    except UnicodeDecodeError as error:
        raise BadRow(not_utf8(error)) from error
    except (ValueError, RecursionError) as error:
        raise BadRow(
            f"not valid JSON ({one_line(error, with_type=True)}); write one JSON object a line"
        ) from error


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text ({one_line(error)}); convert the file to UTF-8"


def _without_repetitions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow(f"field {twice!r} is given twice; remove one of them")
    return fields


def payload_of_row(where: str, row: Any, data: DataConfig) -> PromptPayload:
    """The prompt of a row, which errors call `where`. Raises `BadRow`."""
    try:
        return _payload(where, row, data)
    except UnicodeEncodeError as error:
        raise BadRow(
            "its text holds half of a surrogate pair, which is no character; fix the row"
        ) from error
    except BadRow:
        raise
    except Exception as error:  # of a value that only its library understands
        raise BadRow(
            f"cannot be read: {one_line(error, with_type=True)}; fix or remove the row"
        ) from error


def _payload(where: str, row: Any, data: DataConfig) -> PromptPayload:
    if not isinstance(row, dict):
        raise BadRow(
            f"expected an object with named fields, got {type(row).__name__}; write one JSON "
            "object a line"
        )
    row = cast("dict[str, Any]", row)
    prompt = _field(row, "data.prompt_field", data.prompt_field)
    messages = [] if isinstance(prompt, str) else _messages(data.prompt_field, prompt)
    texts = [message["content"] for message in messages] or [prompt]
    if not any(text.strip() for text in texts):
        raise BadRow(f"field {data.prompt_field!r} is empty; a prompt needs text")
    text, answer = "" if messages else prompt, _answer(row, data)
    others = {
        name: _as_json(name, value)
        for name, value in row.items()
        if name not in (data.prompt_field, data.answer_field)
    }
    return PromptPayload(
        prompt_id=identity(text, messages, answer, others),
        text=text,
        messages=messages,
        answer=answer,
        metadata=json.dumps(others) if others else "",
        source=where,
    )


def _field(row: dict[str, Any], key: str, name: str) -> Any:
    """The value of a column, or of a field inside one: `reward_model.ground_truth`."""
    value: Any = row
    parts = [name] if name in row else name.split(".")
    for number, part in enumerate(parts):
        fields = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
        if part not in fields:
            inside = ".".join(parts[:number])
            has = ", ".join(map(repr, fields)) or "none"
            raise BadRow(
                f"no field {name!r} ({repr(inside) if inside else 'it'} has {has}); "
                f"name the right one with {key}=..."
            )
        value = fields[part]
    if value is None:
        raise BadRow(
            f"field {name!r} is null; fix or remove the row, or name another with {key}=..."
        )
    return value


def _answer(row: dict[str, Any], data: DataConfig) -> str:
    """The reference answer as text. A user's own verifier may need none, or more than one value."""
    own_verifier = ":" in data.environment
    try:
        answer = _field(row, "data.answer_field", data.answer_field)
    except BadRow:
        if own_verifier:
            return ""
        raise
    if own_verifier and isinstance(answer, list | dict | bool):
        return json.dumps(_as_json(data.answer_field, answer))
    number = isinstance(answer, int | float | Decimal) and not isinstance(answer, bool)
    if number and not math.isfinite(answer):
        raise BadRow(f"field {data.answer_field!r} is {answer}, which no response can equal")
    if not number and not isinstance(answer, str):
        raise BadRow(
            f"field {data.answer_field!r} must be text or a number, got {type(answer).__name__}; "
            "fix the row"
        )
    return str(answer)


# Messages -----------------------------------------------------------------------------------------


def _messages(name: str, prompt: Any) -> list[dict[str, str]]:
    """Chat messages, each with its role and its text."""
    messages = (
        [_message(message) for message in cast("list[Any]", prompt)]
        if isinstance(prompt, list | tuple)
        else []
    )
    complete = [message for message in messages if message is not None]
    if not complete or len(complete) < len(messages):
        raise BadRow(
            f"field {name!r} must be text, or a list of chat messages, each with a text 'role' and "
            "'content' (text, or a list of parts that are text); fix the row"
        )
    if complete[-1]["role"] == "assistant":
        raise BadRow(
            f"field {name!r} ends with a message of the assistant, which would be trained as part "
            "of the question; remove that message"
        )
    return complete


def _message(message: Any) -> dict[str, str] | None:
    if not isinstance(message, dict):
        return None
    fields = cast("dict[str, Any]", message)
    role, content = fields.get("role"), fields.get("content")
    if call := next((name for name in CALLS if fields.get(name)), None):
        raise BadRow(f"a message has {call!r}, but only its text can be used; fix the row")
    if isinstance(content, list):
        parts = [_text_of_part(part) for part in cast("list[Any]", content)]
        content = None if None in parts else "".join(part or "" for part in parts)
    if isinstance(role, str) and isinstance(content, str):
        return {"role": role, "content": content}
    return None


def _text_of_part(part: Any) -> str | None:
    """Of a part of a message: `{"type": "text", "text": ...}`. None for an image and the like."""
    fields = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
    text = fields.get("text")
    return text if isinstance(text, str) and fields.get("type", "text") == "text" else None


# Metadata -----------------------------------------------------------------------------------------


def _as_json(name: str, value: Any) -> Any:
    """The value of column `name` as its verifier gets it. Raises `BadRow` if JSON has no such.

    Decimals become numbers, dates their ISO form, and bytes base64.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | Decimal):
        return float(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {_name(name, key): _as_json(name, inner) for key, inner in items}
    if isinstance(value, list | tuple):
        return [_as_json(name, inner) for inner in cast("list[Any]", value)]
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, UUID):
        return str(value)
    raise BadRow(
        f"field {name!r} holds {type(value).__name__}, which cannot be sent to a verifier; "
        "remove the column"
    )


def _name(name: str, key: Any) -> str:
    if not isinstance(key, str):
        raise BadRow(f"field {name!r} has the key {key!r}, which is no text; fix the row")
    return key
