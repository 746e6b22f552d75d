"""The tokens of outstanding rollouts on disk, from which a restarted buffer fills its store.

Owns `tokens/`, a segmented log with one record per stored chunk, and one for the text of each
response that has finished. The first record of a rollout names its group. A record belongs to one
rollout and contains its place in it, so records may be in any order. Compaction moves those of
outstanding rollouts from the oldest segments to the newest, and drops the rest. Disk use is
therefore proportional to the outstanding tokens. Decides nothing: its owner says which rollouts are
wanted at a restart, and when one is discarded. Rollout ids are never used twice.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from buffer.records.files import DISK, Disk
from buffer.records.segment_files import FRAME_BYTES, read_segment, read_segments
from buffer.records.segments import SegmentLog
from buffer.wire.messages import Chunk

_BEGIN, _CHUNK, _TEXT = range(3)
_HEAD = struct.Struct("<B?qQQ")  # kind, sampled, version, rollout, offset or group or 0
_SLACK_SEGMENTS = 4  # amount of garbage below which no live record is moved
_WRITE_BYTES = 256 << 10  # written together at most, which a processor's cache holds
_MOVED_SEGMENTS = 2  # per rotation: moving is faster than writing, and no rotation takes long


@dataclass(slots=True)
class StoredRollout:
    """One response so far, as `TrajectoryStore` holds it."""

    group_id: int
    tokens: bytearray = field(default_factory=bytearray)  # int32
    logprobs: bytearray = field(default_factory=bytearray)  # float32, 0 for given tokens
    # (sampled, version, number of tokens) of consecutive tokens
    runs: list[tuple[bool, int, int]] = field(default_factory=list)
    num_sampled: int = 0
    text: str = ""  # once it has finished

    @property
    def num_tokens(self) -> int:
        """Number of tokens, including those of the prompt."""
        return len(self.tokens) // 4

    @property
    def num_bytes(self) -> int:
        return len(self.tokens) + len(self.logprobs)

    def copy(self, group_id: int) -> StoredRollout:
        """The beginning of a rollout that continues this one."""
        return StoredRollout(
            group_id, self.tokens[:], self.logprobs[:], self.runs[:], self.num_sampled
        )

    def append(self, piece: Piece) -> None:
        sampled, version, tokens, logprobs = piece
        num_tokens = len(tokens) // 4
        self.tokens += tokens
        self.logprobs += logprobs
        if sampled:
            self.num_sampled += num_tokens
        if self.runs and self.runs[-1][:2] == (sampled, version):
            num_tokens += self.runs.pop()[2]
        self.runs.append((sampled, version, num_tokens))


class Piece(NamedTuple):
    """Consecutive tokens of one rollout."""

    sampled: bool
    version: int  # -1 if given
    tokens: bytes
    logprobs: bytes  # zeros if given

    @classmethod
    def of(cls, chunk: Chunk) -> Piece:
        tokens = chunk.tokens
        if chunk.sampled:
            return cls(True, chunk.version, tokens, chunk.logprobs)
        return cls(False, -1, tokens, bytes(len(tokens)))


@dataclass
class Pieces:
    """The records of one rollout, in any order."""

    group_id: int | None = None  # None before its first record
    by_offset: dict[int, Piece] = field(default_factory=dict)
    text: str = ""


class TokenLog:
    """Appends the tokens that the store takes. Open it with `TokenLog.open`.

    Each record is stored with its `time_s`. It survives a kill after `write`, and a power cut after
    a sync.
    """

    def __init__(self, log: SegmentLog, segment_bytes: int, disk: Disk) -> None:
        self.log = log  # to `poll`, and to wait for `synced_seq`
        self._segment_bytes = segment_bytes
        self._disk = disk
        self._sizes: dict[int, dict[int, int]] = {}  # rollout -> segment -> bytes there
        self._live: dict[int, set[int]] = {}  # segment -> outstanding rollouts with records there
        self._begun: dict[int, int] = {}  # rollout without a record -> its group
        self.live_bytes = 0  # bytes on disk of outstanding rollouts

    @classmethod
    def open(
        cls,
        folder: Path,
        wanted: Collection[int],
        *,
        segment_bytes: int = 4 << 20,
        fsync_s: float = 0.05,
        clock: Callable[[], float] = time.monotonic,
        executor: Executor | None = None,
        disk: Disk = DISK,
    ) -> tuple[TokenLog, dict[int, StoredRollout]]:
        """Open or start the log in `folder`, and return the `wanted` rollouts that it holds.

        They are the same bit for bit, but after a power cut a rollout may lack its newest tokens,
        and one begun within the last `fsync_s` may be missing. So is one without any token. Raises
        `ValueError` if the log is damaged.
        """
        inner, _ = SegmentLog.open(
            folder, fsync_s=fsync_s, clock=clock, executor=executor, disk=disk
        )
        log = cls(inner, segment_bytes, disk)
        rollouts = log._recover(wanted)
        log._drop_dead()
        return log, rollouts

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return self.log.num_bytes

    def begin(
        self, rollout_id: int, group_id: int, time_s: float, copied: StoredRollout | None = None
    ) -> None:
        """Begin a rollout, with the tokens of `copied` if it continues a lost one."""
        assert rollout_id not in self._sizes, f"rollout {rollout_id} was begun already"
        self._sizes[rollout_id] = {}
        self._begun[rollout_id] = group_id
        for payload in _copied(rollout_id, copied) if copied is not None else ():
            self._append(rollout_id, time_s, payload)

    def append(self, chunk: Chunk, time_s: float) -> int:
        """Append a stored chunk. Returns its record's number."""
        rollout_id, sampled = chunk.rollout_id, chunk.sampled
        version = chunk.version if sampled else -1
        head = _HEAD.pack(_CHUNK, sampled, version, rollout_id, chunk.offset)
        return self._append(rollout_id, time_s, head, chunk.tokens, chunk.logprobs)

    def finish(self, rollout_id: int, text: str, time_s: float) -> None:
        """Append the text of a response that has finished."""
        head = _HEAD.pack(_TEXT, False, -1, rollout_id, 0)
        self._append(rollout_id, time_s, head + text.encode())

    def discard(self, rollout_id: int) -> None:
        """Allow the removal of a rollout's records. No-op if the rollout is not outstanding.

        Call it once the event that ended the rollout is durable, since a restart that has lost the
        event needs the tokens.
        """
        self._begun.pop(rollout_id, None)
        for segment, num_bytes in self._sizes.pop(rollout_id, {}).items():
            self.live_bytes -= num_bytes
            self._live[segment].discard(rollout_id)

    def write(self) -> None:
        """Put all records into the file. If that fails, the log must be opened again."""
        self.log.write()

    def sync(self) -> None:
        self.log.sync()

    def close(self) -> None:
        self.log.close()

    def _append(self, rollout_id: int, time_s: float, *payload: bytes) -> int:
        assert rollout_id in self._sizes, f"rollout {rollout_id} is not outstanding"
        if self.log.segment_bytes >= self._segment_bytes:
            self.log.rotate(b"", time_s)
            self._compact()
        if (group_id := self._begun.pop(rollout_id, None)) is not None:
            head, *data = payload
            payload = (_HEAD.pack(_BEGIN, False, -1, rollout_id, group_id) + head, *data)
        return self._put(rollout_id, time_s, *payload)

    def _put(self, rollout_id: int, time_s: float, *payload: bytes) -> int:
        log = self.log
        seq = log.add(time_s, *payload)
        self._count(rollout_id, log.number, FRAME_BYTES + sum(map(len, payload)))
        if log.waiting_bytes >= _WRITE_BYTES:
            log.write()
        return seq

    def _count(self, rollout_id: int, segment: int, num_bytes: int) -> None:
        sizes = self._sizes[rollout_id]
        if segment in sizes:
            sizes[segment] += num_bytes
        else:
            sizes[segment] = num_bytes
            self._live.setdefault(segment, set()).add(rollout_id)
        self.live_bytes += num_bytes

    def _compact(self) -> None:
        """Drop old segments without outstanding rollouts.

        Live records are moved if more than half of the log is garbage.
        """
        self._drop_dead()
        for _ in range(_MOVED_SEGMENTS):
            oldest = min(self.log.sizes)
            garbage = self.num_bytes - self.live_bytes
            slack = _SLACK_SEGMENTS * self._segment_bytes
            if garbage <= self.live_bytes + slack or oldest == self.log.number:
                return
            self._move(oldest)

    def _move(self, segment: int) -> None:
        """Append the live records of the oldest segment again, and remove it."""
        live = self._live.get(segment, set())
        for record in read_segment(self.log.folder, segment, self._disk).records:
            rollout_id = _HEAD.unpack_from(record.payload)[3]
            if rollout_id in live:
                self._put(rollout_id, record.time_s, record.payload)
        self.log.sync()
        for rollout_id in live:
            self.live_bytes -= self._sizes[rollout_id].pop(segment)
        self._live.pop(segment, None)
        self._drop_dead()

    def _drop_dead(self) -> None:
        number = min(self.log.sizes)
        while number < self.log.number and not self._live.get(number):
            self._live.pop(number, None)
            number += 1
        self.log.drop_before(number)

    def _recover(self, wanted: Collection[int]) -> dict[int, StoredRollout]:
        found: dict[int, Pieces] = {}
        for segment in read_segments(self.log.folder, self._disk):
            for record in segment.records:
                rollout_id = _HEAD.unpack_from(record.payload)[3]
                if rollout_id not in wanted:
                    continue
                self._sizes.setdefault(rollout_id, {})
                self._count(rollout_id, segment.number, len(record.payload) + FRAME_BYTES)
                pieces = found.setdefault(rollout_id, Pieces())
                if not _add(record.payload, pieces):
                    raise self._damage(rollout_id, "has two different records of one place")
        return {rollout_id: self._join(rollout_id, pieces) for rollout_id, pieces in found.items()}

    def _join(self, rollout_id: int, pieces: Pieces) -> StoredRollout:
        if pieces.group_id is None:
            raise self._damage(rollout_id, "lacks its first record")
        rollout = StoredRollout(group_id=pieces.group_id, text=pieces.text)
        for offset, piece in sorted(pieces.by_offset.items()):
            if offset != rollout.num_tokens:
                reason = f"has {rollout.num_tokens} tokens before token {offset}"
                raise self._damage(rollout_id, reason)
            rollout.append(piece)
        return rollout

    def _damage(self, rollout_id: int, reason: str) -> ValueError:
        return ValueError(
            f"token log {self.log.folder} is damaged: rollout {rollout_id} {reason}. "
            f"Restore it from a copy, or start another run"
        )


def _add(payload: bytes, pieces: Pieces) -> bool:
    """Take a record. False if it contradicts an earlier one of the same place.

    A crash during a move leaves some records twice.
    """
    kind, flag, version, _, number = _HEAD.unpack_from(payload)
    data = payload[_HEAD.size :]
    if kind == _BEGIN:
        pieces.group_id = number
        return not data or _add(data, pieces)  # a record may follow in it
    if kind == _TEXT:
        pieces.text = data.decode()
        return True
    half = len(data) // 2 if flag else len(data)
    logprobs = data[half:] if flag else bytes(half)
    piece = Piece(sampled=flag, version=version, tokens=data[:half], logprobs=logprobs)
    return pieces.by_offset.setdefault(number, piece) == piece


def _copied(rollout_id: int, rollout: StoredRollout) -> Iterator[bytes]:
    """The records that hold a copied beginning, one per run."""
    start = 0
    for sampled, version, num_tokens in rollout.runs:
        end = start + 4 * num_tokens
        head = _HEAD.pack(_CHUNK, sampled, version, rollout_id, start // 4)
        yield head + rollout.tokens[start:end] + (rollout.logprobs[start:end] if sampled else b"")
        start = end
