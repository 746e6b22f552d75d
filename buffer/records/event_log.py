"""The core's event log, `events.msgpack`: every event before it is handled, its decisions after it.

A stream of msgpack arrays [name, time_s, values], named by the type of the event or decision. Only an
event has a time, in seconds since the run began. A session starts with the core's configuration; a
resumed run has several sessions. A log that a kill cut short is readable up to its last whole entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast, get_args

import msgpack
import msgspec

from darts import events as ev
from darts.config import CoreConfig

EVENT_TYPES: dict[str, type] = {t.__name__: t for t in get_args(ev.Event)}
DECISION_TYPES: dict[str, type] = {t.__name__: t for t in get_args(ev.Decision)}
_FIELDS = {
    t: tuple(f.name for f in fields(t)) for t in (*EVENT_TYPES.values(), *DECISION_TYPES.values())
}
_SESSION = "core"


class LoggedEvent(NamedTuple):
    """An event, the time at which it was logged, and the decisions that followed it.

    `complete` is False for the last event of a session: a killed buffer may have logged only some of
    its decisions.
    """

    time_s: float
    event: ev.Event
    decisions: list[ev.Decision]
    complete: bool


Session = tuple[CoreConfig, Iterator[LoggedEvent]]


class EventLog:
    """Appends to a run's log. The file is buffered until `flush`."""

    def __init__(self, path: Path, config: CoreConfig) -> None:
        self._file: BinaryIO = path.open("ab")
        self._encode = msgspec.msgpack.Encoder().encode
        self._file.write(self._encode((_SESSION, None, asdict(config))))

    def event(self, event: ev.Event, time_s: float) -> None:
        self._write(event, time_s)

    def decision(self, decision: ev.Decision) -> None:
        self._write(decision, None)

    def _write(self, entry: ev.Event | ev.Decision, time_s: float | None) -> None:
        kind = type(entry)
        values = [getattr(entry, name) for name in _FIELDS[kind]]
        self._file.write(self._encode((kind.__name__, time_s, values)))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_sessions(path: Path) -> Iterator[Session]:
    """Each life of the buffer in turn: its core's configuration and its events.

    Use up the events of one session before asking for the next. Raises ValueError if the file is not an
    event log of this version.
    """
    with path.open("rb") as file:
        reader = _Reader(path, msgpack.Unpacker(file, raw=False, strict_map_key=False))
        while (config := reader.next_session()) is not None:
            yield config, reader.events()


class _Reader:
    def __init__(self, path: Path, raw: Any) -> None:
        self._path = path
        self._raw: Iterator[Any] = iter(raw)
        self._header: Any = next(self._raw, None)

    def next_session(self) -> CoreConfig | None:
        header = self._header
        if header is None:
            return None
        if not (isinstance(header, list) and len(cast("list[Any]", header)) == 3):
            raise self._foreign(header)
        name, _, config = cast("list[Any]", header)
        if name != _SESSION:
            raise self._foreign(header)
        return CoreConfig(**config)

    def events(self) -> Iterator[LoggedEvent]:
        """The events up to the next session's header."""
        self._header = None
        time_s, event = 0.0, None
        decisions: list[ev.Decision] = []
        for entry in self._raw:
            name, entry_time_s, values = entry
            if name == _SESSION:
                self._header = entry
                break
            if name in DECISION_TYPES:
                decisions.append(_decoded(DECISION_TYPES[name], values))
                continue
            if name not in EVENT_TYPES:
                raise self._foreign(entry)
            if event is not None:
                yield LoggedEvent(time_s, event, decisions, complete=True)
            time_s, event, decisions = entry_time_s, _decoded(EVENT_TYPES[name], values), []
        if event is not None:
            yield LoggedEvent(time_s, event, decisions, complete=False)

    def _foreign(self, entry: Any) -> ValueError:
        return ValueError(
            f"{self._path} is not an event log of this version: it contains {str(entry)[:80]!r}"
        )


def _decoded(kind: type, values: list[Any]) -> Any:
    return msgspec.convert(dict(zip(_FIELDS[kind], values, strict=True)), kind, strict=False)
