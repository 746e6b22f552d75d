"""Sockets of the serving side: ROUTER and PUB, their framing, CURVE keys, and the options common to
every socket here.

Owns the rules that keep messages safe: nothing is unpickled, garbage is counted and never raises,
and nothing is lost or reordered at a high-water mark. Knows messages only as msgspec types; decides
nothing. Driven by the buffer's service and the snapshot server (servers), and by `client.py` and
`snapshots.py` (which use the helpers of the connecting side).
"""

from __future__ import annotations

import errno
import ipaddress
import re
import time
from collections import deque
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import msgspec
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from buffer.wire.messages import EngineHello, LearnerHello, Message

MAX_FRAME_BYTES = (
    64 << 20
)  # of a message sent to a server; the buffer's own may be larger (a step's shard)
MAX_PER_RECEIVE = 1000  # so that a flood cannot keep the service from its clock
MAX_BACKLOG = 10_000  # messages kept for a peer that does not read, beyond the socket's own queue
QUEUE_MESSAGES = 1000  # zmq's queue per peer and direction
LINGER_MS = 2000
BACKLOG_RETRY_S = 0.01

SERVER_FILES = ("server.key_secret", "client.key")
CLIENT_FILES = ("client.key_secret", "server.key")

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


def _is_local(address: str) -> bool:
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
    if not _is_local(address) and not keys:
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
    """A socket with the options that all of ours share: bounded queues and frames, keepalive and
    heartbeats against half-open connections.
    """
    socket = context.socket(kind)
    socket.linger = LINGER_MS
    socket.sndhwm = socket.rcvhwm = QUEUE_MESSAGES
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
    socket.setsockopt(
        zmq.HEARTBEAT_TIMEOUT, 60_000
    )  # longer than the largest message takes on a slow network
    socket.setsockopt(zmq.RECONNECT_IVL, 200)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    if address.startswith("tcp://["):
        socket.setsockopt(zmq.IPV6, 1)
    return socket


def _load_key(folder: str, name: str) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(f"{folder}/{name}")  # pyright: ignore[reportUnknownMemberType]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"buffer.keys={folder!r}: no usable {name} there ({error}); run `python -m tools.keys "
            f"{folder}`"
        ) from error


class _OneKey:
    """Admits only peers that hold the secret of one public key."""

    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public_key


def secure_server(
    context: zmq.Context[Any], socket: zmq.Socket[bytes], keys: str
) -> ThreadAuthenticator | None:
    """Make `socket` accept only the client key of the folder `keys`.

    The authenticator returned must be stopped.
    """
    if not keys:
        return None
    _, secret = _load_key(keys, SERVER_FILES[0])
    client, _ = _load_key(keys, SERVER_FILES[1])
    authenticator = ThreadAuthenticator(context)
    authenticator.configure_curve_callback(credentials_provider=_OneKey(client))
    authenticator.start()
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret or b"")
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    return authenticator


