"""One fetch of each snapshot per node: the first engine fetches, the others take its copy.

Owns a name on this node for each snapshot that this process fetches, and the copy behind it for as
long as it is offered. Never fetches itself, and never loads anything. Driven by
`actors.inference.fetching`, from one thread at a time.

The name is that of a Unix socket in the abstract namespace, which is in no folder: only one process
can bind it, and the kernel frees it when that process ends. So it is the lock as well, and nothing
is left of it or of the copy, whatever is killed. An engine that finds the name taken waits there:

    it asks      the snapshot's digest, which only the peers of the run know
    it gets      BEAT every BEAT_S, while the other one fetches
    and then     COPY with the file's handle, or FAILED with the reason; or the connection ends

If the connection ends, the engine tries to bind the name itself. If it hears nothing for SILENT_S,
as from a process that is stopped, it tries a second name (and then a third); after that it fetches
for itself alone. Both sides check that the other one belongs to the same user. Names are hashes, so
nothing in a reference to a snapshot becomes a path.
"""

from __future__ import annotations

import errno
import hashlib
import os
import selectors
import socket as sockets
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto

from actors.inference.sealed import SealedFile
from buffer.wire.messages import SnapshotRef
from buffer.wire.snapshots import Data, checked
from buffer.wire.transport import TransportError

BEAT_S = 1.0
SILENT_S = 15.0  # several beats, even on a busy machine
HOLD_S = 60.0  # during which a copy is offered, unless the process holds it anyway
NUM_NAMES = 3
RETRY_S = 0.02
BEAT, COPY, FAILED = b".", b"c", b"!"
MESSAGE_BYTES = 1024
CREDENTIALS = struct.Struct("iII")  # pid, uid, gid


class _Answer(Enum):
    ENDED = auto()  # the other process was there, and has ended or could not fetch
    NONE = auto()  # no process answers at the name, yet or any more
    SILENT = auto()  # it says nothing, or must not be believed


class NodeCopies:
    """The snapshots of this process and of the others on its node."""

    def __init__(self, hold_s: float = HOLD_S) -> None:
        self._hold_s = hold_s
        self._offer: _Offer | None = None

    def get(self, ref: SnapshotRef, fetch: Callable[[], Data]) -> SealedFile:
        """The snapshot `ref`, checked against its digest, from another process or by `fetch`.

        The copy that was offered before is withdrawn. Raises the errors of `fetch`, and the
        `TransportError` of another process's fetch.
        """
        self.close()
        for number in range(NUM_NAMES):
            name = _name(ref, number)
            heard = time.monotonic()
            while time.monotonic() - heard < SILENT_S:
                offer = _Offer.bound(name, ref.digest)
                if offer is not None:
                    self._offer = offer
                    return _fetched(offer, fetch, self._hold_s)
                answer = _ask(name, ref)
                if isinstance(answer, SealedFile):
                    return answer
                if answer is _Answer.SILENT:
                    break
                if answer is _Answer.ENDED:
                    heard = time.monotonic()
                time.sleep(RETRY_S)  # the name is being freed, or not yet listened to
        return SealedFile.of(fetch())

    def close(self) -> None:
        """Withdraw the copy that is offered. May be called twice."""
        if self._offer is not None:
            self._offer.close()
            self._offer = None


def _fetched(offer: _Offer, fetch: Callable[[], Data], hold_s: float) -> SealedFile:
    try:
        copy = SealedFile.of(fetch())
    except TransportError as error:
        offer.fail(str(error))
        raise
    except BaseException:  # the others find out by themselves
        offer.close()
        raise
    offer.give(copy, hold_s)
    return copy


