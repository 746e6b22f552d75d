"""Appends the rows of a run to a file such as `groups.jsonl`, and bounds its size.

`row_segments` defines the segments and reads them. Rows are kept in memory until `flush`. A
position is a step, since it survives the removal of segments: `cut` removes the rows of a step and
of later ones. Every intermediate state of every method is a beginning of the rows, so a method that
a kill interrupted can be repeated. One process writes, which holds the `RunLock`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec

from buffer.records.files import DISK, Disk, write_all
from buffer.records.row_segments import Row, older_segments, segment_path


class _OfStep(msgspec.Struct):
    step: int


_decode = msgspec.json.Decoder(_OfStep).decode


class RowLog:
    """Rows that are open for appending.

    A last line without an end, and rows after a damaged one, are cut off: a kill or a power cut
    lost them.
    """

    def __init__(self, path: Path, disk: Disk = DISK) -> None:
        self.path = path
        self._disk = disk
        older = older_segments(path, disk)
        self._older = {step: disk.size(segment) for step, segment in older.items()}
        self._first_step: int | None = None  # of the newest file
        self._size = 0  # of the newest file
        self._waiting = bytearray()  # rows that are not yet in it
        self._handle = -1
        self._open()
        self._cut_newest(None)

    @property
    def num_bytes(self) -> int:
        return sum(self._older.values()) + self._size

    @property
    def first_step(self) -> int | None:
        """The first step whose rows are all kept; None if there are no rows.

        Above 0, rows of earlier steps were removed.
        """
        return next(iter(self._older), self._first_step)

    def append(self, row: Row) -> None:
        if self._first_step is None:
            self._first_step = row["step"]
        self._waiting += json.dumps(row).encode() + b"\n"

    def flush(self) -> None:
        """Put all rows into the file.

        Raises `OSError` if they cannot be written; the file is then as it was before.
        """
        try:
            write_all(self._disk, self._handle, bytes(self._waiting))
        except OSError:
            self._disk.truncate(self._handle, self._size)
            raise
        self._size += len(self._waiting)
        self._waiting.clear()

    def sync(self) -> None:
        """Make all rows durable."""
        self.flush()
        self._disk.sync(self._handle)

    def rotate(self, segment_bytes: int, keep_bytes: int, needed_step: int) -> None:
        """Start another file if this one has `segment_bytes`, and drop old segments above a size.

        For the end of a step, so that no step is in two segments. Rows of `needed_step` and of
        later steps are kept.
        """
        self.flush()
        if self._size >= segment_bytes and self._first_step is not None:
            self._disk.sync(self._handle)
            self._disk.replace(self.path, segment_path(self.path, self._first_step))
            self._disk.sync_folder(self.path.parent)
            self._older[self._first_step], self._first_step = self._size, None
            self._close()
            self._open()
        while self.num_bytes > keep_bytes and self._older:
            oldest, *later = self._older
            following = later[0] if later else self._first_step
            if following is None or following > needed_step:
                break
            self._remove(oldest)

    def cut(self, step: int) -> None:
        """Remove the rows of `step` and of later steps."""
        self.flush()
        self._cut_newest(step)
        for later in sorted((first for first in self._older if first >= step), reverse=True):
            self._remove(later)
        if self._older and self._first_step is None:
            self._cut_older(max(self._older), step)

    def rows_from(self, step: int) -> Iterator[Row]:
        """The rows of `step` and of later steps, without reading segments of earlier steps."""
        self.flush()
        steps = [*self._older] if self._first_step is None else [*self._older, self._first_step]
        first = max((first for first in steps if first <= step), default=0)
        for segment in [*(s for s in self._older if s >= first), None]:
            for line in self._read(segment).splitlines():
                if _decode(line).step >= step:
                    yield json.loads(line)

    def last_row(self) -> Row:
        """The newest row; empty if there is none."""
        self.flush()
        for segment in (None, *sorted(self._older, reverse=True)):
            if data := self._read(segment):
                return json.loads(data[data.rfind(b"\n", 0, -1) + 1 :])
        return {}

    def close(self) -> None:
        """May be called twice."""
        if self._handle >= 0:
            try:
                self.flush()
            finally:
                self._close()

    def _read(self, segment: int | None) -> bytes:
        """The content of an older segment, or of the newest file."""
        path = self.path if segment is None else segment_path(self.path, segment)
        return self._disk.read(path)

    def _remove(self, first_step: int) -> None:
        self._disk.remove(segment_path(self.path, first_step))
        self._disk.sync_folder(self.path.parent)  # one at a time, so that a power cut leaves no gap
        del self._older[first_step]

    def _cut_newest(self, step: int | None) -> None:
        end, self._first_step = _end_before(self._read(None), step)
        if end < self._disk.size(self.path):
            self._disk.truncate(self._handle, end)
            self._disk.sync(self._handle)
        self._size = end

    def _cut_older(self, first_step: int, step: int) -> None:
        end, _ = _end_before(self._read(first_step), step)
        if end < self._older[first_step]:
            handle = self._disk.open(segment_path(self.path, first_step))
            try:
                self._disk.truncate(handle, end)
                self._disk.sync(handle)
            finally:
                self._disk.close(handle)
            self._older[first_step] = end

    def _open(self) -> None:
        if self.path.name in self._disk.names(self.path.parent):
            self._handle = self._disk.open(self.path)
            return
        self._handle = self._disk.create(self.path, 0o666)
        self._disk.sync_folder(self.path.parent)
        self._size = 0

    def _close(self) -> None:
        self._disk.close(self._handle)
        self._handle = -1


def _end_before(data: bytes, step: int | None) -> tuple[int, int | None]:
    """The size of the whole rows before `step`, or of all of them, and the first one's step."""
    end, first = 0, None
    for line in data.splitlines(keepends=True):
        try:
            row = _decode(line)
        except msgspec.MsgspecError:
            break
        if not line.endswith(b"\n") or (step is not None and row.step >= step):
            break
        first = row.step if first is None else first
        end += len(line)
    return end, first