def secure_client(socket: zmq.Socket[bytes], keys: str) -> None:
    """Make `socket` speak to the holder of the server key of the folder `keys`, as its client."""
    if not keys:
        return
    public, secret = _load_key(keys, CLIENT_FILES[0])
    server, _ = _load_key(keys, CLIENT_FILES[1])
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret or b"")
    socket.setsockopt(zmq.CURVE_SERVERKEY, server)


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

    def __init__(self, kind: int, address: str, keys: str) -> None:
        check_address(address, keys)
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = open_socket(self._context, kind, address, 4 * MAX_FRAME_BYTES)
        self._authenticator: ThreadAuthenticator | None = None
        try:
            self._configure(self._socket)
            self._authenticator = secure_server(self._context, self._socket, keys)
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
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Router(_Server):
    """Receives from many peers and sends to each by name. Used by one thread at a time.

    A peer is known by the identity that its socket announces. Its hello begins its stream again:
    messages still kept for an earlier stream under the same identity are forgotten.
    """

    def __init__(self, address: str, decode_type: Any, keys: str = "") -> None:
        self.num_rejected = 0
        self._decode = decoder(decode_type).decode
        self._backlog: dict[bytes, deque[bytes]] = {}
        self._lost: set[bytes] = set()
        super().__init__(zmq.ROUTER, address, keys)

    def _configure(self, socket: zmq.Socket[bytes]) -> None:
        # Without MANDATORY a ROUTER silently drops messages beyond a peer's queue; with it, send()
        # says so and we keep it.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)

    def close(self) -> None:
        """Give sent messages up to two seconds to leave, then close. May be called twice."""
        deadline = time.monotonic() + LINGER_MS / 1000
        while self._backlog and time.monotonic() < deadline:
            self._flush_backlog()
            time.sleep(BACKLOG_RETRY_S)
        super().close()

    def receive(self, timeout_s: float) -> list[tuple[bytes, Message | Violation]]:
        """(peer, message) pairs, in order of arrival: waits up to `timeout_s` for the first, then
        takes those already there.

        Messages that do not decode are violations, and counted in `num_rejected`. Frames above four times
        MAX_FRAME_BYTES never get here: zmq closes the connection that sends them.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._flush_backlog()
            wait_s = max(0.0, deadline - time.monotonic())
            if self._backlog:  # a ROUTER cannot tell when one peer's queue has room again
                wait_s = min(wait_s, BACKLOG_RETRY_S)
            if self._socket.poll(int(wait_s * 1000 + 0.999)):
                received = self._drain()
                if received:
                    return received
            if time.monotonic() >= deadline:
                return []

    def send(self, peer: bytes, message: Message) -> bool:
        """Send, in order.

        False: the peer is gone, or so far behind that it counts as lost; it must say hello again.
        """
        if peer in self._lost:
            return False
        frame = encode(message)
        waiting = self._backlog.get(peer)
        if waiting is None:
            sent = self._try_send(peer, frame)
            if sent is None:
                self._backlog[peer] = deque([frame])
            return sent is not False
        if len(waiting) >= MAX_BACKLOG:
            del self._backlog[peer]
            self._lost.add(peer)
            return False
        waiting.append(frame)
        return True

    def _try_send(self, peer: bytes, frame: bytes) -> bool | None:
        """True: sent. None: its queue is full. False: no such peer."""
        try:
            self._socket.send_multipart((peer, frame), zmq.NOBLOCK, copy=len(frame) < 65536)
            return True
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return False
            raise

    def _flush_backlog(self) -> None:
        for peer in list(self._backlog):
            waiting = self._backlog[peer]
            while waiting:
                sent = self._try_send(peer, waiting[0])
                if sent is None:
                    break
                if sent is False:
                    waiting.clear()
                    break
                waiting.popleft()
            if not waiting:
                del self._backlog[peer]

    def _drain(self) -> list[tuple[bytes, Message | Violation]]:
        received: list[tuple[bytes, Message | Violation]] = []
        for _ in range(MAX_PER_RECEIVE):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            peer, message = frames[0], self._decoded(frames)
            if isinstance(message, Violation):
                self.num_rejected += 1
            elif isinstance(message, (EngineHello, LearnerHello)):
                self._lost.discard(peer)
                self._backlog.pop(peer, None)
            received.append((peer, message))
        return received

    def _decoded(self, frames: list[bytes]) -> Message | Violation:
        if len(frames) != 2:
            return Violation(f"a message of {len(frames) - 1} frames; each has one")
        if len(frames[1]) > MAX_FRAME_BYTES:
            return Violation(f"a message of {len(frames[1])} bytes; the limit is {MAX_FRAME_BYTES}")
        try:
            return self._decode(frames[1])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            return Violation(f"a message that no peer of this version sends: {error}")


class Publisher(_Server):
    """Publishes to all listeners. A slow listener misses messages; it never slows the publisher."""

    def __init__(self, address: str, keys: str = "") -> None:
        super().__init__(zmq.PUB, address, keys)

    def _configure(self, socket: zmq.Socket[bytes]) -> None:
        socket.sndhwm = 8
        socket.linger = 0

    def publish(self, topic: bytes, message: Message) -> None:
        """Send to all listeners of `topic`; never waits."""
        self._socket.send_multipart((topic, encode(message)))
