"""The core's event log, `events.msgpack`: every event before it is handled, every decision after; replayable.

A stream of msgpack arrays: first `["core", {configuration}]`, then `["RolloutProgressed", [fields...]]` for an event or a
decision, by the name of its type. A log cut short by a kill is readable up to its last whole entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO, get_args

import msgpack
import msgspec

from darts import events as ev
from darts.config import CoreConfig

EVENT_TYPES: dict[str, type] = {t.__name__: t for t in get_args(ev.Event)}
DECISION_TYPES: dict[str, type] = {t.__name__: t for t in get_args(ev.Decision)}
_FIELDS = {
    t: tuple(f.name for f in fields(t)) for t in (*EVENT_TYPES.values(), *DECISION_TYPES.values())
}


class EventLog:
    """Appends to a run's log; the file is buffered, and flushed by `flush`."""

    def __init__(self, path: Path, config: CoreConfig) -> None:
        self._file: BinaryIO = path.open("ab")
        self._encode = msgspec.msgpack.Encoder().encode
        self._file.write(self._encode(("core", asdict(config))))

    def write(self, entry: ev.Event | ev.Decision) -> None:
        kind = type(entry)
        self._file.write(
            self._encode((kind.__name__, [getattr(entry, name) for name in _FIELDS[kind]]))
        )

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


Session = tuple[CoreConfig, Iterator[ev.Event | ev.Decision]]


def read_sessions(path: Path) -> Iterator[Session]:
    """Each life of the buffer in turn (a resumed run has several): its core's configuration and its entries.

    An entry iterator must be used up before the next session is asked for. Raises ValueError for what is no event log.
    """
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker(file, raw=False, strict_map_key=False)
        entries = _Entries(unpacker, path)
        while (config := entries.next_session()) is not None:
            yield config, entries.of_session()


class _Entries:
    def __init__(self, unpacker: Any, path: Path) -> None:
        self._raw: Iterator[Any] = iter(unpacker)
        self._path = path
        self._header: Any = next(self._raw, None)

    def next_session(self) -> CoreConfig | None:
        if self._header is None:
            return None
        if not (
            isinstance(self._header, list) and len(self._header) == 2 and self._header[0] == "core"
        ):
            raise ValueError(
                f"{self._path} is not an event log of this version: it starts with {str(self._header)[:80]!r}"
            )
        return CoreConfig(**self._header[1])

    def of_session(self) -> Iterator[ev.Event | ev.Decision]:
        self._header = None
        for name, values in self._raw:
            if name == "core":
                self._header = [name, values]
                return
            kind = EVENT_TYPES.get(name) or DECISION_TYPES.get(name)
            if kind is None:
                raise ValueError(
                    f"{self._path} holds an entry {name!r} that this version does not know"
                )
            yield msgspec.convert(dict(zip(_FIELDS[kind], values, strict=True)), kind, strict=False)
