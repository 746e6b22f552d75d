"""Checks in every step that the engines sample from the distribution that is trained.

Owns the bound on `train/logprob_diff` and the differences of the last steps. With equal weights,
engine and learner differ by rounding alone. A larger difference means a failed swap, another model
or another distribution, and every gradient after it is wrong. `learner.train` calls it before the
weights are changed, on every rank with the same sums.
"""

from __future__ import annotations

from collections import deque
from statistics import median_low

from configs.schema import Config
from learner.metrics import TokenSums

# Mean difference between engine and learner, in nats per token. Four tiny model families on CPU
# engines gave at most 4e-7 in float32, 0.001 in float16 and 0.007 in bfloat16, which engine and
# learner round in different places. A wrong swap gave at least 0.13.
DEFAULT_BOUNDS = {"float32": 0.005, "float16": 0.05, "bfloat16": 0.1}
# Added for responses in flight during a swap, which keep the key-value cache of the older weights.
# In the demo this makes a difference of 0.001.
IN_FLIGHT_NATS = 0.05
MEMORY = 3  # steps


class Disagreement(ArithmeticError):
    """Engines and learner give the same tokens different log-probabilities at equal weights."""


class Agreement:
    """The differences of the last steps, each relative to its allowance."""

    def __init__(self, config: Config) -> None:
        self._dtype = config.model.dtype
        self._bound = config.learner.max_logprob_diff or DEFAULT_BOUNDS[self._dtype]
        self._excesses: deque[float] = deque(maxlen=MEMORY)

    def judge(self, step: int, sums: TokenSums) -> None:
        """Raise `Disagreement` if the difference is too large.

        A step without tokens of the newest weights does not count. The check takes the mean over
        tokens, because single tokens round badly in bfloat16, and the lower median over three
        steps, because one odd step is no reason to end a run. The first step can thus stop a run by
        itself, and a later step only together with another one of three.
        """
        difference, in_flight = sums.current_difference()
        if difference is None:
            return
        allowed = self._bound + IN_FLIGHT_NATS * in_flight
        self._excesses.append(difference / allowed)
        if median_low(self._excesses) > 1:
            raise Disagreement(
                f"step {step}: engines and learner disagree by {difference:.3g} nats per token at "
                f"equal weights, and learner.max_logprob_diff allows {allowed:g} with "
                f"model.dtype={self._dtype}; the engines probably do not run the trained weights "
                "(this model's engine may not support swaps), or they sample from another "
                "distribution"
            )
