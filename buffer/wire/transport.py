"""Sockets of the serving side: ROUTER and PUB, their framing, and the options of every socket.

Owns the rules that keep messages safe: nothing is unpickled, garbage is counted and never raises,
no peer has more than its share, and nothing is lost or reordered at a high-water mark. Knows
messages only as msgspec types, and decides nothing. Driven by the buffer's service and the snapshot
server; `client.py` and `snapshots.py` use the helpers of the connecting side.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self, Union

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from buffer.wire.connections import Connection, Connections
from buffer.wire.credit import Receipts
from buffer.wire.keys import role_of, secure_server
from buffer.wire.limits import (
    FAREWELL_S,
    MESSAGE_BYTES,
    OPENING_BYTES,
    OPENING_S,
    PART_BYTES,
    QUEUED_BYTES,
    SUBSCRIBER_BYTES,
    TOTAL_QUEUED_BYTES,
)
from buffer.wire.messages import (
    EngineHello,
    FetchSnapshot,
    LearnerHello,
    Message,
    Part,
    Received,
    Role,
)

# Taken at once, so that a flood cannot keep the service from its clock, nor fill its memory.
MAX_PER_RECEIVE, MAX_BYTES_PER_RECEIVE, MAX_S_PER_RECEIVE = 1000, 4 << 20, 0.05
QUEUE_MESSAGES = 64  # zmq's queue per peer and direction, of messages up to a part's size
SUBSCRIPTION_BYTES = 1024
MAX_REMEMBERED = 1000  # names of peers that have ended
LINGER_MS = 2000
BACKLOG_RETRY_S = 0.01

HELLOS = (EngineHello, LearnerHello)
OPENINGS = (*HELLOS, FetchSnapshot)  # with these a connection shows its purpose
# libzmq's option, unnamed in pyzmq. If set, a message of 40 bytes can keep 18 kB of memory.
ZERO_COPY_RECV = 10
IN_PROCESS = -1  # instead of a descriptor: there is no connection
CURVE_BYTES = 33  # of a message on an encrypted connection, beside its content
# Numbers, since pyzmq's flags are enumerations, and to combine those takes as long as to send.
NOBLOCK, SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)

encode = msgspec.msgpack.Encoder().encode


@cache
def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """A decoder for a message type or a union of them: refuses unknown tags, unknown fields and
    wrong types.
    """
    return msgspec.msgpack.Decoder(kind)


@dataclass(frozen=True, slots=True)
class Violation:
    """Received in place of a message that its type does not allow, or that is no message at all."""

    error: str


class TransportError(Exception):
    """The network, or the other side, failed: one line that names the address, the event, and the
    fix.
    """


# Addresses ----------------------------------------------------------------------------------------


def _split_tcp(address: str) -> tuple[str, str]:
    """("host", "port") of a tcp address; raises `ValueError` if it is none."""
    match = re.fullmatch(r"tcp://(\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]]+):(\*|\d{1,5})", address)
    if match is None or (match[2] != "*" and not 1 <= int(match[2]) <= 65535):
        raise ValueError(
            f"address {address!r}: expected tcp://HOST:PORT (PORT 1..65535, or * to bind a free "
            "one), ipc://PATH or inproc://NAME"
        )
    return match[1].strip("[]"), match[2]


def is_loopback(address: str) -> bool:
    """Whether no other machine can reach it."""
    if address.startswith(("ipc://", "inproc://")) and len(address.split("://", 1)[1]) > 0:
        return True
    host, _ = _split_tcp(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, an interface, or *


def check_address(address: str, keys: str) -> None:
    """Refuse a malformed address, and one beyond this machine without CURVE keys, with a
    `ValueError` that names the fix.
    """
    if not is_loopback(address) and not keys:
        raise ValueError(
            f"address {address!r} is reachable from other machines, so CURVE keys are required: "
            "run `python -m tools.keys FOLDER` and set buffer.keys=FOLDER, or use a loopback "
            "address such as tcp://127.0.0.1:5577"
        )


def next_port(address: str) -> str:
    """The publisher's endpoint for a router's resolved endpoint: the next port, or `.pub` appended
    for ipc and inproc.
    """
    if not address.startswith("tcp://"):
        return address + ".pub"
    _, port = _split_tcp(address)
    if port == "*" or int(port) == 65535:
        raise ValueError(
            f"address {address!r} has no next port to publish statistics on: name a port between 1 "
            "and 65534"
        )
    return f"{address.rpartition(':')[0]}:{int(port) + 1}"


# Sockets ------------------------------------------------------------------------------------------


def open_socket(
    context: zmq.Context[Any], kind: int, address: str, max_frame_bytes: int
) -> zmq.Socket[bytes]:
    """A socket with the options that all of ours share: bounded queues and frames, and keepalive
    against half-open connections.

    Without zmq's heartbeats: links have their own, and a PING can end a server's process (see
    `_Server`).
    """
    socket = context.socket(kind)
    socket.linger = LINGER_MS
    socket.sndhwm = socket.rcvhwm = QUEUE_MESSAGES
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    socket.setsockopt(zmq.RECONNECT_IVL, 200)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    if address.startswith("tcp://["):
        socket.setsockopt(zmq.IPV6, 1)
    return socket


def _bind(socket: zmq.Socket[bytes], address: str) -> str:
    """Bind, and return the resolved endpoint."""
    try:
        socket.bind(
            address.replace("tcp://localhost:", "tcp://127.0.0.1:")
        )  # zmq binds numbers and interfaces, not names
    except zmq.ZMQError as error:
        why = {
            errno.EADDRINUSE: "is in use: another run listens there, or has just ended; "
            "stop it, or choose another address",
            errno.EADDRNOTAVAIL: "is no address of this machine; "
            "choose one of its own, or 127.0.0.1",
            errno.ENODEV: "names no interface of this machine; choose one of its own, or 127.0.0.1",
            errno.EACCES: "may not be bound by this user; choose a port above 1023",
        }.get(error.errno or 0, f"cannot be bound: {error.strerror}; choose another address")
        raise TransportError(f"address {address} {why}") from error
    return socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]


class _Server:
    """A bound socket with its own context, so that closing it closes everything it started."""

    def __init__(
        self,
        kind: int,
        address: str,
        keys: str,
        role: Role,
        admitted: Collection[Role],
        max_message_bytes: int,
        opening_s: float,
        opening_bytes: int,
    ) -> None:
        check_address(address, keys)
        self._context: zmq.Context[Any] = zmq.Context()
        self._context.set(ZERO_COPY_RECV, 0)
        self._socket = open_socket(self._context, kind, address, max_message_bytes)
        # libzmq 4.3.5 aborts if a peer whose queue is full sends a PING and breaks its connection
        # ("!_io_error"). A queue without a limit is never full, and `limits` bounds it instead.
        self._socket.rcvhwm = 0
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, int(OPENING_S * 1000))
        self._authenticator: ThreadAuthenticator | None = None
        self._connections: Connections | None = None
        try:
            self._configure(self._socket)
            self._authenticator = secure_server(self._context, self._socket, keys, role, admitted)
            self._connections = Connections(self._socket, opening_s, opening_bytes)
            self.address = _bind(self._socket, address)
        except BaseException:
            self.close()
            raise

    def _configure(self, socket: zmq.Socket[bytes]) -> None:
        """Options of the kind of socket, set before it is bound."""

    def close(self) -> None:
        """Give sent messages up to two seconds to leave, then close. May be called twice."""
        if self._context.closed:
            return
        if self._connections is not None:
            self._connections.close()
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Queue:
    """Frames that wait for one peer, and their bytes."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.num_bytes = 0

    def append(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.num_bytes += len(frame)

    def popleft(self) -> None:
        self.num_bytes -= len(self.frames.popleft())


@dataclass(slots=True)
class _Met:
    """A peer of which a message was read. `receipts`: if it is told so, once it has said hello."""

    connection: Connection | None  # None within one process
    has_opened: bool = False
    receipts: Receipts | None = None

    def note_read(self, peer: bytes, num_bytes: int) -> bool:
        """Whether so many bytes of its messages were read by the connection that is there."""
        if self.connection is None or self.connection.identity != peer:
            return False
        self.connection.num_read += num_bytes
        return True


class Router(_Server):
    """Receives from many peers and sends to each by name. Used by one thread at a time.

    A peer is known by the identity that its socket announces. Its hello begins its stream again:
    messages still kept for an earlier stream under the same identity are forgotten. `speakers` says
    which messages each role may send; without keys, every peer may send them all. A peer that sends
    or leaves unread more than `limits` allow is a violation in `receive`. Nothing is read of a peer
    that said hello after its first violation, or of any after `dismiss`; of a stranger, only the
    first violation is handed over.
    """

    def __init__(
        self,
        address: str,
        speakers: Mapping[Role, Any],
        keys: str = "",
        role: Role = "buffer",
        max_message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        self.num_rejected = 0
        self._decoders = {one: decoder(kind).decode for one, kind in speakers.items()}
        anyone = decoder(Union[tuple(speakers.values())]).decode
        self._decoders_without_keys = anyone
        self._has_keys = bool(keys)
        self._queues: dict[bytes, _Queue] = {}
        self._num_queued_bytes = 0
        self._lost: set[bytes] = set()
        self._overdue: list[tuple[bytes, Violation]] = []
        self._met: dict[bytes, _Met] = {}  # peers whose connections are there
        self._receipts: dict[bytes, int] = {}  # peer -> its bytes that were read, to be told
        self._ended: set[bytes] = set()  # peers of whom no more is read, although some may be there
        self._refused: set[bytes] = set()  # strangers whose first violation was handed over
        super().__init__(
            zmq.ROUTER,
            address,
            keys,
            role,
            speakers.keys(),
            max_message_bytes,
            OPENING_S,
            OPENING_BYTES,
        )

    def _configure(self, socket: zmq.Socket[bytes]) -> None:
        # Without MANDATORY a ROUTER silently drops messages beyond a peer's queue; with it, send()
        # says so and we keep it.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)

    def close(self) -> None:
        """Give sent messages up to two seconds to leave, then close. May be called twice."""
        deadline = time.monotonic() + LINGER_MS / 1000
        while self._queues and time.monotonic() < deadline:
            self._flush()
            time.sleep(BACKLOG_RETRY_S)
        super().close()

    # Receiving

    def receive(self, timeout_s: float) -> list[tuple[bytes, Message | Violation]]:
        """(peer, message) pairs, in order of arrival: waits up to `timeout_s` for the first, then
        takes those already there.

        Messages that do not decode are violations, and counted in `num_rejected`. Larger ones than
        `max_message_bytes` never get here: zmq closes the connection that sends them.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._flush()
            self._forget_ended()
            received: list[tuple[bytes, Message | Violation]] = [*self._overdue]
            self._overdue.clear()
            wait_s = 0.0 if received else max(0.0, deadline - time.monotonic())
            if self._queues:  # a ROUTER cannot tell when one peer's queue has room again
                wait_s = min(wait_s, BACKLOG_RETRY_S)
            self._socket.poll(int(wait_s * 1000 + 0.999))
            received += self._drain()
            if received or time.monotonic() >= deadline:
                return received

    def _forget_ended(self) -> None:
        """Note the connections that have ended, of which some were reset for sending too much."""
        assert self._connections is not None
        while self._connections.ended:
            connection = self._connections.ended.popleft()
            peer, met = connection.identity, self._met.get(connection.identity)
            if met is None or met.connection is not connection:
                continue
            del self._met[peer]
            if connection.floods and peer not in self._ended:
                self._end(peer)
                error = f"more than {connection.most_unread} bytes of it wait to be read"
                self._overdue.append((peer, Violation(error)))

    def _drain(self) -> list[tuple[bytes, Message | Violation]]:
        received: list[tuple[bytes, Message | Violation]] = []
        num_bytes, num_left_bytes, all_read = 0, 0, False
        until_s = time.monotonic() + MAX_S_PER_RECEIVE
        while len(received) < MAX_PER_RECEIVE and num_bytes < MAX_BYTES_PER_RECEIVE:
            try:
                peer = self._socket.recv(NOBLOCK)
            except zmq.Again:
                all_read = True
                break
            frames = [self._socket.recv(copy=False)]
            while frames[-1].more:
                frames.append(self._socket.recv(copy=False))
            size = self._size(frames)
            num_bytes += size
            met = self._met.get(peer) or self._meet(peer, frames[-1])
            if met is None or not met.note_read(peer, size):
                num_left_bytes += size
            message = None if peer in self._ended else self._message(peer, met, frames)
            if message is not None:
                received.append((peer, message))
            elif time.monotonic() >= until_s:
                break
        self._send_receipts()
        assert self._connections is not None
        self._connections.note_read(num_left_bytes, all_read)
        return received

    def _send_receipts(self) -> None:
        """Tell peers what was read of them, once for all their messages."""
        due, self._receipts = self._receipts, {}
        for peer, num_bytes in due.items():
            self.send(peer, Received(num_bytes=num_bytes))

    def _size(self, frames: list[zmq.Frame]) -> int:
        """Bytes that a message took on its connection."""
        num_bytes = 0
        for frame in frames:
            size = len(frame) + (CURVE_BYTES if self._has_keys else 0)
            num_bytes += size + (2 if size < 256 else 9)
        return num_bytes

    def _meet(self, peer: bytes, frame: zmq.Frame) -> _Met | None:
        """Of the first message of a peer. None if its connection has ended already."""
        assert self._connections is not None
        descriptor = _descriptor(frame)
        connection = self._connections.met(descriptor, peer)
        if connection is None and descriptor != IN_PROCESS:
            return None
        met = self._met[peer] = _Met(connection)
        return met

    def _message(
        self, peer: bytes, met: _Met | None, frames: list[zmq.Frame]
    ) -> Message | Violation | None:
        """None: a stranger's second violation, or a later one."""
        message = self._decoded(frames)
        if isinstance(message, Violation):
            self.num_rejected += 1
            if met is not None and met.has_opened:
                self._end(peer)
            elif peer in self._refused:
                return None
            else:
                _remember(peer, self._refused)
        elif isinstance(message, OPENINGS):
            self._open(peer, met, acknowledges=isinstance(message, HELLOS))
        elif met is not None and met.receipts is not None:
            num_read = met.receipts.read(len(frames[-1]))
            if num_read is not None:
                self._receipts[peer] = num_read
        return message

    def _decoded(self, frames: list[zmq.Frame]) -> Message | Violation:
        if len(frames) != 1:
            return Violation(f"a message of {len(frames)} frames; each has one")
        decode = self._decoders_without_keys
        if self._has_keys:
            decode = self._decoders[role_of(frames[0])]
        try:
            return decode(frames[0].buffer)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            return Violation(f"a message that no peer of its role and version sends: {error}")

    def _open(self, peer: bytes, met: _Met | None, acknowledges: bool) -> None:
        """It says hello, perhaps again."""
        assert self._connections is not None
        if met is not None:
            met.has_opened = True
            if met.connection is not None:
                self._connections.opened(met.connection)
            if acknowledges and met.receipts is None:
                met.receipts = Receipts()
        self._forget(peer)

    def _end(self, peer: bytes) -> None:
        _remember(peer, self._ended)

    def _forget(self, peer: bytes) -> None:
        self._lost.discard(peer)
        self._drop_queue(peer)

    def _drop_queue(self, peer: bytes) -> None:
        queue = self._queues.pop(peer, None)
        if queue is not None:
            self._num_queued_bytes -= queue.num_bytes

    def dismiss(self, peer: bytes) -> None:
        """End its connection, once it has had time to read."""
        assert self._connections is not None
        met = self._met.get(peer)
        if met is not None and met.connection is not None:
            self._connections.end_later(met.connection, FAREWELL_S)
        self._end(peer)
        self._lost.discard(peer)

    # Sending

    def reply(self, peer: bytes, message: Message) -> None:
        """Send to a peer that has not joined; nothing is kept for it if its queue is full."""
        self._try_send(peer, encode(message))

    def send(self, peer: bytes, message: Message) -> bool:
        """Send, in order.

        False: the peer is gone, or so far behind that it counts as lost; it must say hello again.
        """
        if peer in self._lost:
            return False
        queue = self._queues.get(peer)
        if queue is not None and queue.num_bytes > QUEUED_BYTES:
            self._lose(peer)
            return False
        frame = encode(message)
        if queue is None:
            if len(frame) <= PART_BYTES:
                sent = self._try_send(peer, frame)
                if sent is not None:
                    return sent
            queue = self._queues[peer] = _Queue()
        for part in _parts(frame):
            queue.append(part)
            self._num_queued_bytes += len(part)
        if not self._flush_queue(peer):
            return False
        if self._num_queued_bytes > TOTAL_QUEUED_BYTES:
            self._lose(max(self._queues, key=lambda one: self._queues[one].num_bytes))
        return peer not in self._lost

    def _lose(self, peer: bytes) -> None:
        num_bytes = self._queues[peer].num_bytes
        self._drop_queue(peer)
        self._lost.add(peer)
        error = f"it does not read: {num_bytes} bytes wait for it"
        self._overdue.append((peer, Violation(error)))

    def _try_send(self, peer: bytes, frame: bytes) -> bool | None:
        """True: sent. None: its queue is full. False: no such peer."""
        try:
            self._socket.send(peer, NOBLOCK | SNDMORE)
            self._socket.send(frame, NOBLOCK, copy=len(frame) < 65536)
            return True
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return False
            raise

    def _flush(self) -> None:
        for peer in list(self._queues):
            self._flush_queue(peer)

    def _flush_queue(self, peer: bytes) -> bool:
        """Send what waits for a peer, as far as its socket takes it. False if the peer is gone."""
        queue = self._queues[peer]
        while queue.frames:
            sent = self._try_send(peer, queue.frames[0])
            if sent is None:
                return True
            if sent is False:
                self._drop_queue(peer)
                return False
            self._num_queued_bytes -= len(queue.frames[0])
            queue.popleft()
        del self._queues[peer]
        return True


def _remember(peer: bytes, peers: set[bytes]) -> None:
    """Add a peer to a table that peers can enlarge."""
    if len(peers) >= MAX_REMEMBERED:
        peers.clear()
    peers.add(peer)


def _parts(frame: bytes) -> Iterable[bytes]:
    """A message as it travels: whole, or in parts if it is large, so that slow links show life."""
    if len(frame) <= PART_BYTES:
        return [frame]
    starts = range(0, len(frame), PART_BYTES)
    return (
        encode(Part(data=frame[start : start + PART_BYTES], last=start == starts[-1]))
        for start in starts
    )


def _descriptor(frame: zmq.Frame) -> int:
    """Of the connection that a message came by."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return IN_PROCESS


class Publisher(_Server):
    """Publishes to all listeners. A slow listener misses messages; it never slows the publisher."""

    def __init__(self, address: str, keys: str = "") -> None:
        super().__init__(
            zmq.PUB,
            address,
            keys,
            "buffer",
            ["monitor"],
            SUBSCRIPTION_BYTES,
            float("inf"),
            SUBSCRIBER_BYTES,
        )

    def _configure(self, socket: zmq.Socket[bytes]) -> None:
        socket.sndhwm = 8
        socket.linger = 0

    def publish(self, topic: bytes, message: Message) -> None:
        """Send to all listeners of `topic`; never waits."""
        self._socket.send_multipart((topic, encode(message)))
