"""The engine's half of the probe: its present weights' log-probabilities of the fixed sequences.

Driven by `actors.worker` whenever weights have been loaded, and by `tools.check`.
"""

from __future__ import annotations

from array import array
from typing import Protocol

from buffer.wire.probe import probe_sequences


class Scorer(Protocol):
    """The part of an engine that a probe uses: `actors.inference.engine.Engine`, or a fake in its place."""

    @property
    def vocab_size(self) -> int: ...
    async def score(self, token_ids: list[int]) -> array[float]: ...


async def probe(engine: Scorer) -> bytes:
    """Log-probabilities of the probe's tokens at temperature 1, as float32. Raises `EngineDied`."""
    sequences = probe_sequences(engine.vocab_size)
    return b"".join([(await engine.score(sequence)).tobytes() for sequence in sequences])
