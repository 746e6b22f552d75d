"""Prompts drawn from the stream whose groups have not ended yet.

Owns the payloads of prompts that the core knows, and the cursor by which a resumed run skips none
and repeats none. A draw is known by its *visit*, its position in the stream, since a small source
may have the same prompt outstanding twice. Driven by `buffer.run_state`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import msgspec

from buffer.data.sources import PromptStream
from buffer.wire.messages import PromptPayload


class Cursor(msgspec.Struct, frozen=True):
    """Where the stream stands: prompts drawn so far, visits that are outstanding,
    visits put back.
    """

    position: int
    outstanding: list[int]
    again: list[int]


class OutstandingPrompts:
    """Draws prompts and remembers each, by its visit, until its group has ended for good."""

    def __init__(self, stream: PromptStream, cursor: Cursor | None = None) -> None:
        self._stream = stream
        self._again: list[int] = []  # a heap of visits to draw before anything new
        self._payloads: dict[int, PromptPayload] = {}
        if cursor:
            stream.seek(cursor.position)
            self.restore(cursor.outstanding)
            self.put_back(cursor.again)

    def draw(self, num_prompts: int) -> list[tuple[int, PromptPayload]]:
        """The next window, as (visit, payload)."""
        first = self._stream.position
        drawn = list(enumerate(self._stream.draw(num_prompts), first))
        self._payloads.update(drawn)
        return drawn

    def draw_again(self, most: int) -> list[tuple[int, PromptPayload]]:
        """At most this many of the prompts that were put back, the oldest visits first."""
        visits = [heapq.heappop(self._again) for _ in range(min(most, len(self._again)))]
        drawn = [(visit, self._at(visit)) for visit in visits]
        self._payloads.update(drawn)
        return drawn

    def restore(self, visits: Iterable[int]) -> None:
        """These were drawn in an earlier life of the buffer and are outstanding."""
        for visit in visits:
            if visit in self._again:
                self._again.remove(visit)
                heapq.heapify(self._again)
            self._payloads[visit] = self._at(visit)
            self._stream.seek(max(self._stream.position, visit + 1))

    def put_back(self, visits: Iterable[int]) -> None:
        """Draw these again before anything new. Outstanding ones are left alone."""
        for visit in visits:
            if visit not in self._payloads and visit not in self._again:
                heapq.heappush(self._again, visit)

    def payload(self, visit: int) -> PromptPayload:
        return self._payloads[visit]

    def done(self, visit: int) -> None:
        """The group of this visit was trained, or dropped and not put back."""
        del self._payloads[visit]

    @property
    def num_drawn(self) -> int:
        """Prompts drawn from the stream so far."""
        return self._stream.position

    @property
    def cursor(self) -> Cursor:
        return Cursor(self._stream.position, sorted(self._payloads), sorted(self._again))

    def _at(self, visit: int) -> PromptPayload:
        position = self._stream.position
        self._stream.seek(visit)
        payload = self._stream.draw(1)[0]
        self._stream.seek(position)
        return payload
