"""The connections of a server: their number, their age, their unread bytes, and the peers behind
them.

libzmq's queues of received messages have no limit (see `transport`), so a peer that sends more than
it may is found by the bytes that the kernel has received from it, and its connection is ended at
its descriptor. So is one that does not say hello in time, one too many, and that of a dismissed
peer. Owns one thread. libzmq waits for that thread when connections arrive faster than it notices
them, which bounds their number. Decides nothing about messages. Driven by `buffer.wire.transport`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.utils.monitor

from buffer.wire.descriptors import ReceivedBytes, remote_end, shut_down, take_connections
from buffer.wire.limits import (
    GREETING_BYTES,
    STRANGERS_BYTES,
    UNREAD_BYTES,
    most_connections,
)

LOOK_S = 0.02
LOOK_SHARE = 0.05  # of the time, at most, if there are many connections
WATCHED_EVENTS = (
    zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
)


@dataclass(slots=True, kw_only=True, eq=False)
class Connection:
    """`end_s`: when it is to be shut down, unless it has said hello by then."""

    remote: Any  # as the system names it
    end_s: float
    most_unread: int  # bytes that may wait to be read
    identity: bytes = b""  # of its peer, once a message of it was read
    num_received: int = 0  # bytes, when it was last looked at
    num_read: int = 0  # of these, by the server
    floods: bool = False  # it was reset because too much of it was unread

    @property
    def num_unread(self) -> int:
        return max(0, self.num_received - self.num_read)


class Connections:
    """Of one bound socket. `close` before the socket is closed.

    `opening_s`: within which a connection must say hello, infinite if none is expected.
    `opening_bytes`: that it may send until then.
    `ended`: connections with an identity.
    """

    def __init__(self, socket: zmq.Socket[bytes], opening_s: float, opening_bytes: int) -> None:
        self._socket, self._most = socket, most_connections()
        self._opening_s, self._opening_bytes = opening_s, opening_bytes
        self.ended: deque[Connection] = deque()
        self._lock = threading.Lock()
        self._open: dict[int, Connection] = {}  # by descriptor, oldest first
        self._num_left_bytes = 0  # of ended connections, perhaps still to be read
        self._listener, self._takes_more = -1, True
        self._received = ReceivedBytes()
        self._look_at_s = 0.0
        self._monitor = socket.get_monitor_socket(WATCHED_EVENTS)
        self._thread = threading.Thread(target=self._watch, name="connections", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        with self._lock:
            return len(self._open)

    def met(self, descriptor: int, identity: bytes) -> Connection | None:
        """The connection by which a peer's message came. None if it has ended already.

        A message of a connection that has ended may seem to come by a newer one, until that one has
        said hello.
        """
        with self._lock:
            remote = remote_end(descriptor)
            if remote is None:
                return None
            connection = self._open.get(descriptor)
            if connection is None or connection.remote != remote:  # libzmq tells of it only now
                if connection is not None:
                    self._vanished(descriptor)
                connection = self._open[descriptor] = self._new(remote)
            elif connection.identity not in (b"", identity) and connection.end_s == float("inf"):
                return None  # another connection has its descriptor
            if connection.identity != identity:
                connection.identity, connection.num_read = identity, 0
            return connection

    def opened(self, connection: Connection) -> None:
        """It has said hello, so it may stay."""
        with self._lock:
            connection.end_s = float("inf")
            connection.most_unread = UNREAD_BYTES

    def end_later(self, connection: Connection, after_s: float) -> None:
        """Shut it down after its peer had time to read."""
        with self._lock:
            connection.end_s = min(connection.end_s, time.monotonic() + after_s)

    def note_read(self, num_bytes: int, all_read: bool) -> None:
        """So many bytes of ended connections were read. `all_read`: and nothing else was there."""
        with self._lock:
            self._num_left_bytes = 0 if all_read else max(0, self._num_left_bytes - num_bytes)

    def close(self) -> None:
        """The thread reads until libzmq stops reporting, so that neither waits for the other."""
        self._socket.disable_monitor()
        self._thread.join()

    def _watch(self) -> None:
        try:
            while True:
                wait_s = max(0.0, self._look_at_s - time.monotonic())
                if self._monitor.poll(int(wait_s * 1000 + 0.999)):
                    event = zmq.utils.monitor.recv_monitor_message(self._monitor)
                    if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                        return
                    with self._lock:
                        self._note(event["event"], event["value"])
                if (now_s := time.monotonic()) >= self._look_at_s:
                    began_s = time.thread_time()
                    with self._lock:
                        self._look(now_s)
                    took_s = time.thread_time() - began_s
                    self._look_at_s = now_s + max(LOOK_S, took_s / LOOK_SHARE)
        finally:
            self._monitor.close(0)

    def _new(self, remote: Any) -> Connection:
        end_s = time.monotonic() + self._opening_s
        return Connection(remote=remote, end_s=end_s, most_unread=self._opening_bytes)

    def _note(self, event: int, descriptor: int) -> None:
        if event == zmq.EVENT_LISTENING:
            self._listener = descriptor
            return
        known = self._open.get(descriptor)
        if event != zmq.EVENT_ACCEPTED:
            if known is not None and remote_end(descriptor) != known.remote:
                self._vanished(descriptor)
            return
        remote = remote_end(descriptor)
        if remote is None or (known is not None and known.remote == remote):
            return  # it has ended already, or was met already
        if known is not None:
            self._vanished(descriptor)
        self._open[descriptor] = self._new(remote)
        if len(self._open) > self._most:
            strangers = (one for one, state in self._open.items() if state.end_s < float("inf"))
            self._end(next(strangers, descriptor))  # the oldest, else the new one

    def _look(self, now_s: float) -> None:
        """End the connections that have sent too much, or had their time."""
        strangers: list[int] = []
        for descriptor, connection in list(self._open.items()):
            connection.num_received = self._received.of(descriptor)
            if connection.num_unread > connection.most_unread:
                connection.floods = True
                self._end(descriptor, at_once=True)
            elif connection.end_s <= now_s:
                self._end(descriptor)
            elif connection.end_s < float("inf") and connection.num_unread > GREETING_BYTES:
                strangers.append(descriptor)
        self._end_most(strangers)
        takes_more = self._num_left_bytes <= STRANGERS_BYTES
        if takes_more != self._takes_more and self._listener >= 0:
            take_connections(self._listener, takes_more)
            self._takes_more = takes_more

    def _end_most(self, strangers: list[int]) -> None:
        """End strangers, those that sent most first, so that little of them waits to be read."""
        num_bytes = self._num_left_bytes + sum(self._open[one].num_unread for one in strangers)
        if num_bytes <= STRANGERS_BYTES:
            return
        strangers.sort(key=lambda one: self._open[one].num_unread)
        while strangers and num_bytes > STRANGERS_BYTES:
            num_bytes -= self._open[strangers[-1]].num_unread
            self._end(strangers.pop(), at_once=True)

    def _end(self, descriptor: int, at_once: bool = False) -> None:
        connection = self._open.pop(descriptor)
        shut_down(descriptor, connection.remote, at_once)
        self._left_behind(connection, connection.num_unread)

    def _vanished(self, descriptor: int) -> None:
        """It has ended by itself, and may have sent more than was known."""
        connection = self._open.pop(descriptor)
        self._left_behind(connection, max(connection.num_unread, connection.most_unread))

    def _left_behind(self, connection: Connection, num_bytes: int) -> None:
        self._num_left_bytes += num_bytes
        if connection.identity:
            self.ended.append(connection)
