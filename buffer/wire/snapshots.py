"""Weight snapshots on their way from the learner to the actors: a small server, a folder, and
`fetch` for both.

Owns the newest two snapshots and their digests. Knows nothing of tensors. The learner publishes,
in a thread beside training; actors fetch, so that a slow link slows no other reader and a late
joiner simply takes the newest. An actor that holds the version before fetches only the difference.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket as sockets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, Union

import msgspec
import zmq

from buffer.wire import deltas
from buffer.wire.keys import secure_client
from buffer.wire.limits import PART_BYTES
from buffer.wire.messages import (
    FetchSnapshot,
    SnapshotChunk,
    SnapshotGone,
    SnapshotRef,
)
from buffer.wire.transport import (
    Router,
    TransportError,
    check_address,
    decoder,
    encode,
    open_socket,
)

CHUNK_BYTES = PART_BYTES // 2  # of a request, and served at most
CHUNKS_IN_FLIGHT = 8
REQUEST_BYTES = 1024
ASK_AGAIN_S = 3.0
NUM_KEPT = 2
LARGEST_DELTA = 0.5  # of a snapshot; a larger one saves too little to be kept
STRIDE_BYTES = 2**24  # hashed or written between two calls of `go_on`

Data = bytes | bytearray | memoryview
DataT = TypeVar("DataT", bound=Data)
_Answer = Union[SnapshotChunk, SnapshotGone]


class SnapshotGoneError(Exception):
    """The snapshot asked for is no longer kept.

    `newest` is the version that is (-1: unknown); take that one instead.
    """

    def __init__(self, version: int, newest: int, where: str) -> None:
        super().__init__(
            f"snapshot {version} is no longer kept at {where}; newest there: "
            f"{newest if newest >= 0 else 'unknown'}"
        )
        self.version, self.newest = version, newest


class _Kept(NamedTuple):
    """A snapshot that is served, and the delta from the one before it, if it has one."""

    data: memoryview
    delta: bytes
    digest: str


class SnapshotServer:
    """Serves the newest two published snapshots from memory, on a thread of its own.

    With `delta_width`, it also serves their differences, in words of so many bytes.
    """

    def __init__(self, address: str, keys: str = "", delta_width: int = 0) -> None:
        self._router = Router(address, {"engine": FetchSnapshot}, keys, "learner", REQUEST_BYTES)
        self.address = reachable(self._router.address)
        self._delta_width = delta_width
        self._kept: dict[int, _Kept] = {}
        self._served_bytes = 0
        self._lock = threading.Lock()  # around each use of these two
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="snapshot server", daemon=True)
        self._thread.start()

    def publish(
        self, version: int, data: Data, go_on: Callable[[], None] = lambda: None
    ) -> SnapshotRef:
        """Keep `data` as `version`, forgetting all but the one before it.

        `data` must not change until it is forgotten. `go_on` is called at short intervals; if it
        raises, nothing is published.
        """
        reference = _reference(version, data, go_on, address=self.address)
        kept = list(self._kept.items())[-(NUM_KEPT - 1) :]
        delta = b""
        if kept and self._delta_width:
            base = kept[-1][1]
            delta = deltas.encode(base.data, data, self._delta_width, go_on) or b""
            if 0 < len(delta) <= len(data) * LARGEST_DELTA:
                reference = msgspec.structs.replace(
                    reference, delta_bytes=len(delta), base_digest=base.digest
                )
            else:
                delta = b""
        newest = _Kept(memoryview(data), delta, reference.digest)
        with self._lock:
            self._kept = {**dict(kept), version: newest}
        return reference

    def take_served_bytes(self) -> int:
        """Bytes of snapshots and deltas that were sent since the last call."""
        with self._lock:
            served, self._served_bytes = self._served_bytes, 0
        return served

    def close(self) -> None:
        """May be called twice."""
        self._closing.set()
        self._thread.join()
        self._router.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            for peer, request in self._router.receive(0.1):
                if isinstance(request, FetchSnapshot):
                    self._router.send(peer, self._answer(request))
                else:
                    self._router.dismiss(peer)

    def _answer(self, request: FetchSnapshot) -> SnapshotChunk | SnapshotGone:
        with self._lock:
            kept = self._kept.get(request.version)
            if kept is None:
                newest = next(reversed(self._kept), -1)
                return SnapshotGone(version=request.version, newest=newest)
            start = max(0, request.offset)
            end = start + max(0, min(request.num_bytes, CHUNK_BYTES))
            part = bytes((kept.delta if request.delta else kept.data)[start:end])
            self._served_bytes += len(part)
        return SnapshotChunk(version=request.version, offset=request.offset, data=part)


def write_snapshot(
    folder: str | Path, version: int, data: Data, go_on: Callable[[], None] = lambda: None
) -> SnapshotRef:
    """Write `data` as `version` into `folder` so that it is there whole or not at all; keep it and
    the one before it.

    `go_on` is called at short intervals; if it raises, nothing is published.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"policy_{version:08d}.safetensors"
    reference = _reference(version, data, go_on, path=str(path))
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        for part in _parts(data, go_on):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    _sync_folder(folder)
    _prune(folder, version)
    return reference


def fetch(ref: SnapshotRef, keys: str = "", timeout_s: float = 60) -> bytes:
    """The snapshot's bytes, checked against size and digest.

    Raises SnapshotGoneError (a newer one has replaced it), TransportError (nothing came for
    `timeout_s`), ValueError (the bytes are not those that were published).
    """
    if ref.path:
        try:
            data = Path(ref.path).read_bytes()
        except FileNotFoundError as error:
            raise SnapshotGoneError(ref.version, -1, ref.path) from error
    else:
        data = _pull(ref, keys, timeout_s)
    return checked(ref, data)


