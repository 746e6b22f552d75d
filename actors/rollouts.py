"""A rollout on an engine: the tokens of its turns, how many of them were sent, and its answer.

Owns the translation of tokens into chunks, from any place on. Sends nothing. Driven by
`actors.worker`.
"""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass, field
from functools import partial

from actors.inference.generation import Generation
from buffer.wire.messages import Chunk, Failed, Finished, PromptPayload, Stopped


@dataclass(slots=True, eq=False)
class Turn:
    """A response, and the tokens given before it: the prompt, or an observation.

    prefix: of the response, sampled by another engine, and known to the buffer.
    """

    given: array[int]
    generation: Generation
    prefix: array[int] = field(default_factory=partial(array, "i"))
    sent_given: bool = False

    @property
    def response(self) -> list[int]:
        """The sampled tokens so far."""
        return [*self.prefix, *self.generation.tokens]

    @property
    def num_sampled(self) -> int:
        return len(self.prefix) + len(self.generation.tokens)


@dataclass(slots=True, eq=False)
class Rollout:
    """A launched rollout until the buffer has settled it.

    turns: at least one; all but the last have ended.
    texts: of the turns before the last one, and of the observations after them.
    follower: waits for its end and sends the answer.
    """

    rollout_id: int
    prompt: PromptPayload
    seed: int
    turns: list[Turn]
    texts: list[str] = field(default_factory=list[str])
    follower: asyncio.Task[None] | None = None
    cancelled: bool = False
    curtailed: bool = False  # it ends where it is, as at its length limit
    answer: Finished | Failed | Stopped | None = None

    @property
    def turn(self) -> Turn:
        return self.turns[-1]

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of all turns so far, those of the prefix included."""
        return sum(turn.num_sampled for turn in self.turns)

    @property
    def token_ids(self) -> list[int]:
        """Everything in order, which the next turn extends: nothing is turned into tokens twice."""
        return [token for turn in self.turns for token in (*turn.given, *turn.response)]

    @property
    def num_pending(self) -> int:
        """Sampled tokens that `take_chunks` would return."""
        return sum(turn.generation.num_pending for turn in self.turns)

    @property
    def decodes(self) -> bool:
        return not self.turn.generation.finished.done()

    @property
    def waits(self) -> bool:
        """For the environment or the verifier."""
        return not self.decodes and self.answer is None

    def take_chunks(self) -> list[Chunk]:
        """Return its tokens since the last call, those of the prompt first."""
        chunks: list[Chunk] = []
        offset = 0
        for turn in self.turns:
            if not turn.sent_given:
                turn.sent_given = True
                chunks.append(self._chunk(offset, turn.given))
            start = offset + len(turn.given) + len(turn.prefix)
            offset = start + turn.generation.num_taken
            for run in turn.generation.take():
                chunks.append(self._chunk(offset, run.tokens, run.version, run.logprobs))
                offset += len(run.tokens)
        return chunks

    def resume(self, num_tokens: int) -> bool:
        """The buffer wants it and holds its first `num_tokens`: have `take_chunks` return the rest.

        False if that cannot be. The buffer's machine has lost power, and with it tokens of the
        prefix, of which this engine has no log-probabilities, or a cancel that was obeyed here.
        """
        first, start = self.turns[0], 0
        for turn in self.turns:
            start += len(turn.given)
            turn.sent_given = num_tokens >= start
            start += len(turn.prefix)
            turn.generation.rewind(max(0, num_tokens - start))
            start += len(turn.generation.tokens)
        self.cancelled = False
        has_all = not first.prefix or num_tokens >= len(first.given) + len(first.prefix)
        return has_all and not isinstance(self.answer, Stopped)

    def _chunk(
        self,
        offset: int,
        tokens: array[int],
        version: int | None = None,
        logprobs: array[float] | None = None,
    ) -> Chunk:
        """Sampled by `version`, or given if that is None."""
        return Chunk(
            rollout_id=self.rollout_id,
            offset=offset,
            sampled=version is not None,
            version=version or 0,
            tokens=tokens.tobytes(),
            logprobs=b"" if logprobs is None else logprobs.tobytes(),
        )
