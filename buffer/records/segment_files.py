"""The format of a log's segments: the framing of records, their reading, and damage to them.

    segment   preamble, checkpoint frame, frames
    preamble  magic, segment number, random salt, CRC32
    frame     magic, kind, payload length, CRC32 of the rest, unsynced, sequence number, time_s,
              payload

The CRCs of frames start from the salt, so that no payload can look like a frame. A checkpoint's
sequence number is that of the first record after it. This module reads; `segments` writes.

A bad frame in the newest segment is either the torn end of a crash, which is cut off, or damage,
which is refused. A power cut may persist unsynced pages in any order, so whole records after a bad
one prove nothing. However, each frame says how many records before it were not durable when it was
written. If a later frame thus proves that the bad one was durable, it is damage.
"""

from __future__ import annotations

import re
import secrets
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from buffer.records.files import DISK, UNFINISHED, Disk

RECORD, CHECKPOINT, CLOSED = range(3)
_PREAMBLE = struct.Struct("<8sII")
_CRC = struct.Struct("<I")
_HEAD = struct.Struct("<2sBxI")  # magic, kind, payload length; then the CRC
_BODY = struct.Struct("<IQd")  # unsynced, sequence number, time_s
_FRAME = struct.Struct("<2sBxIIIQd")  # all three
_CHECKED = struct.Struct("<2sBxIIQd")  # all of it but the CRC
_MAGIC, _FRAME_MAGIC = b"DARTSLOG", b"\xd4\xa7"
_START = _PREAMBLE.size + _CRC.size
FRAME_BYTES = _FRAME.size  # per record, without its payload


class Record(NamedTuple):
    seq: int
    time_s: float
    payload: bytes


@dataclass
class Segment:
    """A segment as read."""

    number: int
    key: int
    checkpoint: Record
    records: list[Record] = field(default_factory=list[Record])
    closed: bool = False  # its last frame marks an orderly end
    end: int = 0  # bytes of whole frames
    size: int = 0  # bytes of the file

    @property
    def next_seq(self) -> int:
        return self.checkpoint.seq + len(self.records)


class _Frame(NamedTuple):
    kind: int
    seq: int
    unsynced: int
    time_s: float
    start: int  # of the payload
    end: int


def preamble(number: int) -> bytes:
    start = _PREAMBLE.pack(_MAGIC, number, secrets.randbits(32))
    return start + _CRC.pack(zlib.crc32(start))


def frame_key(start: bytes) -> int:
    """The start value of the CRCs of a segment's frames. It differs between segments."""
    return zlib.crc32(start[: _PREAMBLE.size])


def frame(key: int, kind: int, seq: int, unsynced: int, time_s: float, *payload: bytes) -> bytes:
    """The frame without its payload, whose parts follow it: large ones need no copy for that."""
    length = sum(map(len, payload))
    crc = zlib.crc32(_CHECKED.pack(_FRAME_MAGIC, kind, length, unsynced, seq, time_s), key)
    for part in payload:
        crc = zlib.crc32(part, crc)
    return _FRAME.pack(_FRAME_MAGIC, kind, length, crc, unsynced, seq, time_s)


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.log"


def segment_sizes(folder: Path, disk: Disk = DISK) -> dict[int, int]:
    """Bytes by segment number, ascending. Raises `ValueError` if one between is missing."""
    numbers = sorted(
        int(match[1])
        for name in disk.names(folder)
        if (match := re.fullmatch(r"(\d{6,})\.log", name))
    )
    for before, number in zip(numbers, numbers[1:], strict=False):
        if number != before + 1:
            raise ValueError(
                f"log {folder} lacks {segment_path(folder, before + 1).name} between "
                f"{before:06d}.log and {number:06d}.log: restore it from a copy, or start another "
                "run"
            )
    return {number: disk.size(segment_path(folder, number)) for number in numbers}


def remove_unfinished(folder: Path, disk: Disk) -> None:
    """Remove segments that a crash left unfinished."""
    for name in disk.names(folder):
        if re.fullmatch(r"\.\d{6,}\.log\.[0-9a-f]+" + re.escape(UNFINISHED), name):
            disk.remove(folder / name)


def newest_segment(folder: Path, disk: Disk = DISK) -> Segment | None:
    """The newest segment that has its checkpoint, or None in an empty folder.

    Raises `ValueError` if it is damaged.
    """
    numbers, last = _whole_segments(folder, disk)
    return _read(folder, numbers[-1], last, disk) if numbers else None


def read_segment(folder: Path, number: int, disk: Disk = DISK) -> Segment:
    """A segment that is not the newest. Raises `ValueError` if it is damaged."""
    return _read(folder, number, number + 1, disk)


