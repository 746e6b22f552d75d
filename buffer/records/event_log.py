"""The buffer's event log, `events/`: each event that is handled, and its decisions after it.

A segmented log (`segments`). A segment starts with a `Checkpoint` and continues with records: an
event of the core, the decisions that followed it, or a note about a fact outside the core that a
restarted buffer needs. A restart reads the newest segment, and `tools.replay` reads all segments
that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec

from buffer.data.outstanding_prompts import Cursor
from buffer.records.files import DISK
from buffer.records.segment_files import Record, read_segments
from buffer.records.segments import SegmentLog
from buffer.wire.messages import SnapshotRef, Work
from darts import events as ev
from darts.checkpoint import CoreState
from darts.config import CoreConfig

EVENT_TYPES: dict[str, type] = {t.__name__: t for t in get_args(ev.Event)}
DECISION_TYPES: dict[str, type] = {t.__name__: t for t in get_args(ev.Decision)}
_FIELDS = {
    t: tuple(f.name for f in fields(t)) for t in (*EVENT_TYPES.values(), *DECISION_TYPES.values())
}
_DECISIONS = "decisions"


class Learner(msgspec.Struct, frozen=True, tag=True):
    """A note, and part of a checkpoint: the learner that trains this run."""

    incarnation: str
    num_ranks: int
    vocab_size: int
    work: Work = Work()


class BufferState(msgspec.Struct, frozen=True, kw_only=True):
    """The buffer's state besides its core, at the end of a step with no evaluation under way."""

    step: int
    cursor: Cursor
    tokens: dict[str, int]  # the cumulative sums of `metrics.jsonl`
    num_skipped: int  # prompts without which the run continued
    policy: SnapshotRef | None
    learner: Learner | None


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The head of a segment. A fresh run's first one has no state yet."""

    config: CoreConfig
    core: CoreState | None = None
    buffer: BufferState | None = None


class Trained(msgspec.Struct, frozen=True, tag=True):
    """A note: the learner trained `step` on `num_tokens` tokens and reported `metrics`."""

    step: int
    num_tokens: int
    metrics: dict[str, float]


class Policy(msgspec.Struct, frozen=True, tag=True):
    """A note: the policy that engines should load."""

    policy: SnapshotRef


class Rewound(msgspec.Struct, frozen=True, tag=True):
    """A note: a learner resumed at `step`, so later steps are withdrawn.

    `tokens` are the cumulative sums without them, `visits` are those of the prompts that return to
    the stream, and `num_skipped` is the number of prompts skipped by then.
    """

    step: int
    tokens: dict[str, int]
    visits: list[int]
    num_skipped: int


Note = Trained | Policy | Rewound | Learner


class LoggedEvent(NamedTuple):
    """An event, the time at which it was logged, and the decisions that followed it.

    `complete` is False for the last event of a segment: a killed buffer may not have logged its
    decisions.
    """

    time_s: float
    event: ev.Event
    decisions: list[ev.Decision]
    complete: bool


class Session(NamedTuple):
    """One segment: the configuration and state of the core at its head, and the events after it.

    `step` is the number of steps done before it. Above 0 in the first segment that is kept, the
    records of earlier steps were removed.
    """

    config: CoreConfig
    state: CoreState | None
    events: Iterator[LoggedEvent]
    step: int


class LoggedNote(NamedTuple):
    """A note, and the time at which it was logged."""

    time_s: float
    note: Note


class Recovered(NamedTuple):
    """For a restarted buffer: the newest checkpoint, and the events and notes after it."""

    checkpoint: Checkpoint
    entries: list[LoggedEvent | LoggedNote]
    is_new: bool


