"""Prompts that were drawn from the stream and have not been trained on yet.

Owns the payloads of prompts that the core knows, and the cursor by which a resumed run skips none and
repeats none. Driven by `buffer.run_state`.
"""

from __future__ import annotations

from collections import defaultdict

import msgspec

from buffer.data.sources import PromptStream
from buffer.wire.messages import PromptPayload


class Cursor(msgspec.Struct, frozen=True):
    """Where the stream stands: prompts drawn, and the positions of those that are outstanding."""

    position: int
    unfinished: list[int]


class OutstandingPrompts:
    """Draws prompts and remembers each, by its id, until its group has ended for good."""

    def __init__(self, stream: PromptStream, cursor: Cursor | None = None) -> None:
        self._stream = stream
        self._again = sorted(cursor.unfinished) if cursor else []
        self._payloads: dict[str, PromptPayload] = {}
        # A small source may have the same prompt outstanding twice.
        self._positions: dict[str, list[int]] = defaultdict(list)
        if cursor:
            stream.seek(cursor.position)

    def draw(self, num_prompts: int) -> list[PromptPayload]:
        """The next window. Prompts that an earlier life left unfinished come first."""
        return [self._draw_one() for _ in range(num_prompts)]

    def _draw_one(self) -> PromptPayload:
        if self._again:
            position, resume_at = self._again.pop(0), self._stream.position
            self._stream.seek(position)
            payload = self._stream.draw(1)[0]
            self._stream.seek(resume_at)
        else:
            position = self._stream.position
            payload = self._stream.draw(1)[0]
        self._payloads[payload.prompt_id] = payload
        self._positions[payload.prompt_id].append(position)
        return payload

    def payload(self, prompt_id: str) -> PromptPayload:
        return self._payloads[prompt_id]

    def done(self, prompt_id: str) -> None:
        """One group of this prompt was trained on, or dropped and not put back."""
        positions = self._positions[prompt_id]
        positions.pop(0)
        if not positions:
            del self._positions[prompt_id], self._payloads[prompt_id]

    @property
    def cursor(self) -> Cursor:
        unfinished = [position for positions in self._positions.values() for position in positions]
        return Cursor(self._stream.position, sorted(unfinished + self._again))
