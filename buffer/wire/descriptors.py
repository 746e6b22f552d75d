"""TCP connections of libzmq, by their descriptors: the kernel knows how much each has received, and
can end one, or let none begin.

libzmq reports a connection's descriptor and offers none of this. No function here waits, and none
releases the interpreter's lock, so that many connections can be looked at while the main thread is
busy. A descriptor that is no TCP connection has received nothing. Driven by
`buffer.wire.connections`.
"""

from __future__ import annotations

import ctypes
import os
import socket as sockets
import struct
import sys
from typing import Any

BYTES_RECEIVED = 128  # offset in the kernel's `struct tcp_info` of an unsigned integer of 8 bytes
TCP_INFO_BYTES = BYTES_RECEIVED + 8
NO_ADDRESS = bytes(16)  # of family AF_UNSPEC
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
TAKE_NOTHING = struct.pack("HBBI", 6, 0, 0, 0)  # a filter of one instruction: return 0 bytes

_libc = ctypes.PyDLL(None)


class ReceivedBytes:
    """`of` gives the bytes that a connection has received so far. Used by one thread at a time."""

    def __init__(self) -> None:
        self._info = ctypes.create_string_buffer(TCP_INFO_BYTES)
        self._size = ctypes.c_uint32()
        self._arguments = (sockets.IPPROTO_TCP, sockets.TCP_INFO, self._info)
        self._size_reference = ctypes.byref(self._size)

    def of(self, descriptor: int) -> int:
        """Bytes of its stream, whether or not libzmq has read them yet."""
        self._size.value = TCP_INFO_BYTES
        failed = _libc.getsockopt(descriptor, *self._arguments, self._size_reference)
        if failed or self._size.value < TCP_INFO_BYTES:
            return 0
        return int.from_bytes(self._info.raw[BYTES_RECEIVED:], sys.byteorder)


def remote_end(descriptor: int) -> Any:
    """The other end of a descriptor as the system names it, None if it is no connection."""
    try:
        with _socket_of(descriptor) as socket:
            return socket.getpeername()
    except OSError:
        return None


def shut_down(descriptor: int, remote: Any, at_once: bool) -> None:
    """End the connection to `remote`. No-op if it has ended, and another has its descriptor.

    `at_once`: it is reset, and bytes that the kernel holds for libzmq are forgotten.
    """
    try:
        with _socket_of(descriptor) as socket:
            if socket.getpeername() != remote:
                return
            if at_once:
                _libc.connect(socket.fileno(), NO_ADDRESS, len(NO_ADDRESS))
            else:
                socket.shutdown(sockets.SHUT_RDWR)
    except OSError:
        return  # it ended just now


def take_connections(descriptor: int, takes: bool) -> None:
    """Whether a listening socket takes connections. Peers ask again until it does."""
    program = ctypes.create_string_buffer(TAKE_NOTHING)
    filter_ = struct.pack("HP", 1, ctypes.addressof(program))
    try:
        with _socket_of(descriptor) as socket:
            if takes:
                socket.setsockopt(sockets.SOL_SOCKET, SO_DETACH_FILTER, 0)
            else:
                socket.setsockopt(sockets.SOL_SOCKET, SO_ATTACH_FILTER, filter_)
    except OSError:
        return  # no TCP, or a kernel without filters: its connections are ended instead


def _socket_of(descriptor: int) -> sockets.socket:
    """A duplicate, which must be closed. Raises `OSError` if it is no socket."""
    duplicate = os.dup(descriptor)
    try:
        return sockets.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise
