"""Checks at each version that every engine computes the same numbers as the learner.

Owns the log-probabilities of the probe that learner and engines sent, and the verdict on them. An
engine's base weights are those of version 0, so it is also compared before its first swap. Driven
by `buffer.engine_side` and `buffer.learner_side`; never sees a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from buffer.wire.messages import Probed
from buffer.wire.probe import BROKEN_SWAP, OTHER_NUMBERS, allowed_difference, difference
from configs.schema import Config
from darts.events import ProtocolError

BASE_VERSION = -1  # the weights of an engine at its start: `model.path`, as version 0
NUM_KEPT = 8  # versions; an engine further behind is compared at its next version


class ProbeFailed(Exception):
    """Engine and learner disagree. One line: model type, check, numbers and remedy."""


@dataclass(frozen=True)
class Comparison:
    """An engine's newest comparison. `first`: it is the first one after a swap of this engine."""

    nats: float
    first: bool


class Probes:
    """The probe's log-probabilities of one run, and each engine's newest difference."""

    def __init__(self, config: Config) -> None:
        self._allowed, self._dtype = allowed_difference(config), config.model.dtype
        self._of_learner: dict[int, bytes] = {}
        self._nats: dict[str, float] = {}  # the newest difference of each engine
        self._loaded: set[str] = set()  # engines of which a swap has worked

    def published(self, version: int, logprobs: bytes) -> None:
        """Take the learner's log-probabilities, which it sends with the publication."""
        self._of_learner[version] = logprobs
        for old in sorted(self._of_learner)[1:-NUM_KEPT]:  # version 0 is kept for late engines
            del self._of_learner[old]

    def probed(self, engine_id: str, message: Probed) -> Comparison | None:
        """Compare an engine's log-probabilities. None if the learner's are unknown.

        Raises `ProbeFailed`, or `ProtocolError` if they do not belong to the probe's tokens.
        """
        base = message.version == BASE_VERSION
        expected = self._of_learner.get(0 if base else message.version)
        if not expected:
            return None
        if len(message.logprobs) != len(expected):
            raise ProtocolError(
                f"engine {engine_id} sends {len(message.logprobs)} bytes of log-probabilities of "
                f"the probe, but the learner sent {len(expected)}"
            )
        nats = difference(message.logprobs, expected)
        if not nats <= self._allowed:
            self._fail(engine_id, message, nats)
        self._nats[engine_id] = nats
        first = not base and engine_id not in self._loaded
        if not base:
            self._loaded.add(engine_id)
        return Comparison(nats, first)

    def row(self) -> dict[str, float]:
        """For `metrics.jsonl`: the largest of the engines' newest differences."""
        return {"probe/logprob_diff": max(self._nats.values())} if self._nats else {}

    def forget(self, engine_id: str) -> None:
        """Forget an engine that is gone. A new one of its name has no history."""
        self._nats.pop(engine_id, None)
        self._loaded.discard(engine_id)

    def _fail(self, engine_id: str, message: Probed, nats: float) -> None:
        was_right = engine_id in self._nats  # with earlier weights, so the swap is to blame
        check = f"after loading version {message.version}" if was_right else "before any swap"
        raise ProbeFailed(
            f"{message.model_type} models are refused: engine {engine_id} and learner differ by "
            f"{nats:.1e} nats per token {check} (allowed: {self._allowed:g} with "
            f"model.dtype={self._dtype}); {BROKEN_SWAP if was_right else OTHER_NUMBERS}"
        )