class _Offer:
    """A bound name, and a thread that answers the processes that ask there."""

    def __init__(self, listener: sockets.socket, secret: str) -> None:
        self._listener, self._secret = listener, secret.encode()
        self._copy: SealedFile | None = None
        self._failure = ""
        self._until = float("inf")
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()  # around the use of `_wake`, which the thread closes
        self._thread = threading.Thread(target=self._serve, name="node copies", daemon=True)
        self._thread.start()

    @classmethod
    def bound(cls, name: bytes, secret: str) -> _Offer | None:
        """None if another process has the name."""
        listener = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
        try:
            listener.bind(name)
            listener.listen(sockets.SOMAXCONN)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                return None
            raise
        return cls(listener, secret)

    def give(self, copy: SealedFile, hold_s: float) -> None:
        """Answer with `copy` from now on, for `hold_s`."""
        self._copy, self._until = copy, time.monotonic() + hold_s
        self._notify()

    def fail(self, reason: str) -> None:
        """Tell those who wait why there is no copy, and free the name."""
        self._failure = reason
        self.close()

    def close(self) -> None:
        self._closing = True
        self._notify()
        self._thread.join()

    def _notify(self) -> None:
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _serve(self) -> None:
        waiting: set[sockets.socket] = set()  # those that have asked
        silent: set[sockets.socket] = set()
        with self._listener, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._closing and time.monotonic() < self._until:
                for key, _ in selector.select(BEAT_S):
                    if key.fileobj is self._listener:
                        if (asking := self._accept()) is not None:
                            selector.register(asking, selectors.EVENT_READ)
                            silent.add(asking)
                    elif isinstance(key.fileobj, sockets.socket):
                        selector.unregister(key.fileobj)
                        silent.discard(key.fileobj)
                        if self._is_peer(key.fileobj):
                            waiting.add(key.fileobj)
                        else:
                            key.fileobj.close()
                    else:
                        os.eventfd_read(self._wake)
                waiting = {socket for socket in waiting if self._answered(socket)}
            for socket in waiting | silent:
                with suppress(OSError):  # it has gone
                    if self._failure:
                        socket.send(FAILED + self._failure.encode()[: MESSAGE_BYTES - 1])
                socket.close()
        self._copy = None
        with self._lock:
            os.close(self._wake)
            self._wake = -1

    def _accept(self) -> sockets.socket | None:
        try:
            socket, _ = self._listener.accept()
        except OSError:
            return None  # it has gone already
        if _uid(socket) != os.getuid():
            socket.close()
            return None
        socket.setblocking(False)
        return socket

    def _is_peer(self, socket: sockets.socket) -> bool:
        """Whether it has said the digest."""
        try:
            return socket.recv(MESSAGE_BYTES) == self._secret
        except OSError:
            return False

    def _answered(self, socket: sockets.socket) -> bool:
        """Send what there is to say. Whether it has to wait on."""
        copy = self._copy
        try:
            if copy is not None:
                sockets.send_fds(socket, [COPY], [copy.fileno()])
            else:
                socket.send(BEAT)
                return True
        except OSError:  # it has gone, or reads nothing
            pass
        socket.close()
        return False


def _ask(name: bytes, ref: SnapshotRef) -> SealedFile | _Answer:
    """Wait for the copy of the process that has the name. Raises its `TransportError`."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET) as socket:
        socket.settimeout(SILENT_S)
        ended = _Answer.NONE
        try:
            socket.connect(name)
            if _uid(socket) != os.getuid():
                return _Answer.SILENT
            socket.send(ref.digest.encode())
            while True:
                message, handles, _, _ = sockets.recv_fds(
                    socket, MESSAGE_BYTES, 1, sockets.MSG_CMSG_CLOEXEC
                )
                if message != BEAT:
                    break
                ended = _Answer.ENDED
        except TimeoutError:
            return _Answer.SILENT
        except OSError:
            return ended
    if message[:1] == FAILED:
        raise TransportError(message[1:].decode(errors="replace"))
    if not handles:
        return ended
    try:
        copy = SealedFile(handles[0])
        checked(ref, copy.data)
    except ValueError:
        return _Answer.SILENT
    return copy


def _uid(socket: sockets.socket) -> int:
    """The user of the process at the other end, from the kernel."""
    found = socket.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, CREDENTIALS.size)
    return CREDENTIALS.unpack(found)[1]


def _name(ref: SnapshotRef, number: int) -> bytes:
    """In the abstract namespace. The address or path belongs to one run."""
    parts = (os.getuid(), ref.address, ref.path, ref.version, ref.digest, ref.num_bytes, number)
    return b"\0darts-" + hashlib.sha256(repr(parts).encode()).hexdigest()[:40].encode()
