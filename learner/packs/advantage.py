"""Group-relative advantages. Pure; never sees tokens. Driven by `learner.packs.batch`."""

from __future__ import annotations

import math
from collections.abc import Sequence

EPSILON = 1e-6


def group_advantage(reward: float, group_rewards: Sequence[float], kind: str = "grpo") -> float:
    """How much better than its group a response was: (reward - mean) / (std + 1e-6), std over the
    group as a population.

    Zero where all rewards are equal. Source: GRPO (arXiv 2402.03300), outcome supervision.
    Differs: the population's standard deviation, because the group is all there is, not a sample of
    it. `kind` "dr_grpo" leaves out the division, which favours prompts that are nearly always or
    nearly never answered (arXiv 2503.20783).
    """
    if all(other == reward for other in group_rewards):
        return 0.0  # exactly, where a rounded mean would leave a trace
    mean = math.fsum(group_rewards) / len(group_rewards)
    if kind == "dr_grpo":
        return reward - mean
    variance = math.fsum((other - mean) ** 2 for other in group_rewards) / len(group_rewards)
    return (reward - mean) / (math.sqrt(variance) + EPSILON)