def read_segments(folder: Path, disk: Disk = DISK) -> Iterator[Segment]:
    """All segments that are kept, oldest first, with one in memory at a time.

    Raises `ValueError` if one is damaged. Changes nothing, so it may also read a log that is being
    written. A torn end is left out.
    """
    next_seq: int | None = None
    numbers, last = _whole_segments(folder, disk)
    for number in numbers:
        segment = _read(folder, number, last, disk)
        if next_seq is not None and segment.checkpoint.seq != next_seq:
            raise ValueError(
                f"{segment_path(folder, number)} begins at record {segment.checkpoint.seq}, but "
                f"the segment before it ends before record {next_seq}: one of them belongs to "
                "another log"
            )
        next_seq = segment.next_seq
        yield segment


def _whole_segments(folder: Path, disk: Disk) -> tuple[list[int], int]:
    """The segments that have their checkpoint, and the last number in the folder.

    The newest segment may lack its checkpoint.
    """
    numbers = list(segment_sizes(folder, disk))
    last = numbers[-1] if numbers else 0
    if len(numbers) > 1 and _is_incomplete(disk.read(segment_path(folder, last))):
        numbers.pop()
    return numbers, last


def _read(folder: Path, number: int, last: int, disk: Disk) -> Segment:
    path = segment_path(folder, number)
    return _parse(path, number, disk.read(path), newest=number == last)


def _parse(path: Path, number: int, data: bytes, *, newest: bool) -> Segment:
    if len(data) < _START or _CRC.unpack_from(data, _PREAMBLE.size)[0] != zlib.crc32(
        data[: _PREAMBLE.size]
    ):
        raise _damage(path, 0, "its preamble is not of this version")
    if data[:8] != _MAGIC or _PREAMBLE.unpack_from(data)[1] != number:
        raise _damage(path, 0, f"it was not written as segment {number}")
    key = frame_key(data[:_START])
    first = _frame_at(data, _START, key)
    if first is None or first.kind != CHECKPOINT:
        raise _damage(path, _START, "its checkpoint is not whole")
    checkpoint = Record(first.seq, first.time_s, data[first.start : first.end])
    segment = Segment(number=number, key=key, checkpoint=checkpoint, size=len(data))
    segment.end = first.end
    _parse_records(path, data, segment)
    if segment.end < len(data):
        if not newest:
            raise _damage(path, segment.end, "a record is not whole, although a segment follows")
        if _was_durable(data, segment.end, key, segment.next_seq):
            raise _damage(
                path, segment.end, "a record is not whole, although durable records follow"
            )
    return segment


def _parse_records(path: Path, data: bytes, segment: Segment) -> None:
    while (found := _frame_at(data, segment.end, segment.key)) is not None:
        if found.seq != segment.next_seq or found.kind not in (RECORD, CLOSED):
            raise _damage(
                path,
                segment.end,
                f"it holds record {found.seq} instead of {segment.next_seq}",
            )
        segment.closed = found.kind == CLOSED
        if found.kind == RECORD:
            record = Record(found.seq, found.time_s, data[found.start : found.end])
            segment.records.append(record)
        segment.end = found.end


def _frame_at(data: bytes, offset: int, key: int) -> _Frame | None:
    """The whole frame that begins at `offset`, or None."""
    start = offset + FRAME_BYTES
    if start > len(data):
        return None
    magic, kind, length = _HEAD.unpack_from(data, offset)
    end = start + length
    if magic != _FRAME_MAGIC or end > len(data):
        return None
    view = memoryview(data)
    head_end = offset + _HEAD.size
    body_start = head_end + _CRC.size
    crc = zlib.crc32(view[body_start:end], zlib.crc32(view[offset:head_end], key))
    if crc != _CRC.unpack_from(data, head_end)[0]:
        return None
    unsynced, seq, time_s = _BODY.unpack_from(data, body_start)
    return _Frame(kind=kind, seq=seq, unsynced=unsynced, time_s=time_s, start=start, end=end)


def _frames_after(data: bytes, offset: int, key: int) -> Iterator[_Frame]:
    """Every whole frame that begins at any byte after `offset`."""
    position = data.find(_FRAME_MAGIC, offset + 1)
    while position >= 0:
        found = _frame_at(data, position, key)
        if found is not None:
            yield found
        position = data.find(_FRAME_MAGIC, found.end if found else position + 1)


def _was_durable(data: bytes, offset: int, key: int, seq: int) -> bool:
    """Whether a frame after `offset` proves that the bad record `seq` there was durable."""
    return any(seq < found.seq - found.unsynced for found in _frames_after(data, offset, key))


def _is_incomplete(data: bytes) -> bool:
    """Whether the file ends within its checkpoint, so that no record can be lost with it."""
    if len(data) < _START + FRAME_BYTES:
        return True
    magic, _, length = _HEAD.unpack_from(data, _START)
    if magic != _FRAME_MAGIC or _START + FRAME_BYTES + length <= len(data):
        return False
    return next(_frames_after(data, _START, frame_key(data[:_START])), None) is None


def _damage(path: Path, offset: int, reason: str) -> ValueError:
    return ValueError(
        f"{path} is damaged at byte {offset}: {reason}. Later records cannot be trusted; "
        f"restore the file from a copy, or start another run"
    )
