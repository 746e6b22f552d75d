"""One copy of a snapshot per node: who gets it, who does not, and what a failed fetch says."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from actors.inference import node_copies
from actors.inference.node_copies import BEAT, COPY, FAILED, NodeCopies
from actors.inference.sealed import SealedFile
from buffer.wire.messages import SnapshotRef
from buffer.wire.transport import TransportError

DATA = bytes(range(256)) * 4096


def reference(data: bytes = DATA, version: int = 0) -> SnapshotRef:
    digest = hashlib.sha256(data).hexdigest()
    address = f"tcp://127.0.0.1:{os.getpid()}"  # no other test on this machine has the same
    return SnapshotRef(
        version=version, digest=digest, num_bytes=len(data), address=address, path=""
    )


def never() -> bytes:
    raise AssertionError("this engine must not fetch")


@pytest.fixture
def engines() -> Iterator[Callable[[], NodeCopies]]:
    """A function that makes an engine's copies, all closed at the end."""
    made: list[NodeCopies] = []

    def make() -> NodeCopies:
        made.append(NodeCopies())
        return made[-1]

    yield make
    for one in made:
        one.close()


def asking(ref: SnapshotRef, says: bytes) -> socket.socket:
    """The socket of a process that asks for a copy."""
    asks = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asks.settimeout(30)
    asks.connect(node_copies._name(ref, 0))
    asks.send(says)
    return asks


def test_the_second_engine_takes_the_copy_of_the_first(engines: Callable[[], NodeCopies]) -> None:
    ref, first, second = reference(), engines(), engines()
    one = first.get(ref, lambda: DATA)
    other = second.get(ref, never)
    assert one.data == other.data == DATA
    assert os.fstat(one.fileno()).st_ino == os.fstat(other.fileno()).st_ino
    assert Path(other.path).read_bytes() == DATA


def test_a_copy_outlives_its_offer_and_the_next_one_withdraws_it(
    engines: Callable[[], NodeCopies],
) -> None:
    ref, first, second = reference(), engines(), engines()
    copy = first.get(ref, lambda: DATA)
    first.get(reference(version=1), lambda: DATA)
    assert copy.data == DATA
    fetched = list[str]()
    second.get(ref, lambda: fetched.append("") or DATA)
    assert len(fetched) == 1


def test_an_offer_ends_after_its_time() -> None:
    ref, first = reference(), NodeCopies(hold_s=0)
    first.get(ref, lambda: DATA)
    assert first._offer is not None
    first._offer._thread.join(30)
    assert not first._offer._thread.is_alive() and first._offer._copy is None
    fetched = list[str]()
    second = NodeCopies()
    second.get(ref, lambda: fetched.append("") or DATA)
    assert len(fetched) == 1
    first.close()
    second.close()


def test_a_copy_cannot_be_changed_and_is_for_this_user_alone(
    engines: Callable[[], NodeCopies],
) -> None:
    copy = engines().get(reference(), lambda: DATA)
    assert stat.S_IMODE(os.fstat(copy.fileno()).st_mode) == 0o600
    with pytest.raises(PermissionError):
        os.write(copy.fileno(), b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(copy.fileno(), 0)
    with pytest.raises(TypeError):
        copy.data[0] = 1


def test_a_process_that_does_not_know_the_digest_gets_nothing(
    engines: Callable[[], NodeCopies],
) -> None:
    ref = reference()
    engines().get(ref, lambda: DATA)
    for says in (b"0" * 64, b"", ref.digest.encode()[:-1]):
        with asking(ref, says) as stranger:
            assert socket.recv_fds(stranger, 100, 1)[:2] == (b"", [])
    with asking(ref, ref.digest.encode()) as peer:
        said, handles, _, _ = socket.recv_fds(peer, 100, 1)
        assert said == COPY
        os.close(handles[0])


def test_processes_of_another_user_neither_give_nor_get(
    engines: Callable[[], NodeCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, fetched = reference(), list[str]()
    engines().get(ref, lambda: DATA)
    monkeypatch.setattr(node_copies, "_uid", lambda _: os.getuid() + 1)
    with suppress(ConnectionError), asking(ref, ref.digest.encode()) as stranger:
        assert socket.recv_fds(stranger, 100, 1)[:2] == (b"", [])
    copy = engines().get(ref, lambda: fetched.append("") or DATA)
    assert copy.data == DATA and len(fetched) == 1


def test_those_who_wait_are_told_why_a_fetch_failed(engines: Callable[[], NodeCopies]) -> None:
    """Each would otherwise wait for the learner's silence in turn."""
    ref, began, go = reference(), threading.Event(), threading.Event()
    errors: list[TransportError] = []

    def fetch() -> bytes:
        began.set()
        assert go.wait(60)
        raise TransportError("no answer from the learner")

    first = engines()

    def run() -> None:
        with pytest.raises(TransportError) as raised:
            first.get(ref, fetch)
        errors.append(raised.value)

    thread = threading.Thread(target=run)
    thread.start()
    assert began.wait(60)
    with asking(ref, ref.digest.encode()) as peer:
        assert peer.recv(100) == BEAT
        go.set()
        while (said := peer.recv(100)) == BEAT:
            continue
        assert said == FAILED + b"no answer from the learner"
        assert peer.recv(100) == b""
    thread.join()
    assert len(errors) == 1
    assert engines().get(ref, lambda: DATA).data == DATA  # and the name is free again


def test_an_engine_that_waits_raises_the_failure(engines: Callable[[], NodeCopies]) -> None:
    with _Holder(reference(), FAILED + b"why"), pytest.raises(TransportError, match="^why$"):
        engines().get(reference(), never)


def test_other_bytes_and_files_that_may_change_are_not_believed(tmp_path: Path) -> None:
    ref = reference()
    (tmp_path / "weights").write_bytes(DATA)
    open_file = os.open(tmp_path / "weights", os.O_RDWR)
    unsealed = os.memfd_create("unsealed")
    os.write(unsealed, DATA)
    wrong = SealedFile.of(DATA[:-1] + b"x")
    short = SealedFile.of(DATA[:-1])
    for handle in (open_file, unsealed, wrong.fileno(), short.fileno()):
        fetched, engine = list[str](), NodeCopies()
        with _Holder(ref, COPY, handle):
            copy = engine.get(ref, lambda found=fetched: found.append("") or DATA)
        engine.close()
        assert copy.data == DATA and len(fetched) == 1
    os.close(open_file)
    os.close(unsealed)


def test_a_holder_that_ends_is_replaced(engines: Callable[[], NodeCopies]) -> None:
    with _Holder(reference(), BEAT):
        assert engines().get(reference(), lambda: DATA).data == DATA


class _Holder:
    """A process that has the name of `ref`, answers one engine, and ends."""

    def __init__(self, ref: SnapshotRef, says: bytes, handle: int | None = None) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(node_copies._name(ref, 0))
        self._listener.listen()
        self._listener.settimeout(10)  # if nobody asks, the test fails
        self._says, self._handle = says, handle
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        asking, _ = self._listener.accept()
        with asking:
            asking.recv(100)
            handles = [] if self._handle is None else [self._handle]
            socket.send_fds(asking, [self._says], handles)
            self._listener.close()

    def __enter__(self) -> _Holder:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.join()
