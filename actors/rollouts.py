"""A rollout on an engine: its tokens, how many of them were sent, and its answer.

Owns the translation of sampled tokens into chunks, from any place on. Sends nothing. Driven by
`actors.worker`.
"""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass

from actors.inference.generation import Generation
from buffer.wire.messages import Chunk, Failed, Finished, PromptPayload, Stopped


@dataclass(slots=True, eq=False)
class Rollout:
    """A launched rollout until the buffer has settled it.

    prompt_ids: its prompt as tokens.
    prefix: sampled by another engine, and known to the buffer.
    follower: waits for its end and sends the answer.
    """

    rollout_id: int
    prompt: PromptPayload
    prompt_ids: array[int]
    prefix: array[int]
    generation: Generation
    follower: asyncio.Task[None] | None = None
    cancelled: bool = False
    sent_prompt: bool = False
    answer: Finished | Failed | Stopped | None = None

    @property
    def num_tokens(self) -> int:
        """Sampled tokens so far, those of the prefix included."""
        return len(self.prefix) + len(self.generation.tokens)

    @property
    def decodes(self) -> bool:
        return not self.generation.finished.done()

    def take_chunks(self) -> list[Chunk]:
        """Return its tokens since the last call, those of the prompt first."""
        chunks: list[Chunk] = []
        if not self.sent_prompt:
            self.sent_prompt = True
            chunks.append(self._chunk(0, self.prompt_ids))
        offset = len(self.prompt_ids) + len(self.prefix) + self.generation.num_taken
        for run in self.generation.take():
            chunks.append(self._chunk(offset, run.tokens, run.version, run.logprobs))
            offset += len(run.tokens)
        return chunks

    def resume(self, num_tokens: int) -> bool:
        """The buffer wants it and holds its first `num_tokens`: have `take_chunks` return the rest.

        False if that cannot be. The buffer's machine has lost power, and with it tokens of the
        prefix, of which this engine has no log-probabilities, or a cancel that was obeyed here.
        """
        num_given = len(self.prompt_ids) + len(self.prefix)
        self.sent_prompt = num_tokens > 0
        self.generation.rewind(max(0, num_tokens - num_given))
        self.cancelled = False
        has_all = num_tokens >= num_given or (num_tokens == 0 and not self.prefix)
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
