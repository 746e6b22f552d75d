"""Reads the rows of a run: JSON lines in a file such as `groups.jsonl` and in older segments of it.

`groups.jsonl` has the newest rows. An older segment, `groups.00000120.jsonl`, has the rows of step
120 and of later steps, up to the first step of the next segment. The oldest segments are removed in
the end, so the rows may begin at any step. Each row has a `step`, which never decreases from one
row to the next. This module reads, also while the run writes; `row_log` writes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from buffer.records.files import DISK, Disk

Row = dict[str, Any]


def segment_path(path: Path, first_step: int) -> Path:
    """The older segment of `path` that begins at a step."""
    return path.with_name(f"{path.stem}.{first_step:08d}{path.suffix}")


def older_segments(path: Path, disk: Disk = DISK) -> dict[int, Path]:
    """The older segments of `path` by their first step, oldest first."""
    pattern = re.compile(rf"{re.escape(path.stem)}\.(\d{{8,}}){re.escape(path.suffix)}")
    found = (pattern.fullmatch(name) for name in disk.names(path.parent))
    steps = sorted(int(match[1]) for match in found if match)
    return {step: segment_path(path, step) for step in steps}


def exists(path: Path) -> bool:
    """Whether a run has written rows to `path`."""
    return path.is_file() or (path.parent.is_dir() and bool(older_segments(path)))


def open_segments(path: Path) -> Iterator[BinaryIO]:
    """Every segment, oldest first, each closed when the next one is asked for.

    The newest file is opened before the others are listed, as it may become one of them.
    """
    newest = path.open("rb") if path.is_file() else None
    try:
        for older in older_segments(path).values():
            try:
                file = older.open("rb")
            except FileNotFoundError:
                continue  # removed just now
            with file:
                if newest is None or not os.path.samestat(*map(_stat, (file, newest))):
                    yield file
        if newest is not None:
            yield newest
    finally:
        if newest is not None:
            newest.close()


def read_lines(path: Path) -> Iterator[bytes]:
    """Every line, oldest first. The last one may lack its end."""
    for file in open_segments(path):
        yield from file


def read_rows(path: Path) -> Iterator[Row]:
    """Every row, oldest first, one in memory at a time."""
    return (json.loads(line) for line in read_lines(path) if line.endswith(b"\n"))


def begins_at(rows: Iterable[Row]) -> int:
    """The first step that rows, oldest first, tell about; 0 if there are no rows.

    Above 0, the rows of earlier steps were removed.
    """
    return next((row["step"] for row in rows), 0)


def _stat(file: BinaryIO) -> os.stat_result:
    return os.fstat(file.fileno())