def fetch_changed(ref: SnapshotRef, base: Data, keys: str = "", timeout_s: float = 60) -> Data:
    """The snapshot's bytes, made of `base` and the delta of `ref`, and checked like those of
    `fetch`, which it raises like.
    """
    data = bytearray(base)
    deltas.apply(_pull(ref, keys, timeout_s, delta=True), data)
    return checked(ref, data)


def checked(ref: SnapshotRef, data: DataT) -> DataT:
    """`data`, if it is the snapshot `ref`. Raises `ValueError` if it is not."""
    digest = hashlib.sha256(data).hexdigest()
    if len(data) != ref.num_bytes or digest != ref.digest:
        raise ValueError(
            f"snapshot {ref.version} from {ref.path or ref.address} is damaged: sha256 {digest} "
            f"over {len(data)} bytes, "
            f"published as {ref.digest} over {ref.num_bytes}; it was not loaded, fetch it again"
        )
    return data


def _pull(ref: SnapshotRef, keys: str, timeout_s: float, delta: bool = False) -> bytes:
    """Ask for chunks, a few at a time, until all are there; ask again for those whose answer is
    late.
    """
    check_address(ref.address, keys)
    context: zmq.Context[Any] = zmq.Context()
    try:
        socket = open_socket(context, zmq.DEALER, ref.address, 2 * PART_BYTES)
        secure_client(socket, keys, "engine", "learner")
        socket.connect(ref.address)
        return _pull_chunks(socket, ref, timeout_s, delta)
    finally:
        context.destroy(linger=0)


def _pull_chunks(
    socket: zmq.Socket[bytes], ref: SnapshotRef, timeout_s: float, delta: bool
) -> bytes:
    num_bytes = ref.delta_bytes if delta else ref.num_bytes
    missing = dict.fromkeys(
        range(0, num_bytes, CHUNK_BYTES), 0.0
    )  # offset -> when to ask (again); in order
    chunks: dict[int, bytes] = {}
    last_heard = time.monotonic()
    while missing:
        now = time.monotonic()
        for offset in list(missing)[:CHUNKS_IN_FLIGHT]:
            if now >= missing[offset]:
                missing[offset] = now + ASK_AGAIN_S
                request = FetchSnapshot(
                    version=ref.version,
                    offset=offset,
                    num_bytes=min(CHUNK_BYTES, num_bytes - offset),
                    delta=delta,
                )
                socket.send(encode(request))
        if not socket.poll(int(min(ASK_AGAIN_S, timeout_s) * 1000)):
            if time.monotonic() - last_heard >= timeout_s:
                raise TransportError(
                    f"no answer from the snapshot server at {ref.address} for {timeout_s:g} s "
                    f"({len(chunks)} of "
                    f"{len(chunks) + len(missing)} chunks of snapshot {ref.version} are here): see "
                    "whether the learner still runs, "
                    "whether this machine can reach weights.address, and whether both use the same "
                    "buffer.keys"
                )
            continue
        try:
            answer = decoder(_Answer).decode(socket.recv())
        except msgspec.MsgspecError as error:
            raise TransportError(
                f"what answers at {ref.address} is no snapshot server of this version ({error})"
            ) from error
        last_heard = time.monotonic()
        if isinstance(answer, SnapshotGone):
            raise SnapshotGoneError(ref.version, answer.newest, ref.address)
        if answer.version == ref.version and missing.pop(answer.offset, None) is not None:
            chunks[answer.offset] = answer.data
    return b"".join(chunks[offset] for offset in sorted(chunks))


def _parts(data: Data, go_on: Callable[[], None]) -> Iterator[memoryview]:
    """The parts of `data`, in order, with a call of `go_on` before each."""
    view = memoryview(data)
    for start in range(0, len(view), STRIDE_BYTES):
        go_on()
        yield view[start : start + STRIDE_BYTES]


def _reference(
    version: int, data: Data, go_on: Callable[[], None], address: str = "", path: str = ""
) -> SnapshotRef:
    digest = hashlib.sha256()
    for part in _parts(data, go_on):
        digest.update(part)
    return SnapshotRef(
        version=version,
        digest=digest.hexdigest(),
        num_bytes=len(data),
        address=address,
        path=path,
    )


def reachable(address: str) -> str:
    """The endpoint as other machines reach it: a wildcard host becomes this machine's outward
    address.
    """
    host, _, port = address.rpartition(":")
    if host != "tcp://0.0.0.0":
        return address
    with sockets.socket(sockets.AF_INET, sockets.SOCK_DGRAM) as probe:
        try:
            probe.connect(
                ("192.0.2.1", 9)
            )  # sends nothing: only asks which interface leads outward
        except OSError:
            return f"tcp://{sockets.gethostname()}:{port}"
        return f"tcp://{probe.getsockname()[0]}:{port}"


def _prune(folder: Path, version: int) -> None:
    """Keep `version` and the newest older one.

    Newer ones belong to a run that was resumed from before them.
    """
    found = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := re.fullmatch(r"policy_(\d{8,})\.safetensors", path.name))
    }
    keep = [
        version,
        *sorted((other for other in found if other < version), reverse=True)[: NUM_KEPT - 1],
    ]
    for other, path in found.items():
        if other not in keep:
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
