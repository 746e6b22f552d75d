"""Tables: files and datasets, each row of which is a prompt. All rows are checked at once.

Every error is one `ValueError` that names the file and the row, whatever a library raised. A
table's own dependencies (pyarrow, datasets) are imported when it is opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

from buffer.data.identity import HELD_OUT_FRAC, hash_frac, identity, text_of
from buffer.wire.messages import PromptPayload
from configs.errors import one_line
from configs.extras import import_extra
from configs.schema import DataConfig


class TableSource:
    """Rows of a file or a dataset. `name` is how errors call it."""

    def __init__(self, name: str, rows: Iterable[tuple[int, Any]], data: DataConfig) -> None:
        self.name = name
        self._payloads = [
            _payload_of_row(f"{name}, row {number}", row, data) for number, row in rows
        ]
        if not self._payloads:
            raise ValueError(f"{name} holds no rows; a source needs at least one prompt")
        self.size = len(self._payloads)

    def __getitem__(self, index: int) -> PromptPayload:
        return self._payloads[index]

    def hold_out(self, num_prompts: int) -> list[PromptPayload]:
        distinct = self._distinct()
        num_held_out = max(num_prompts, round(HELD_OUT_FRAC * len(distinct)))
        held_out = {text_of(payload) for payload in distinct[:num_held_out]}
        left = [payload for payload in self._payloads if text_of(payload) not in held_out]
        if 2 * num_held_out > len(distinct) or not left:
            raise ValueError(
                f"{self.name} has {len(distinct)} distinct prompts, too few to hold out "
                f"eval.num_prompts={num_prompts} "
                "and train on at least as many; lower eval.num_prompts, name data.eval, or set "
                "eval.every=0"
            )
        self._payloads, self.size = left, len(left)
        return distinct[:num_prompts]

    def sample(self, num_prompts: int) -> list[PromptPayload]:
        return self._distinct()[:num_prompts]

    def _distinct(self) -> list[PromptPayload]:
        """Each prompt once, in an order that does not depend on that of the rows."""
        first = {payload.prompt_id: payload for payload in reversed(self._payloads)}
        return sorted(first.values(), key=lambda p: (hash_frac(text_of(p)), p.prompt_id))


def open_table(key: str, form: str, data: DataConfig) -> TableSource:
    """The table that `form`, the value of `key`, names: a .jsonl or .parquet file, or hf:..."""
    if form.startswith("hf:"):
        return TableSource(f"{key}={form}", _read_dataset(key, form), data)
    if not Path(form).is_file():
        raise ValueError(
            f"{key}={form}: there is no such file (looked from {Path.cwd()}); give the path "
            "of an existing one"
        )
    read = _read_jsonl if form.endswith(".jsonl") else _read_parquet
    return TableSource(form, read(form), data)


# Rows
# --------------------------------------------------------------------------------------------------


class _BadRow(Exception):
    """A row that is no prompt, and the fix."""


def _payload_of_row(where: str, row: Any, data: DataConfig) -> PromptPayload:
    try:
        return _payload(where, row, data)
    except _BadRow as error:
        raise ValueError(f"{where}: {error}") from error
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: its text holds half of a surrogate pair, which is no character; fix the row"
        ) from error
    except Exception as error:  # of a value that only its library understands
        raise ValueError(
            f"{where}: cannot be read: {one_line(error, with_type=True)}; fix or remove the row"
        ) from error


def _payload(where: str, row: Any, data: DataConfig) -> PromptPayload:
    if not isinstance(row, dict):
        raise _BadRow(
            f"expected an object with named fields, got {type(row).__name__}; write one JSON "
            "object a line"
        )
    row = cast("dict[str, Any]", row)
    prompt = _field(row, "data.prompt_field", data.prompt_field)
    messages = [] if isinstance(prompt, str) else _messages(data.prompt_field, prompt)
    texts = [message["content"] for message in messages] or [prompt]
    if not any(text.strip() for text in texts):
        raise _BadRow(f"field {data.prompt_field!r} is empty; a prompt needs text")
    text, answer = "" if messages else prompt, _answer(row, data)
    others = {
        name: value
        for name, value in row.items()
        if name not in (data.prompt_field, data.answer_field)
    }
    return PromptPayload(
        prompt_id=identity(text, messages, answer, others),
        text=text,
        messages=messages,
        answer=answer,
        metadata=json.dumps(others, default=str) if others else "",
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
            raise _BadRow(
                f"no field {name!r} ({repr(inside) if inside else 'it'} has {has}); "
                f"name the right one with {key}=..."
            )
        value = fields[part]
    if value is None:
        raise _BadRow(
            f"field {name!r} is null; fix or remove the row, or name another with {key}=..."
        )
    return value


def _answer(row: dict[str, Any], data: DataConfig) -> str:
    """The reference answer as text. A user's own verifier may need none, or more than one value."""
    own_verifier = ":" in data.environment
    try:
        answer = _field(row, "data.answer_field", data.answer_field)
    except _BadRow:
        if own_verifier:
            return ""
        raise
    if own_verifier and isinstance(answer, list | dict | bool):
        return json.dumps(answer, default=str)
    number = isinstance(answer, int | float | Decimal) and not isinstance(answer, bool)
    if number and not math.isfinite(answer):
        raise _BadRow(f"field {data.answer_field!r} is {answer}, which no response can equal")
    if not number and not isinstance(answer, str):
        raise _BadRow(
            f"field {data.answer_field!r} must be text or a number, got {type(answer).__name__}; "
            "fix the row"
        )
    return str(answer)


