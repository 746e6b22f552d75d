"""The connections of a server: their number, their age, and the peers behind them.

libzmq reports connections and offers no way to end one. An unwanted connection is therefore shut
down at its descriptor: one that does not say hello in time, one too many, or that of a dismissed
peer. Owns one thread. libzmq waits for that thread when connections arrive faster than it notices
them, which bounds their number. Decides nothing about messages. Driven by `buffer.wire.transport`.
"""

from __future__ import annotations

import os
import socket as sockets
import struct
import threading
import time
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.utils.monitor

from buffer.wire.limits import most_connections

WATCH_S = 0.5
RESET_AT_CLOSE = struct.pack("ii", 1, 0)
WATCHED_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED


@dataclass
class Connection:
    """`end_s`: when it is to be shut down, unless it has said hello by then."""

    remote: Any  # as the system names it
    end_s: float
    identity: bytes = b""  # once it has said hello


class Connections:
    """Of one bound socket. `close` before the socket is closed.

    `opening_s`: within which a connection must say hello, infinite if none is expected.
    """

    def __init__(self, socket: zmq.Socket[bytes], opening_s: float) -> None:
        self._socket, self._opening_s, self._most = socket, opening_s, most_connections()
        self._lock = threading.Lock()
        self._open: dict[int, Connection] = {}  # by descriptor, oldest first
        self._monitor = socket.get_monitor_socket(WATCHED_EVENTS)
        self._thread = threading.Thread(target=self._watch, name="connections", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        with self._lock:
            return len(self._open)

    def opened(self, descriptor: int, identity: bytes) -> None:
        """It has said hello, so it may stay."""
        remote = _remote(descriptor)
        if remote is None:
            return  # it has ended already
        with self._lock:  # libzmq may tell of it only now
            self._open[descriptor] = Connection(remote, float("inf"), identity)

    def end_later(self, identity: bytes, after_s: float) -> None:
        """Shut down an opened connection after its peer had time to read. No-op if it is gone."""
        with self._lock:
            for connection in self._open.values():
                if connection.identity == identity:
                    connection.end_s = time.monotonic() + after_s

    def end(self, descriptor: int, identity: bytes) -> None:
        """Reset the connection that a message came by. No-op if another has its descriptor.

        Not shut down in order: a peer that floods would wait for a reader that never comes.
        """
        with self._lock:
            connection = self._open.get(descriptor)
            if connection is not None and connection.identity in (b"", identity):
                self._shut_down(descriptor, reset=True)

    def close(self) -> None:
        """The thread reads until libzmq stops reporting, so that neither waits for the other."""
        self._socket.disable_monitor()
        self._thread.join()

    def _watch(self) -> None:
        try:
            while True:
                if self._monitor.poll(int(WATCH_S * 1000)):
                    event = zmq.utils.monitor.recv_monitor_message(self._monitor)
                    if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                        return
                    self._note(event["event"], event["value"])
                self._end_late()
        finally:
            self._monitor.close(0)

    def _note(self, event: int, descriptor: int) -> None:
        with self._lock:
            known = self._open.get(descriptor)
            if event != zmq.EVENT_ACCEPTED:
                if known is not None and _remote(descriptor) != known.remote:
                    del self._open[descriptor]
                return
            remote = _remote(descriptor)
            if remote is None or (known is not None and known.remote == remote):
                return  # it has ended already, or said hello already
            self._open.pop(descriptor, None)
            self._open[descriptor] = Connection(remote, time.monotonic() + self._opening_s)
            if len(self._open) > self._most:
                strangers = (one for one, state in self._open.items() if state.end_s < float("inf"))
                self._shut_down(next(strangers, descriptor))  # the oldest, else the new one

    def _end_late(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            for descriptor in [one for one, state in self._open.items() if state.end_s <= now_s]:
                self._shut_down(descriptor)

    def _shut_down(self, descriptor: int, reset: bool = False) -> None:
        connection = self._open.pop(descriptor, None)
        if connection is None or _remote(descriptor) != connection.remote:
            return  # it has ended by itself, and another may have its descriptor
        with _socket_of(descriptor) as socket:
            try:
                if reset:
                    socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, RESET_AT_CLOSE)
                socket.shutdown(sockets.SHUT_RDWR)
            except OSError:
                return  # it ended just now


def _socket_of(descriptor: int) -> sockets.socket:
    return sockets.socket(fileno=os.dup(descriptor))


def _remote(descriptor: int) -> Any:
    """The other end of a descriptor, None if it is no connection."""
    try:
        with _socket_of(descriptor) as socket:
            return socket.getpeername()
    except OSError:
        return None
