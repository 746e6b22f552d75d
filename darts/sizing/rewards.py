"""The rewards of a prompt's responses: its pass rate, and whether a group of them will differ.

Owns the whole memory of a prompt (three numbers) and of the pool of all prompts. A response is
right if its reward exceeds 0.5. A cancelled response shows only that it is longer than c, and long
responses differ from short ones in how often they are right. Counting the finished ones alone would
lean toward the short ones, so a cancelled response passes its weight on to those that ended with
more than c tokens. Never decides anything: `darts.state.pilot` reads the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

RIGHT_ABOVE = 0.5
POOL_MEMORY = 256.0  # groups that the pool averages over
MIN_PASS_RATE, MAX_PASS_RATE = 0.02, 0.98
MIN_STRENGTH, MAX_STRENGTH = 0.2, 10.0


class Response(NamedTuple):
    """A response with its reward, or None if it was cut off after `tokens`."""

    tokens: int
    reward: float | None

    @property
    def is_right(self) -> bool:
        return self.reward is not None and self.reward > RIGHT_ABOVE


@dataclass(frozen=True, slots=True)
class RewardStats:
    """Right and wrong responses of a prompt, which fade from group to group.

    `num_stops` is the number of its groups in a row that were stopped after their pilots.
    """

    num_right: float = 0.0
    num_wrong: float = 0.0
    num_stops: int = 0


@dataclass(frozen=True, slots=True)
class RewardPool:
    """All prompts. `weight` is a number of groups.

    `pass_rate` is the mean over groups, and `disagreement` the probability that only one of two
    responses to the same prompt is right.
    """

    weight: float
    pass_rate: float
    disagreement: float


POOL_PRIOR = RewardPool(weight=2.0, pass_rate=0.5, disagreement=0.25)
"""The pool before any group has closed. Half of the variance is between prompts."""


def pass_rate(responses: Sequence[Response]) -> tuple[float, float]:
    """The estimated share of right responses, and its weight in responses.

    Source: Kaplan-Meier, in Efron's form: each response that was cut off at c passes its weight on,
    in equal parts, to the responses that are longer. If none of them ended, the weight is lost.
    """
    ordered = sorted(responses, key=lambda r: (r.tokens, r.reward is None))
    left, right, num_left = 1.0, 0.0, len(ordered)
    for response in ordered:
        share = left / num_left
        num_left -= 1
        if response.reward is not None:
            right += share * response.is_right
            left -= share
    known = 1.0 - left
    if known <= 1e-9:
        return 0.0, 0.0
    rate = min(1.0, right / known)  # the two sums may differ in their last bits
    return rate, known * sum(r.reward is not None for r in ordered)


def update(
    stats: RewardStats | None,
    responses: Sequence[Response],
    num_stops: int,
    forgetting: float = 0.8,
) -> RewardStats:
    """A prompt's statistics after one more group. The old counts fade by `forgetting`."""
    old = stats or RewardStats()
    rate, weight = pass_rate(responses)
    return RewardStats(
        forgetting * old.num_right + weight * rate,
        forgetting * old.num_wrong + weight * (1.0 - rate),
        num_stops,
    )


def update_pool(pool: RewardPool, responses: Sequence[Response]) -> RewardPool:
    """The pool after one more group. Every group has the same weight."""
    rate, weight = pass_rate(responses)
    if weight < 2.0:  # one response cannot disagree with itself
        return pool
    disagreement = min(1.0, 2.0 * rate * (1.0 - rate) * weight / (weight - 1.0))
    step = 1.0 / (pool.weight + 1.0)
    return RewardPool(
        min(pool.weight + 1.0, POOL_MEMORY),
        pool.pass_rate + step * (rate - pool.pass_rate),
        pool.disagreement + step * (disagreement - pool.disagreement),
    )


def prior(stats: RewardStats | None, pool: RewardPool) -> tuple[float, float]:
    """The Beta distribution of a prompt's pass rate: its own history on top of the pool.

    The pool's strength follows from its disagreement: E[2p(1 - p)] = 2ab / ((a + b)(a + b + 1)).
    """
    mean = min(max(pool.pass_rate, MIN_PASS_RATE), MAX_PASS_RATE)
    share = min(pool.disagreement / (2.0 * mean * (1.0 - mean)), 0.99)
    strength = min(max(share / (1.0 - share), MIN_STRENGTH), MAX_STRENGTH)
    own = stats or RewardStats()
    return strength * mean + own.num_right, strength * (1.0 - mean) + own.num_wrong


def mixed_probability(
    beta: tuple[float, float], num_right: int, num_wrong: int, num_more: int
) -> float:
    """P(right and wrong responses both occur) once `num_more` are added to those seen.

    `beta` is the distribution of the pass rate before any of them. Its predictive distribution
    counts each added response, so the result includes the doubt about the pass rate.
    """
    if num_right and num_wrong:
        return 1.0
    a, b = beta[0] + num_right, beta[1] + num_wrong
    all_right = 0.0 if num_wrong else _run_probability(a, a + b, num_more)
    all_wrong = 0.0 if num_right else _run_probability(b, a + b, num_more)
    return max(0.0, 1.0 - all_right - all_wrong)


def _run_probability(count: float, total: float, num_more: int) -> float:
    """P(all of `num_more` responses are of one kind) under a Beta-binomial distribution."""
    return math.prod((count + i) / (total + i) for i in range(num_more))


def has_signal(rewards: Sequence[float], min_spread: float) -> bool:
    """Whether the rewards of a group differ by more than `min_spread`."""
    return bool(rewards) and max(rewards) - min(rewards) > min_spread
