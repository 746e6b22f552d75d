"""Links to the buffer, for an engine, a learner rank or a monitor.

Owns, per link, one background thread with one socket: it says hello, keeps the heartbeat, and
notices when the buffer is gone. Never decides, never retries work: a link that breaks raises once
for all, because messages may be lost; calling `connect` again, with a fresh hello, starts
again. Driven by actors, learner ranks and monitors.
"""

from __future__ import annotations

import queue
import secrets
import socket as sockets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, Union, cast

import msgspec
import zmq
import zmq.utils.monitor

from buffer.wire.credit import LARGEST_FRAME, Credit
from buffer.wire.keys import secure_client
from buffer.wire.limits import split
from buffer.wire.messages import (
    EngineCommand,
    EngineHello,
    EngineMessage,
    Heartbeat,
    HelloAgain,
    LearnerCommand,
    LearnerHello,
    LearnerMessage,
    LearnerWelcome,
    LiveState,
    Message,
    Part,
    Progress,
    Received,
    Role,
    Shutdown,
    Welcome,
)
from buffer.wire.transport import (
    LINGER_MS,
    TransportError,
    check_address,
    decoder,
    encode,
    open_socket,
)

HEARTBEAT_S = 1.0
CONNECT_RETRY_S = 0.05
LAST_WORDS_MS = 300  # zmq reports the end of a connection before it delivers the last messages
GIVE_UP_S = 0.2  # between two looks whether a peer that connects still wants to
# A thread that slept this long (a stopped process, a closed laptop) cannot blame the buffer for
# silence.
SUSPENDED_S = 5.0
ANY_SIZE = -1  # the buffer is trusted with the size of its messages

HANDSHAKE_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
WATCHED_EVENTS = zmq.EVENT_DISCONNECTED | HANDSHAKE_FAILURES

HelloT = TypeVar("HelloT", bound=Message)
WelcomeT = TypeVar("WelcomeT", bound=Message)
SentT = TypeVar("SentT")
ReceivedT = TypeVar("ReceivedT", bound=Message)


class Refused(TransportError):
    """The buffer answered a hello with a refusal; to ask again would not help."""


class LinkLost(TransportError):
    """The connection broke, or the buffer does not know it any more: connect again."""


