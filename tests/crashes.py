"""A buffer in this process, without sockets, that is killed between any two of its writes.

Owns the folder of its run, its clock and its connections. A crash copies the folder at once, as a
kill or a power cut would leave it, and the next buffer continues in the copy. The old one is
closed in the old folder, where nothing reads what it writes there.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from buffer import engine_side, learner_side, run_state, service
from buffer.records import journal, run_files, settings
from buffer.records.files import Disk
from buffer.records.segments import SegmentLog
from buffer.records.token_log import TokenLog
from buffer.run_state import RunState
from buffer.service import Service
from buffer.wire import messages as msg
from configs.schema import Config

Fate = Literal["kill", "power cut"]
TOKEN_SEGMENT_BYTES = 1500  # so that the token log is compacted often
SYNCED = ("create", "replace", "remove", "truncate", "sync_folder")  # calls that are not `write`
REBUILT = (".sqlite-shm", ".lock")  # by the next process


class KilledError(BaseException):
    """The process ends here."""


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


class Connections:
    """The buffer's `Router`. `deliver` takes what it sends, and `inbound` waits to be received."""

    address, num_rejected = "tcp://127.0.0.1:1", 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.inbound: list[tuple[bytes, msg.Message]] = []
        self.deliver: Callable[[bytes, msg.Message], bool] = lambda identity, message: False

    def receive(self, timeout_s: float) -> list[tuple[bytes, msg.Message]]:
        received, self.inbound = self.inbound, []
        return received

    def send(self, identity: bytes, message: msg.Message) -> bool:
        return self.deliver(identity, message)

    reply = send

    def dismiss(self, identity: bytes) -> None:
        """The peer has been told, and ends by itself."""

    def publish(self, topic: bytes, message: msg.Message) -> None:
        """No monitor listens."""

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Connections:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CrashingBuffer:
    """A buffer's process on a machine that may crash. `fuses` are the writes until each crash."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._folders = folder
        self._num_lives = 0
        self.config = config
        self.clock = Clock()
        self.fuses: list[int] = []
        self.fate: Fate = "kill"
        self.has_lost_power = False
        self.rng = random.Random(0)  # decides which unsynced bytes survive a power cut
        self.deliver: Callable[[bytes, msg.Message], bool] = lambda identity, message: False
        self._durable: dict[int, int] = {}  # inode -> bytes that survive a power cut
        self._handles: set[int] = set()
        self.service: Service | None = None
        self.folder.mkdir()

    @property
    def folder(self) -> Path:
        """The run's parent folder in its present life."""
        return self._folders / f"life-{self._num_lives}"

    @property
    def run(self) -> RunState:
        assert self.service is not None
        return self.service.run

    def start(self, resume: bool) -> None:
        """Raises `KilledError` if a fuse blows meanwhile."""
        self.service = None
        place = replace(self.config.run, dir=str(self.folder), name="r", resume=resume)
        config = replace(self.config, run=place)
        started = Service(config)
        started.run.router.deliver = self.deliver  # pyright: ignore[reportAttributeAccessIssue]
        started._recover()
        self.service = started

    def feed(self, *received: tuple[bytes, msg.Message]) -> None:
        """One turn of the buffer's loop, with these messages."""
        assert self.service is not None
        self.run.router.inbound += received  # pyright: ignore[reportAttributeAccessIssue]
        self.service._turn()

    def crash(self) -> None:
        """End the process now, and leave the disk as the next one finds it."""
        before = self.folder
        self._num_lives += 1
        self.has_lost_power |= self.fate == "power cut"
        durable: dict[int, int] = {}
        # Sorted, so that each file's fate depends on the seed alone.
        for source in sorted(path for path in before.rglob("*") if path.is_file()):
            target = self.folder / source.relative_to(before)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = source.read_bytes()
            num_durable = min(len(content), self._durable.get(source.stat().st_ino, 0))
            if self.fate == "power cut":
                content = self._surviving(source, content, num_durable)
                num_durable = len(content or b"")
            if content is not None:
                target.write_bytes(content)
                durable[target.stat().st_ino] = num_durable
        self._durable = durable
        self._abandon(before)

    def _surviving(self, path: Path, content: bytes, num_durable: int) -> bytes | None:
        """The content after a power cut. SQLite syncs by itself, except for its last commits, which
        are in a file of their own.
        """
        if path.name.endswith(REBUILT):
            return None
        if path.name.endswith(".sqlite-wal"):
            return content if self.rng.random() < 0.5 else None
        if path.suffix == ".sqlite":
            return content
        kept = bytearray(content[: self.rng.randint(num_durable, len(content))])
        if self.rng.random() < 0.3:
            start = self.rng.randint(num_durable, len(kept))
            kept[start:] = bytes(len(kept) - start)
        return bytes(kept)

    def _abandon(self, folder: Path) -> None:
        """Close the old process's files. Nothing that it writes matters any more."""
        with self.unharmed():
            if self.service is not None:
                self.deliver_nothing()
                with suppress(OSError, AssertionError):
                    self.service.run.close("")
            for handle in list(self._handles):
                with suppress(OSError):
                    os.close(handle)
        self._handles.clear()
        self.service = None
        shutil.rmtree(folder)

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """No crash within this block, and its writes are not counted."""
        fuses, self.fuses = self.fuses, []
        yield
        self.fuses = fuses

    def deliver_nothing(self) -> None:
        self.run.router.deliver = (  # pyright: ignore[reportAttributeAccessIssue]
            lambda identity, message: False
        )

    # The disk -------------------------------------------------------------------------------------

    def before_write(self) -> None:
        if not self.fuses:
            return
        if self.fuses[0] > 0:
            self.fuses[0] -= 1
            return
        del self.fuses[0]
        self.crash()
        raise KilledError

    def write(self, original: Any, disk: Disk, handle: int, data: Any) -> int:
        if handle not in self._handles:
            raise KilledError
        if self.fuses and self.fuses[0] == 0:
            original(disk, handle, bytes(data)[: len(data) // 2])
        self.before_write()
        return original(disk, handle, data)

    def sync(self, handle: int) -> None:
        self.before_write()
        status = os.fstat(handle)
        self._durable[status.st_ino] = status.st_size

    def open(self, original: Any, *args: Any) -> int:
        handle = original(*args)
        self._handles.add(handle)
        return handle

    def close_handle(self, original: Any, disk: Disk, handle: int) -> None:
        if handle in self._handles:  # not while a crash unwinds, as all are closed by then
            self._handles.discard(handle)
            original(disk, handle)


class _Inline:
    """An executor of one thread that is always done at once."""

    def __init__(self, *_: Any) -> None: ...

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args))
        except OSError as error:
            future.set_exception(error)
        return future

    def shutdown(self) -> None: ...


