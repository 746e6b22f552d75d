"""Odd files: each case is read with the meaning that its author intended, or refused in one line
that names the file and the row.
"""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from buffer.data.sources import make_sources
from buffer.wire.messages import PromptPayload
from configs.schema import Config

ROW = b'{"prompt": "2+2?", "answer": 4}\n'
Write = Callable[[Path], object]


def read(path: Path, **data: Any) -> list[PromptPayload]:
    """The prompts of a file, in the order of its rows."""
    config = Config()
    config.data.train, config.eval.every = str(path), 0
    for name, value in data.items():
        setattr(config.data, name, value)
    source = make_sources(config).train.source
    return [source[index] for index in range(source.size)]


def content(content: bytes) -> Write:
    return lambda path: path.write_bytes(content)


def jsonl(*rows: Any) -> Write:
    return lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parquet(*rows: Any, schema: Callable[[Any], Any] = lambda pyarrow: None) -> Write:
    def write(path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        tables = pytest.importorskip("pyarrow.parquet")
        tables.write_table(pyarrow.Table.from_pylist(list(rows), schema(pyarrow)), path)

    return write


def chat(*messages: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


TEXT = {"type": "text", "text": "2+2?"}
LONG = "word " * 1400
# Name of the file, its content, and (prompt, answer, metadata) of each of its rows.
ACCEPTED: dict[str, tuple[str, Write, list[tuple[Any, str, dict[str, Any]]]]] = {
    "byte order mark": ("a.jsonl", content(b"\xef\xbb\xbf" + ROW), [("2+2?", "4", {})]),
    "Windows line ends": ("a.jsonl", content(ROW[:-1] + b"\r\n\r\n"), [("2+2?", "4", {})]),
    "no line end": ("a.jsonl", content(ROW[:-1]), [("2+2?", "4", {})]),
    "blank lines": ("a.jsonl", content(b"\n \n" + ROW + b"\t\n"), [("2+2?", "4", {})]),
    "surrogate pair": (
        "a.jsonl",
        content(b'{"prompt": "\\ud83d\\ude00", "answer": "\\u00e9"}'),
        [("\U0001f600", "é", {})],
    ),
    "null byte": ("a.jsonl", jsonl({"prompt": "a\0b", "answer": "c"}), [("a\0b", "c", {})]),
    "line separator": (
        "a.jsonl",
        content('{"prompt": "a\u2028b\x85c", "answer": "d"}'.encode()),
        [("a\u2028b\x85c", "d", {})],
    ),
    "null elsewhere": (
        "a.jsonl",
        jsonl({"prompt": "a", "answer": "b", "hint": None}),
        [("a", "b", {"hint": None})],
    ),
    "duplicates": ("a.jsonl", content(ROW * 2), [("2+2?", "4", {})] * 2),
    "decimals as they are written": (
        "a.jsonl",
        content(
            b'{"prompt": "a", "answer": 1.50, "tolerance": 0.10}\n'
            b'{"prompt": "a", "answer": 0.1000000000000000055511, "tolerance": 1}\n'
            b'{"prompt": "a", "answer": -1E3, "tolerance": 1}\n'
        ),
        [
            ("a", "1.50", {"tolerance": 0.1}),
            ("a", "0.1000000000000000055511", {"tolerance": 1}),
            ("a", "-1E3", {"tolerance": 1}),
        ],
    ),
    "large integer": (
        "a.jsonl",
        jsonl({"prompt": "a", "answer": 10**30}),
        [("a", "1" + "0" * 30, {})],
    ),
    "empty answer": ("a.jsonl", jsonl({"prompt": "a", "answer": ""}), [("a", "", {})]),
    "messages": (
        "a.jsonl",
        jsonl({"prompt": chat(("system", "Be brief."), ("user", "2+2?")), "answer": 4}),
        [(chat(("system", "Be brief."), ("user", "2+2?")), "4", {})],
    ),
    "messages with parts": (
        "a.jsonl",
        jsonl({"prompt": chat(("user", [TEXT, {"type": "text", "text": " Now."}])), "answer": 4}),
        [(chat(("user", "2+2? Now.")), "4", {})],
    ),
    "nested metadata": (
        "a.jsonl",
        jsonl({"prompt": "a", "answer": "b", "tests": [{"in": [1, 2.5], "out": {"x": True}}]}),
        [("a", "b", {"tests": [{"in": [1, 2.5], "out": {"x": True}}]})],
    ),
    "very long line": (
        "a.jsonl",
        jsonl({"prompt": LONG, "answer": "b", "tests": "x" * 5_000_000}),
        [(LONG, "b", {"tests": "x" * 5_000_000})],
    ),
    "gzip": ("a.jsonl.gz", content(gzip.compress(ROW * 2)), [("2+2?", "4", {})] * 2),
    "csv with quotes": (
        "a.csv",
        content(
            b"\xef\xbb\xbfprompt,answer,level\r\n"
            b'"What is ""1,5""\r\ntimes 2?",3,\r\n\r\nq,007,x\r\n'
        ),
        [('What is "1,5"\r\ntimes 2?', "3", {"level": ""}), ("q", "007", {"level": "x"})],
    ),
    "csv below blank lines": (
        "a.csv",
        content(b"\xef\xbb\xbf\n\r\nprompt,answer\na,b\n"),
        [("a", "b", {})],
    ),
    "csv with an index column": (
        "a.csv",
        content(b",prompt,answer\n0,a,b\n"),
        [("a", "b", {"": "0"})],
    ),
    "csv with a very long field": (
        "a.csv",
        content(b"prompt,answer\n" + LONG.encode() * 40 + b",b\n"),
        [(LONG * 40, "b", {})],
    ),
    "parquet with structs": (
        "a.parquet",
        parquet(
            {
                "prompt": [{"role": "user", "content": "2+2?", "tool_calls": None}],
                "answer": 4,
                "extra": {"style": "rule", "sizes": [1, 2]},
            }
        ),
        [(chat(("user", "2+2?")), "4", {"extra": {"style": "rule", "sizes": [1, 2]}})],
    ),
    "parquet with decimals, dates and bytes": (
        "a.parquet",
        parquet(
            {
                "prompt": "a",
                "answer": Decimal("1.50"),
                "price": Decimal("0.25"),
                "day": datetime.date(2026, 1, 2),
                "raw": b"\xff\x00",
                "gone": None,
            }
        ),
        [("a", "1.50", {"price": 0.25, "day": "2026-01-02", "raw": "/wA=", "gone": None})],
    ),
    "parquet with a map": (
        "a.parquet",
        parquet(
            {"prompt": "a", "answer": "b", "sizes": [("x", 1)]},
            schema=lambda pyarrow: pyarrow.schema(
                [("prompt", "string"), ("answer", "large_string")]
                + [("sizes", pyarrow.map_(pyarrow.string(), pyarrow.int64()))]
            ),
        ),
        [("a", "b", {"sizes": [["x", 1]]})],
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_file_is_read_with_its_meaning(case: str, tmp_path: Path) -> None:
    name, write, expected = ACCEPTED[case]
    write(tmp_path / name)
    found = [
        (prompt.messages or prompt.text, prompt.answer, json.loads(prompt.metadata or "{}"))
        for prompt in read(tmp_path / name)
    ]
    assert found == expected


def nested(depth: int) -> bytes:
    return b'{"prompt": "a", "answer": "b", "x": ' + b"[" * depth + b"]" * depth + b"}\n"


def truncated_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(ROW * 5000)[:-20])


def truncated_parquet(path: Path) -> None:
    parquet({"prompt": "a", "answer": "b"})(path)
    path.write_bytes(path.read_bytes()[:-9])


def two_columns_of_one_name(path: Path) -> None:
    pyarrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = ["prompt", "prompt", "answer"]
    tables.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names), path)


CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
# Name of the file, its content, and parts of the message, the first of which follows the path.
REFUSED: dict[str, tuple[str, Write, list[str]]] = {
    "Latin-1": (
        "a.jsonl",
        content(ROW + b'{"prompt": "\xe9", "answer": "b"}\n'),
        [", row 2: not UTF-8 text", "convert the file to UTF-8"],
    ),
    "UTF-16": (
        "a.jsonl",
        content(ROW.decode().encode("utf-16")),
        [", row 1: not UTF-8 text"],
    ),
    "lone surrogate": (
        "a.jsonl",
        content(ROW + b'{"prompt": "\\ud800", "answer": "b"}\n'),
        [", row 2: its text holds half of a surrogate pair"],
    ),
    "lone surrogate in the name of a field": (
        "a.jsonl",
        content(b'{"prompt": "a", "answer": "b", "\\udfff": 1}\n'),
        [", row 1: its text holds half of a surrogate pair"],
    ),
    "null prompt": (
        "a.jsonl",
        jsonl({"prompt": None, "answer": "b"}),
        [", row 1: field 'prompt' is null"],
    ),
    "null in a message": (
        "a.jsonl",
        jsonl({"prompt": chat(("user", None)), "answer": "b"}),
        [", row 1: field 'prompt' must be text, or a list of chat messages"],
    ),
    "empty row": (
        "a.jsonl",
        content(ROW + b"{}\n"),
        [", row 2: no field 'prompt' (it has none)", "data.prompt_field"],
    ),
    "arrays": ("a.jsonl", jsonl(["a", "b"]), [", row 1: expected an object", "list"]),
    "one array of all rows": (
        "a.jsonl",
        content(b"[\n" + ROW + b"]\n"),
        [", row 1: not valid JSON", "one JSON object a line", "row 3 cannot be used either"],
    ),
    "null row": ("a.jsonl", content(b"null\n"), [", row 1: expected an object", "NoneType"]),
    "old line ends": (
        "a.jsonl",
        content(ROW.replace(b"\n", b"\r") * 2),
        [", row 1: not valid JSON (JSONDecodeError: Extra data"],
    ),
    "not a number": ("a.jsonl", content(b'{"prompt": "a", "answer": NaN}'), [", row 1", "is nan"]),
    "infinity": (
        "a.jsonl",
        content(b'{"prompt": "a", "answer": 1e999}'),
        [", row 1: field 'answer' is 1e999, which no response can equal"],
    ),
    "a field twice": (
        "a.jsonl",
        content(ROW + b'{"prompt": "a", "answer": "b", "answer": "c"}'),
        [", row 2: field 'answer' is given twice"],
    ),
    "deeply nested": ("a.jsonl", content(nested(100_000)), [", row 1: not valid JSON"]),
    "an image": (
        "a.jsonl",
        jsonl({"prompt": chat(("user", [TEXT, {"type": "image", "url": "x"}])), "answer": "b"}),
        [", row 1: field 'prompt' must be text", "parts that are text"],
    ),
    "a call of a tool": (
        "a.jsonl",
        jsonl({"prompt": [*chat(("user", "a")), CALL, *chat(("tool", "b"))], "answer": "b"}),
        [", row 1: a message has 'tool_calls', but only its text can be used"],
    ),
    "the answer as last message": (
        "a.jsonl",
        jsonl({"prompt": chat(("user", "2+2?"), ("assistant", "4")), "answer": 4}),
        [", row 1: field 'prompt' ends with a message of the assistant"],
    ),
    "several rows": (
        "a.jsonl",
        content(ROW + b"{}\n" + ROW + b"[]\n" + b"?\n"),
        [", row 2: no field 'prompt'", "(rows 4, 5 cannot be used either)"],
    ),
    "empty file": ("a.jsonl", content(b""), [" holds no rows"]),
    "only blank lines": ("a.jsonl", content(b"\n\n"), [" holds no rows"]),
    "a folder": ("a.jsonl", Path.mkdir, [": is a folder", "hf:"]),
    "compressed under another name": (
        "a.jsonl",
        content(gzip.compress(ROW)),
        [", row 1: not UTF-8 text"],
    ),
    "not compressed": ("a.jsonl.gz", content(ROW), [", row 1: cannot be read: Not a gzipped file"]),
    "compressed and cut off": ("a.jsonl.gz", truncated_gzip, [", row ", "cannot be read: "]),
    "csv with a missing value": (
        "a.csv",
        content(b"prompt,answer\na,b\nc\n"),
        [", row 2: 1 values for 2 columns"],
    ),
    "csv with an open quote": (
        "a.csv",
        content(b'prompt,answer\na,b\n"c,d\n'),
        [", row 2: cannot be read: "],
    ),
    "csv in Latin-1": (
        "a.csv",
        content(b"prompt,answer\na,b\n\xe9,d\n"),
        [", row 2: not UTF-8 text"],
    ),
    "csv with a column twice": (
        "a.csv",
        content(b"prompt,answer,answer\na,b,c\n"),
        [": the header ['prompt', 'answer', 'answer'] must name each column once"],
    ),
    "csv with other columns": (
        "a.csv",
        content(b"question;answer\na;b\n"),
        [", row 1: no field 'prompt' (it has 'question;answer')"],
    ),
    "csv with a header only": ("a.csv", content(b"prompt,answer\n"), [" holds no rows"]),
    "parquet without rows": (
        "a.parquet",
        parquet(schema=lambda pyarrow: pyarrow.schema([("prompt", "string")])),
        [" holds no rows"],
    ),
    "parquet cut off": ("a.parquet", truncated_parquet, ["not a readable parquet file"]),
    "parquet with a null": (
        "a.parquet",
        parquet({"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": None}),
        [", row 2: field 'answer' is null"],
    ),
    "parquet with bytes as text": (
        "a.parquet",
        parquet({"prompt": "a", "answer": b"b"}),
        [", row 1: field 'answer' must be text or a number, got bytes"],
    ),
    "parquet with a column twice": (
        "a.parquet",
        two_columns_of_one_name,
        ["two columns have the same name, of prompt, prompt, answer"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "a\0b.csv", "no/such/folder/a.parquet"])
def test_a_file_that_cannot_be_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="there is no such file") as error:
        read(Path(name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_is_refused_in_one_line_that_names_its_row(case: str, tmp_path: Path) -> None:
    name, write, parts = REFUSED[case]
    write(tmp_path / name)
    with pytest.raises(ValueError) as error:
        read(tmp_path / name)
    message = str(error.value)
    assert str(tmp_path / name) in message and "\n" not in message
    for part in parts:
        assert part in message
    if parts[0].startswith((",", ":", " ")):
        assert f"{tmp_path / name}{parts[0]}" in message