def _messages(name: str, prompt: Any) -> list[dict[str, str]]:
    """Chat messages, each with its role and its text."""
    messages = (
        [_message(message) for message in cast("list[Any]", prompt)]
        if isinstance(prompt, list | tuple)
        else []
    )
    complete = [message for message in messages if message is not None]
    if not complete or len(complete) < len(messages):
        raise _BadRow(
            f"field {name!r} must be text, or a list of chat messages, each with a text 'role' and "
            "'content' (text, or a list of parts that are text); fix the row"
        )
    return complete


def _message(message: Any) -> dict[str, str] | None:
    if not isinstance(message, dict):
        return None
    fields = cast("dict[str, Any]", message)
    role, content = fields.get("role"), fields.get("content")
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


# Readers
# --------------------------------------------------------------------------------------------------


def _read_jsonl(path: str) -> Iterator[tuple[int, Any]]:
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parsed(f"{path}, row {number}", line)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error


def _parsed(where: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text ({one_line(error)}); convert the file to UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: not valid JSON ({one_line(error, with_type=True)}); fix or remove the line"
        ) from error


def _read_parquet(path: str) -> Iterator[tuple[int, Any]]:
    parquet = import_extra("pyarrow.parquet", path, "data")
    try:
        rows: list[Any] = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow's own kinds, of which not all are ValueErrors
        raise ValueError(
            f"{path}: not a readable parquet file: {one_line(error, with_type=True)}; write it "
            "again"
        ) from error
    yield from enumerate(rows, start=1)


def _read_dataset(key: str, form: str) -> Iterator[tuple[int, Any]]:
    """`hf:<dataset>[:<split>]`, the split `train` unless named;
    `hf:<owner>/<dataset>/<configuration>` if it has several.
    """
    datasets = import_extra("datasets", f"{key}={form}", "data")
    name, _, split = form.removeprefix("hf:").partition(":")
    configuration = None
    if name.count("/") == 2 and not Path(name).exists():
        name, _, configuration = name.rpartition("/")
    try:
        rows = datasets.load_dataset(name, configuration, split=split or "train")
    except Exception as error:  # a wrong name, split or network raises a dozen unrelated types
        raise ValueError(
            f"{key}={form}: cannot load it: {one_line(error, with_type=True)}; check name and "
            "split, and that the hub is reachable or the dataset cached"
        ) from error
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield number, row
    except Exception as error:  # a column that cannot be decoded, say
        raise ValueError(
            f"{key}={form}, row {number + 1}: cannot be read: {one_line(error, with_type=True)}; "
            "fix or remove the row"
        ) from error
