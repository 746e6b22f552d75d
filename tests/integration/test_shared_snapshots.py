"""Engines of one node in processes of their own: a snapshot is fetched once, whatever is killed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import pytest

from actors.inference import node_copies
from buffer.processes.child import python_path
from buffer.wire.messages import FetchSnapshot, SnapshotRef
from buffer.wire.snapshots import SnapshotServer, write_snapshot

pytestmark = pytest.mark.timeout(180)
# Reads one reference after another, prints the digest of what it has read, and then has it on
# offer for the others until its input ends.
ENGINE = """
import hashlib, sys
import msgspec
from actors.inference import node_copies
from actors.inference.fetching import SnapshotReader
from buffer.wire.messages import SnapshotRef
from configs import cli
node_copies.SILENT_S = float(sys.argv[1])
read = SnapshotReader(cli.load(["weights.deltas=" + sys.argv[2]]))
print("ready", flush=True)
for line in sys.stdin:
    data = read(msgspec.json.decode(line, type=SnapshotRef)).data
    print(hashlib.sha256(data).hexdigest(), flush=True)
"""
DATA = os.urandom(3_000_000)  # several chunks


class Server(SnapshotServer):
    """Counts the chunks by engine, and pauses after the first one of version `paused_at`."""

    def __init__(self, paused_at: int = -1) -> None:
        self.chunks: Counter[tuple[bytes, bool]] = Counter()  # by engine, and whether of a delta
        self.paused = threading.Event()
        self.go = threading.Event()
        self._paused_at = paused_at
        super().__init__("tcp://127.0.0.1:*", delta_width=2)

    def _serve(self) -> None:
        while not self._closing.is_set():
            for peer, request in self._router.receive(0.1):
                assert isinstance(request, FetchSnapshot)
                self._router.send(peer, self._answer(request))
                self.chunks[peer, request.delta] += 1
                if request.version == self._paused_at and not self.paused.is_set():
                    self.paused.set()
                    self.go.wait()

    def engines_served(self) -> set[tuple[bytes, bool]]:
        return set(self.chunks)


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """A function that starts an engine's process, which is ready."""
    with ExitStack() as opened:

        def start(silent_s: float = 60, deltas: bool = False) -> subprocess.Popen[str]:
            engine = subprocess.Popen(
                [sys.executable, "-c", ENGINE, str(silent_s), str(deltas)],
                env={**os.environ, **python_path()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            opened.callback(end, engine)
            assert engine.stdout is not None and engine.stdout.readline() == "ready\n"
            return engine

        yield start


def end(engine: subprocess.Popen[str]) -> None:
    engine.kill()
    with suppress(BrokenPipeError):
        engine.communicate()


def tell(engine: subprocess.Popen[str], ref: SnapshotRef) -> None:
    assert engine.stdin is not None
    engine.stdin.write(msgspec.json.encode(ref).decode() + "\n")
    engine.stdin.flush()


def digest(engine: subprocess.Popen[str]) -> str:
    assert engine.stdout is not None
    return engine.stdout.readline().strip()


def unread(pipe: int) -> int:
    """Bytes that nobody has read yet."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), "little")


def names_in_use(ref: SnapshotRef) -> list[str]:
    """The names of `ref` that processes of this machine have bound."""
    bound = Path("/proc/net/unix").read_text()
    names = (node_copies._name(ref, number) for number in range(node_copies.NUM_NAMES))
    return [name[1:].decode() for name in names if f"@{name[1:].decode()}" in bound]


def test_one_engine_fetches_and_all_get_it(start: Start) -> None:
    with Server() as server:
        ref = server.publish(0, DATA)
        engines = [start() for _ in range(3)]
        for engine in engines:
            tell(engine, ref)
        assert [digest(engine) for engine in engines] == [ref.digest] * 3
        assert len(server.engines_served()) == 1
        assert len(names_in_use(ref)) == 1
        for engine in engines:
            end(engine)
        assert names_in_use(ref) == []


def test_another_engine_takes_over_from_one_that_is_killed_in_mid_fetch(start: Start) -> None:
    with Server(paused_at=0) as server:
        ref = server.publish(0, DATA)
        victim, *others = [start() for _ in range(4)]
        tell(victim, ref)
        assert server.paused.wait(60)
        (killed,) = server.engines_served()
        for engine in others:
            tell(engine, ref)
        victim.kill()
        victim.wait()
        server.go.set()
        assert [digest(engine) for engine in others] == [ref.digest] * 3
        assert server.engines_served() - {killed} and len(server.engines_served()) == 2


def test_others_take_over_from_one_that_is_stopped_in_mid_fetch(start: Start) -> None:
    with Server(paused_at=0) as server:
        ref = server.publish(0, DATA)
        stopped, *others = [start(silent_s=1) for _ in range(3)]
        tell(stopped, ref)
        assert server.paused.wait(60)
        stopped.send_signal(signal.SIGSTOP)
        server.go.set()
        for engine in others:
            tell(engine, ref)
        assert [digest(engine) for engine in others] == [ref.digest] * 2
        stopped.send_signal(signal.SIGCONT)
        assert digest(stopped) == ref.digest


def test_a_difference_is_fetched_once_and_applied_once(start: Start) -> None:
    changed = bytearray(DATA)
    changed[5000] ^= 1
    with Server() as server:
        engines = [start(deltas=True) for _ in range(3)]

        def read_by_all(version: int, data: bytes) -> SnapshotRef:
            server.chunks.clear()
            ref = server.publish(version, data)
            for engine in engines:
                tell(engine, ref)
            assert [digest(engine) for engine in engines] == [ref.digest] * 3
            return ref

        read_by_all(0, DATA)
        ref = read_by_all(1, bytes(changed))
        assert [delta for _, delta in server.engines_served()] == [True]
        fresh = start(deltas=True)  # as after a restart: it lacks the version before
        tell(fresh, ref)
        assert digest(fresh) == ref.digest
        assert len(server.engines_served()) == 1


def test_a_file_is_read_once_and_by_another_if_its_reader_is_killed(
    start: Start, tmp_path: Path
) -> None:
    """The file is a pipe here, which shows each process that opens it."""
    written = write_snapshot(tmp_path, 0, DATA)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    ref = msgspec.structs.replace(written, path=str(path))
    victim, *others = [start() for _ in range(3)]
    tell(victim, ref)
    pipe = os.open(path, os.O_RDWR)
    os.write(pipe, DATA[:1000])
    deadline = time.monotonic() + 60
    while unread(pipe):  # until the victim is in mid-fetch
        assert time.monotonic() < deadline
    for engine in others:
        tell(engine, ref)
    victim.kill()
    victim.wait()
    with os.fdopen(pipe, "wb") as rest:
        rest.write(DATA)  # more than a pipe holds, so it ends only once another engine reads
    assert [digest(engine) for engine in others] == [ref.digest] * 2
    with pytest.raises(OSError, match="No such device"):  # nobody reads it
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)


def test_a_copy_is_in_no_folder(start: Start) -> None:
    """So nothing is left in /dev/shm, whatever is killed."""
    with Server() as server:
        ref = server.publish(0, DATA)
        engines = [start() for _ in range(2)]
        for engine in engines:
            tell(engine, ref)
            assert digest(engine) == ref.digest
        for engine in engines:
            maps = Path(f"/proc/{engine.pid}/maps").read_text()
            assert "/memfd:snapshot (deleted)" in maps and "/dev/shm/" not in maps
