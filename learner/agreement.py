"""Whether the engines sample from the very distribution that is trained, judged step by step.

Owns the bound on `train/logprob_diff` and the memory of a few steps. With equal weights on both
sides, engine and learner differ by rounding alone: a larger difference is a swap gone wrong,
another model, or another distribution, and every gradient after it is wrong. Never stops a run by
itself: `learner.train` calls it before the weights are touched, on every rank with the same sums.
"""

from __future__ import annotations

from collections import deque
from statistics import median_low

from configs.schema import Config
from learner.metrics import TokenSums

# Mean nats per token between engine and learner. Four tiny families on CPU engines gave at most
# 4e-7 in float32, 0.001 in float16 and 0.007 in bfloat16, which engine and learner round in
# different places; a wrong swap gave 0.13 and more.
DEFAULT_BOUNDS = {"float32": 0.005, "float16": 0.05, "bfloat16": 0.1}
# A response that was in flight while weights were swapped keeps the key-value cache of the older
# ones. In the demo this makes 0.001.
IN_FLIGHT_NATS = 0.05
MEMORY = 3  # steps


class Disagreement(ArithmeticError):
    """Engines and learner give the same tokens different log-probabilities at equal weights."""


class Agreement:
    """The last steps' differences, each relative to what is allowed of it."""

    def __init__(self, config: Config) -> None:
        self._dtype = config.model.dtype
        self._bound = config.learner.max_logprob_diff or DEFAULT_BOUNDS[self._dtype]
        self._excesses: deque[float] = deque(maxlen=MEMORY)

    def judge(self, step: int, sums: TokenSums) -> None:
        """Raise `Disagreement` if the difference is too large.

        A step without tokens of the newest weights does not count. The mean over tokens is judged,
        because single tokens round badly in bfloat16, and the lower median over three steps,
        because one odd step is no reason to end a run. So the first step can stop a run by itself,
        and a later one only together with another among three.
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
                f"model.dtype={self._dtype}; probably the engines do not run the weights that are "
                "trained (a swap that this model's engine does not support), or sample from "
                "another distribution"
            )