class _Connection:
    """One stream with the buffer, from hello to close or failure: the socket, its thread, and the
    queues to both sides.
    """

    def __init__(
        self,
        address: str,
        identity: str,
        keys: str,
        role: Role,
        peer_timeout_s: float,
        hello: Message,
        welcome: type,
        commands: Any,
    ) -> None:
        self.inbox: queue.SimpleQueue[Message | TransportError] = queue.SimpleQueue()
        self.handshake_refused = False
        self.failure: TransportError | None = None
        self._address, self._identity, self._peer_timeout_s = address, identity, peer_timeout_s
        self._hello, self._welcome = encode(hello), welcome
        self._decode = decoder(Union[commands, Received, Part]).decode
        self._parts = bytearray()
        self._outbox: deque[bytes] = deque()
        self._credit = Credit()
        self._welcomed = False
        self._stop_at: float | None = None
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = open_socket(self._context, zmq.DEALER, address, ANY_SIZE)
        try:
            # Each connection has a name of its own: ROUTER's handover of a name from one live
            # connection to another can end its process.
            self._socket.setsockopt(zmq.IDENTITY, f"{identity}~{secrets.token_hex(4)}".encode())
            self._socket.setsockopt(
                zmq.IMMEDIATE, 1
            )  # queue nothing for a connection that is not there yet
            secure_client(self._socket, keys, role, "buffer")
            self._monitor = self._socket.get_monitor_socket(WATCHED_EVENTS)
            self._socket.connect(address)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._wake_in, self._wake_out = sockets.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"link {identity}", daemon=True)
        self._thread.start()

    def send(self, frame: bytes) -> None:
        self._outbox.append(frame)
        self._wake()

    def close(self) -> None:
        self._stop_at = time.monotonic() + LINGER_MS / 1000
        if self._thread.is_alive():
            self._wake()
            self._thread.join()
        self._wake_in.close()
        self._wake_out.close()

    def _wake(self) -> None:
        try:
            self._wake_in.send(b"\0")
        except OSError:
            return  # full of earlier wake-ups, so it will wake; or closed just now

    # From here on everything runs in the link's own thread.

    def _run(self) -> None:
        linger_ms = 0
        try:
            self._serve()
            linger_ms = LINGER_MS
        except TransportError as error:
            self.failure = error
        except Exception as error:
            # Any failure here must reach the caller that waits for a message.
            self.failure = TransportError(
                f"the link to the buffer at {self._address} failed: {type(error).__name__}: {error}"
            )
        finally:
            if self.failure is not None:
                self.inbox.put(self.failure)
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(linger_ms)
            self._context.term()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._wake_out, zmq.POLLIN)
        next_sign = last_turn = last_heard = time.monotonic()
        while True:
            now = time.monotonic()
            if self._stop_at is not None and (not self._outbox or now >= self._stop_at):
                return
            if now - last_turn > SUSPENDED_S:
                last_heard = now
            last_turn = now
            if now >= next_sign:
                next_sign = now + self._give_sign()
            self._flush()
            poller.register(self._socket, zmq.POLLIN | (zmq.POLLOUT if self._may_send() else 0))
            ready = dict(poller.poll(max(1, int((next_sign - now) * 1000))))
            if self._wake_out.fileno() in ready:
                self._wake_out.recv(4096)
            if ready.get(self._socket, 0) & zmq.POLLIN:
                self._read()
                last_heard = time.monotonic()
            if self._monitor in ready:
                self._read_monitor()
            silent_s = time.monotonic() - last_heard
            if self._welcomed and self._stop_at is None and silent_s > self._peer_timeout_s:
                raise LinkLost(
                    f"nothing heard from the buffer at {self._address} for {silent_s:.1f} s: see "
                    "whether `python -m buffer` still runs "
                    f"there, or raise buffer.peer_timeout_s"
                )

    def _give_sign(self) -> float:
        """Say hello until welcomed, then keep the heartbeat.

        Returns seconds until the next sign is due.
        """
        if self._welcomed:
            if not self._outbox:  # a full outbox is not helped by one more
                self._outbox.append(encode(Heartbeat()))
            return HEARTBEAT_S
        return HEARTBEAT_S if self._try_send(self._hello) else CONNECT_RETRY_S

    def _flush(self) -> None:
        while self._may_send() and self._try_send(self._outbox[0]):
            self._credit.spend(self._outbox.popleft())

    def _may_send(self) -> bool:
        return bool(self._outbox) and self._credit.admits(self._outbox[0])

    def _try_send(self, frame: bytes) -> bool:
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _read(self) -> None:
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = self._decode(frame)
                if isinstance(message, Part):
                    self._parts += message.data
                    if not message.last:
                        continue
                    message = self._decode(self._parts)
                    self._parts = bytearray()
            except msgspec.MsgspecError as error:
                raise TransportError(
                    f"the buffer at {self._address} sent what this side does not understand "
                    f"({error}): run the same version on both sides"
                ) from error
            if isinstance(message, HelloAgain):
                raise LinkLost(
                    f"the buffer at {self._address} does not know this connection any more: it "
                    "was restarted, or heard nothing of it for too long"
                )
            if isinstance(message, self._welcome):
                if self._welcomed:
                    continue  # the answer to a hello repeated before the first answer came
                self._welcomed = True
            if isinstance(message, Received):
                self._credit.read(message.num_bytes)
            elif not isinstance(message, Heartbeat):
                self.inbox.put(message)

    def _read_monitor(self) -> None:
        while self._monitor.poll(0):
            event = zmq.utils.monitor.recv_monitor_message(self._monitor)["event"]
            if event & HANDSHAKE_FAILURES:
                self.handshake_refused = True
            elif self._welcomed:
                # Messages under way in either direction may be lost, so the stream cannot simply go
                # on over a new connection.
                self._socket.poll(LAST_WORDS_MS)
                self._read()
                raise LinkLost(
                    f"the buffer at {self._address} closed the connection: it ended, or the "
                    "network broke; see its last lines"
                )


