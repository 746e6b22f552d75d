"""Group-relative advantages. Pure; never sees tokens. Driven by `learner.packs.batch`."""

from __future__ import annotations

import math
from collections.abc import Sequence

EPSILON = 1e-6


def group_advantage(reward: float, group_rewards: Sequence[float], kind: str = "grpo") -> float:
    """How much better than its group a response was: (reward - mean) / (std + 1e-6).

    It is zero if all rewards are equal. Source: GRPO (arXiv 2402.03300), outcome supervision.
    Differs: `std` is the population's standard deviation, because the group is not a sample of a
    larger one. If `kind` is "dr_grpo", there is no division, since it favours prompts that are
    nearly always or nearly never answered correctly (arXiv 2503.20783).
    """
    if all(other == reward for other in group_rewards):
        return 0.0  # exactly, which a rounded mean does not guarantee
    mean = math.fsum(group_rewards) / len(group_rewards)
    if kind == "dr_grpo":
        return reward - mean
    variance = math.fsum((other - mean) ** 2 for other in group_rewards) / len(group_rewards)
    return (reward - mean) / (math.sqrt(variance) + EPSILON)
