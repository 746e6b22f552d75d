"""The engine's half of the probe: log-probabilities of the fixed sequences.

They are those of its present weights. Driven by `actors.worker` after each load of weights, and by
`tools.check`.
"""

from __future__ import annotations

from array import array
from typing import Protocol

from buffer.wire.probe import probe_sequences


class Scorer(Protocol):
    """The part of `actors.inference.engine.Engine` that a probe uses."""

    @property
    def vocab_size(self) -> int: ...
    async def score(self, token_ids: list[int]) -> array[float]: ...


async def probe(engine: Scorer) -> bytes:
    """Log-probabilities of the probe's tokens at temperature 1, as float32. Raises `EngineDied`."""
    sequences = probe_sequences(engine.vocab_size)
    return b"".join([(await engine.score(sequence)).tobytes() for sequence in sequences])