class Link(Generic[HelloT, WelcomeT, SentT, ReceivedT]):
    """A named peer's link to the buffer.

    `send` may be called from any thread; `connect`, `receive`, `close` from one.

    `identity` names it in logs; each connection is a peer of its own to the buffer, which takes no
    link of another run.
    """

    _role: Role
    _welcome_type: type
    _commands: Any

    def __init__(
        self, address: str, identity: str, keys: str = "", peer_timeout_s: float = 15
    ) -> None:
        check_address(address, keys)
        if not 1 <= len(identity.encode()) <= 240:
            raise ValueError(
                f"identity {identity!r}: 1 to 240 bytes are allowed, it names this peer to the "
                "buffer"
            )
        self.address = address
        self._identity, self._keys, self._peer_timeout_s = identity, keys, peer_timeout_s
        self._connection: _Connection | None = None
        self._run = ""  # that this link has served before

    def connect(
        self, hello: HelloT, timeout_s: float, given_up: Callable[[], bool] = lambda: False
    ) -> WelcomeT:
        """Say hello, each second, until the buffer answers.

        Raises `TransportError` after `timeout_s`, or soon after `given_up` became true. Once more
        after a TransportError: a new stream.
        """
        self.close()
        hello = msgspec.structs.replace(hello, run=self._run)
        self._connection = _Connection(
            self.address,
            self._identity,
            self._keys,
            self._role,
            self._peer_timeout_s,
            hello,
            self._welcome_type,
            self._commands,
        )
        try:
            deadline = time.monotonic() + timeout_s
            while (answer := self.receive(min(GIVE_UP_S, deadline - time.monotonic()))) is None:
                if given_up() or time.monotonic() >= deadline:
                    raise TransportError(self._unanswered(timeout_s))
            if isinstance(answer, Shutdown):
                raise Refused(
                    f"the buffer at {self.address} does not let {self._identity} join: "
                    f"{answer.error or 'the run is over'}"
                )
        except BaseException:
            self.close()
            raise
        assert isinstance(answer, Welcome | LearnerWelcome)
        self._run = answer.run
        return cast("WelcomeT", answer)

    def _unanswered(self, timeout_s: float) -> str:
        if self._connection is not None and self._connection.handshake_refused:
            keys = f"the keys in {self._keys}" if self._keys else "a client without keys"
            return (
                f"what listens at {self.address} refuses {keys}: give both sides the folder of one "
                "`python -m tools.keys FOLDER` "
                "as buffer.keys, and check that buffer.address is the buffer's"
            )
        return (
            f"no buffer answered at {self.address} within {timeout_s:g} s: start `python -m "
            "buffer` there, or set buffer.address"
        )

    def send(self, message: SentT) -> None:
        """Hand a message to the link's thread: never waits, keeps the order.

        TransportError once the buffer is lost, of the type that `receive` raises.
        """
        connection = self._connected()
        if (failure := connection.failure) is not None:
            raise type(failure)(str(failure)) from failure
        frame = encode(message)
        assert len(frame) <= LARGEST_FRAME, f"a {type(message).__name__} of {len(frame)} bytes"
        connection.send(frame)

    def receive(self, timeout_s: float) -> ReceivedT | None:
        """The next message, or None after `timeout_s`.

        TransportError, each time, once the buffer is lost: LinkLost if it may be joined again.
        """
        connection = self._connected()
        try:
            item = connection.inbox.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        if isinstance(item, TransportError):
            connection.inbox.put(item)
            raise type(item)(str(item)) from item
        return cast("ReceivedT", item)  # the connection decodes nothing but this link's commands

    def _connected(self) -> _Connection:
        if self._connection is None:
            raise TransportError(
                f"the link to the buffer at {self.address} is not connected: call connect first"
            )
        return self._connection

    def close(self) -> None:
        """Give sent messages up to two seconds to leave, then close. May be called twice."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class EngineLink(Link[EngineHello, Welcome, EngineMessage, EngineCommand]):
    """An engine's link."""

    _role = "engine"
    _welcome_type, _commands = Welcome, EngineCommand

    def send(self, message: EngineMessage) -> None:
        """As `Link.send`; tokens travel in messages that the buffer takes."""
        for part in split(message) if isinstance(message, Progress) else [message]:
            super().send(part)


class LearnerLink(Link[LearnerHello, LearnerWelcome, LearnerMessage, LearnerCommand]):
    """A learner rank's link."""

    _role = "learner"
    _welcome_type, _commands = LearnerWelcome, LearnerCommand


class MonitorLink:
    """Listens to the buffer's published state.

    Survives the buffer's restart; never slows it. Used by one thread.
    """

    def __init__(self, publisher_address: str, keys: str = "") -> None:
        check_address(publisher_address, keys)
        self.address = publisher_address
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = open_socket(self._context, zmq.SUB, publisher_address, ANY_SIZE)
        try:
            self._socket.rcvhwm = 8
            self._socket.subscribe(b"")
            secure_client(self._socket, keys, "monitor", "buffer")
            self._socket.connect(publisher_address)
        except BaseException:
            self.close()
            raise

    def receive(self, timeout_s: float) -> LiveState | None:
        """The newest state to arrive; waits up to `timeout_s` for one. None if none came."""
        if not self._socket.poll(max(0, int(timeout_s * 1000))):
            return None
        newest: bytes = b""
        while True:
            try:
                newest = self._socket.recv_multipart(zmq.NOBLOCK)[-1]
            except zmq.Again:
                break
        try:
            return decoder(LiveState).decode(newest)
        except msgspec.MsgspecError as error:
            raise TransportError(
                f"what is published at {self.address} is no state that this monitor understands "
                f"({error}): run the buffer's version"
            ) from error

    def close(self) -> None:
        """May be called twice."""
        self._context.destroy(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