class EventLog:
    """Appends to the log of a run. A record is in the file after `write`, and durable after a sync
    of the log.
    """

    def __init__(self, log: SegmentLog) -> None:
        self.log = log
        self._encode = msgspec.msgpack.Encoder().encode

    @classmethod
    def open(
        cls, folder: Path, config: CoreConfig, fsync_s: float, executor: Executor | None = None
    ) -> tuple[EventLog, Recovered]:
        """Open or start the log in `folder`.

        Raises `ValueError` if it is damaged or of another version.
        """
        is_new = not folder.is_dir() or not any(folder.glob("*.log"))
        first = msgspec.msgpack.encode(Checkpoint(config=config))
        log, found = SegmentLog.open(
            folder, first_checkpoint=first, fsync_s=fsync_s, executor=executor
        )
        checkpoint = _checkpoint(folder, found.checkpoint)
        return cls(log), Recovered(checkpoint, list(_entries(folder, found.records)), is_new)

    def event(self, event: ev.Event, time_s: float) -> None:
        self.log.add(time_s, self._encode(_named(event)))

    def decisions(self, decisions: Sequence[ev.Decision], time_s: float) -> None:
        if decisions:
            self.log.add(time_s, self._encode((_DECISIONS, [_named(d) for d in decisions])))

    def note(self, note: Note, time_s: float) -> None:
        self.log.add(time_s, self._encode(("note", note)))

    def write(self) -> None:
        """Put all records into the file, so that they survive a kill."""
        self.log.write()

    def rotate(self, checkpoint: Checkpoint, time_s: float, keep_bytes: int) -> None:
        """Start a segment from which a restart begins, and drop old ones above `keep_bytes`."""
        self.log.rotate(self._encode(checkpoint), time_s)
        self.log.retain(keep_bytes)

    def close(self) -> None:
        self.log.close()


def read_sessions(folder: Path) -> Iterator[Session]:
    """Every segment that is kept, oldest first.

    Raises `ValueError` if a segment is damaged or not part of an event log.
    """
    if not folder.is_dir():
        return
    for segment in read_segments(folder, DISK):
        checkpoint = _checkpoint(folder, segment.checkpoint.payload)
        yield Session(
            config=checkpoint.config,
            state=checkpoint.core,
            events=(e for e in _entries(folder, segment.records) if isinstance(e, LoggedEvent)),
            step=checkpoint.buffer.step if checkpoint.buffer else 0,
        )


def _entries(folder: Path, records: Sequence[Record]) -> Iterator[LoggedEvent | LoggedNote]:
    pending: tuple[float, ev.Event] | None = None
    for record in records:
        entry = _decode(folder, record)
        if isinstance(entry, list):
            assert pending is not None, "decisions without an event"
            yield LoggedEvent(*pending, entry, complete=True)
            pending = None
            continue
        if pending is not None:
            # A buffer that was killed may not have logged the decisions of its last event.
            killed = isinstance(entry, ev.BufferRestarted)
            yield LoggedEvent(*pending, [], complete=not killed)
            pending = None
        if isinstance(entry, Note):
            yield LoggedNote(record.time_s, entry)
        else:
            pending = (record.time_s, entry)
    if pending is not None:
        yield LoggedEvent(*pending, [], complete=False)


def _values(kind: type) -> Callable[[Any], Sequence[Any]]:
    """Returns the values of an entry's fields."""
    names = _FIELDS[kind]
    if len(names) > 1:
        return attrgetter(*names)
    return lambda entry: [getattr(entry, name) for name in names]


_VALUES = {kind: _values(kind) for kind in _FIELDS}


def _named(entry: ev.Event | ev.Decision) -> tuple[str, Sequence[Any]]:
    kind = type(entry)
    return kind.__name__, _VALUES[kind](entry)


def _checkpoint(folder: Path, payload: bytes) -> Checkpoint:
    try:
        return msgspec.msgpack.decode(payload, type=Checkpoint)
    except msgspec.MsgspecError as error:
        raise _foreign(folder, str(error)) from error


def _decode(folder: Path, record: Record) -> ev.Event | Note | list[ev.Decision]:
    try:
        name, values = msgspec.msgpack.decode(record.payload, type=tuple[str, Any])
        if name == "note":
            return msgspec.convert(values, Note)
        if name == _DECISIONS:
            return [_typed(DECISION_TYPES[kind], fields) for kind, fields in values]
        return _typed(EVENT_TYPES[name], values)
    except (msgspec.MsgspecError, KeyError, ValueError) as error:
        raise _foreign(folder, str(error)) from error


def _typed(kind: type[Any], values: Sequence[Any]) -> Any:
    named = dict(zip(_FIELDS[kind], values, strict=True))
    return msgspec.convert(named, kind, strict=False)


def _foreign(folder: Path, reason: str) -> ValueError:
    return ValueError(f"{folder} is not an event log of this version: {reason[:200]}")
