"""Group-relative advantages, and the penalty of responses that come near the length limit.

Pure; never sees tokens. Driven by `buffer.learner_side`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from configs.objectives import Objective
from configs.schema import LossConfig

EPSILON = 1e-6


def group_advantages(rewards: Sequence[float], objective: Objective) -> list[float]:
    """How much better than its group each response was: (reward - baseline) / scale.

    All are zero if all rewards are equal. `objective.baseline` is the mean of the group, or of the
    other responses (leave_one_out). `objective.scale` is std, the standard deviation plus 1e-6, or
    none, 1.

    Source: GRPO (arXiv 2402.03300), outcome supervision; RLOO (arXiv 2402.14740) for the mean of
    the others; Dr. GRPO (arXiv 2503.20783) for no scale, since the deviation favours prompts that
    are nearly always or nearly never answered correctly. Differs: the deviation is the
    population's, because the group is not a sample of a larger one.
    """
    if all(reward == rewards[0] for reward in rewards):
        return [0.0] * len(rewards)  # exactly, which a rounded mean does not guarantee
    mean = math.fsum(rewards) / len(rewards)
    scale = 1.0
    if objective.scale == "std":
        variance = math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)
        scale = math.sqrt(variance) + EPSILON
    if objective.baseline == "leave_one_out":
        # reward - (sum - reward) / (n - 1)
        scale *= (len(rewards) - 1) / len(rewards)
    return [(reward - mean) / scale for reward in rewards]


def overlong_penalty(num_tokens: int, max_tokens: int, loss: LossConfig) -> float:
    """Addend to the reward of a response of `num_tokens`: 0, or negative near `max_tokens`.

    Source: DAPO (arXiv 2503.14476), equation 13, with `loss.overlong_factor` in place of 1.
    """
    if not loss.overlong_buffer:
        return 0.0
    excess = num_tokens - (max_tokens - loss.overlong_buffer)
    return -loss.overlong_factor * min(max(excess / loss.overlong_buffer, 0.0), 1.0)
