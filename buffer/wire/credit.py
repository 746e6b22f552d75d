"""How much a peer may send before the server has read it, as both sides count it.

A peer sends at most `CREDIT_BYTES` beyond the messages that the server has said it read, so that a
server never holds more than that of an honest peer, however slow it is. Messages count from the
first after the hello, hellos excepted. Driven by `client` and `transport`.
"""

from __future__ import annotations

from buffer.wire.limits import CREDIT_BYTES

FRAME_BYTES = 64  # of each message beside its content: at least the bytes of its frame and keys
READ_AT_LEAST = CREDIT_BYTES // 4  # before the server says so
LARGEST_FRAME = CREDIT_BYTES - READ_AT_LEAST - FRAME_BYTES


def cost(num_bytes: int) -> int:
    """Of a message with so many bytes."""
    return num_bytes + FRAME_BYTES


class Credit:
    """Of the sending side."""

    def __init__(self) -> None:
        self._num_sent = self._num_read = 0

    def admits(self, frame: bytes) -> bool:
        return self._num_sent - self._num_read + cost(len(frame)) <= CREDIT_BYTES

    def spend(self, frame: bytes) -> None:
        self._num_sent += cost(len(frame))

    def read(self, num_bytes: int) -> None:
        """The server has read so many, of all that were sent."""
        self._num_read = num_bytes


class Receipts:
    """Of the reading side, for one peer."""

    def __init__(self) -> None:
        self._num_read = self._num_told = 0

    def read(self, frame_bytes: int) -> int | None:
        """A message was read. Returns the number of bytes to tell its sender, None if not yet."""
        self._num_read += cost(frame_bytes)
        if self._num_read < self._num_told + READ_AT_LEAST:
            return None
        self._num_told = self._num_read
        return self._num_told