@contextmanager
def crashing(buffer: CrashingBuffer) -> Iterator[None]:
    """Have every write of buffers in this process go through `buffer`, and no socket be opened."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (service, run_state, engine_side, learner_side):
            patched.setattr(module, "time", buffer.clock)
        for name, stand_in in (
            ("Router", Connections),
            ("Publisher", Connections),
            ("ThreadPoolExecutor", _Inline),
        ):
            patched.setattr(run_state, name, stand_in)
        # They never change here, and to read them takes longer than all else.
        patched.setattr(settings, "changes", lambda folder, config: [])
        for name in SYNCED:
            patched.setattr(Disk, name, _after(buffer, getattr(Disk, name)))
        for name in ("create", "open"):
            original = getattr(Disk, name)
            patched.setattr(Disk, name, lambda *a, _o=original: buffer.open(_o, *a))
        write, close = Disk.write, Disk.close
        patched.setattr(Disk, "write", lambda *a: buffer.write(write, *a))
        patched.setattr(Disk, "close", lambda *a: buffer.close_handle(close, *a))
        patched.setattr(os, "fdatasync", buffer.sync)
        patched.setattr(os, "fsync", buffer.sync)
        for owner, name in (
            (run_files.RunFiles, "flush"),
            (journal.Journal, "_remember"),
        ):
            patched.setattr(owner, name, _after(buffer, getattr(owner, name)))
        for opens in (SegmentLog.open.__func__, TokenLog.open.__func__):
            patched.setitem(_defaults(opens), "clock", buffer.clock.monotonic)
        patched.setitem(_defaults(TokenLog.open.__func__), "segment_bytes", TOKEN_SEGMENT_BYTES)
        yield


def _defaults(function: Any) -> dict[str, Any]:
    return function.__kwdefaults__


def _after(buffer: CrashingBuffer, original: Any) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        buffer.before_write()
        return original(*args, **kwargs)

    return counted
