"""The lengths of a prompt's responses: a lognormal, fitted to exact lengths and lower bounds.

Owns the whole memory of a prompt (three numbers) and of the pool of all prompts. A cancelled or
truncated rollout shows only that its length exceeds c. Ignoring it, or using c as its length, loses
half of the spread for the prompts whose budgets depend on it most. Each group is therefore fitted
by expectation-maximisation on right-censored data. Never decides anything: `darts.core` calls it
once per closed group, and `darts.sizing.redundancy` reads the result. Lengths are in sampled
tokens, and logs are natural.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# A spread outside 0.01 .. 3 is noise of tiny samples, not a length distribution.
MIN_VAR_LOG, MAX_VAR_LOG = 1e-4, 9.0
MAX_MEAN_LOG = 16.0  # nine million tokens; only prompts whose rollouts never finish come near it
# Weight of the pool, in observations. Prompts differ more in mean length than in spread.
MEAN_STRENGTH, VAR_STRENGTH = 1.0, 4.0
EM_STEPS, EM_TOLERANCE = 8, 1e-3
POOL_MEMORY = 256.0  # prompts that the pool averages over


@dataclass(frozen=True, slots=True)
class LengthStats:
    """Lognormal moments and their weight: observations for a prompt, prompts for the pool."""

    weight: float
    mean_log: float
    var_log: float


POOL_PRIOR = LengthStats(weight=2.0, mean_log=math.log(256.0), var_log=0.64)
"""The pool before any group has closed. It counts as two prompts.

Its median is 256 tokens, and two thirds of its responses lie within 115 .. 570.
"""


def update(
    stats: LengthStats | None,
    finished: Sequence[int],
    censored: Sequence[int],
    pool: LengthStats,
    forgetting: float = 0.8,
) -> LengthStats:
    """A prompt's statistics after one more group.

    `finished` lengths are exact, and `censored` ones are lower bounds. The old statistics count as
    `forgetting * weight` observations. Spread is measured about each group's own mean, so that a
    drifting mean is not counted as spread. Iterating the E-step from group to group (online EM)
    leaves the maximum-likelihood solution as the only fixed point. The pool stabilises the E-step
    and is not stored in the result.
    """
    if not finished and not censored:
        return LengthStats(0.0, pool.mean_log, pool.var_log) if stats is None else stats
    old = LengthStats(0.0, pool.mean_log, pool.var_log) if stats is None else stats
    old_weight = forgetting * old.weight
    exact = [math.log(max(1, length)) for length in finished]
    bounds = [math.log(max(1, length)) for length in censored]
    weight = old_weight + len(exact) + len(bounds)
    guess = estimate(old, pool)
    new = old
    for _ in range(EM_STEPS if bounds else 1):
        total, deviations = _expected_moments(exact, bounds, guess)
        num = len(exact) + len(bounds)
        mean_log = (old_weight * old.mean_log + total) / weight
        degrees = old_weight + num - 1
        learnt = exact and degrees > 0  # bounds alone carry no information about spread
        var_log = (old_weight * old.var_log + deviations) / degrees if learnt else old.var_log
        new = LengthStats(
            weight, _clip(mean_log, 0.0, MAX_MEAN_LOG), _clip(var_log, MIN_VAR_LOG, MAX_VAR_LOG)
        )
        previous, guess = guess, estimate(new, pool)
        if (
            abs(guess.mean_log - previous.mean_log) + abs(guess.var_log - previous.var_log)
            < EM_TOLERANCE
        ):
            break
    return new


def estimate(stats: LengthStats | None, pool: LengthStats) -> LengthStats:
    """The prompt's statistics, shrunk toward the pool's.

    They equal the pool's before its first group, and are almost entirely its own after many groups.
    """
    if stats is None:
        return LengthStats(0.0, pool.mean_log, pool.var_log)
    mean_log = (stats.weight * stats.mean_log + MEAN_STRENGTH * pool.mean_log) / (
        stats.weight + MEAN_STRENGTH
    )
    # Variances are averaged as logs: they are scales, and one group's may be off by a factor.
    log_var = (stats.weight * math.log(stats.var_log) + VAR_STRENGTH * math.log(pool.var_log)) / (
        stats.weight + VAR_STRENGTH
    )
    return LengthStats(stats.weight, mean_log, math.exp(log_var))


def update_pool(pool: LengthStats, stats: LengthStats) -> LengthStats:
    """The pool after one more closed group, whose prompt now has `stats`.

    These are as `update` returned them, not shrunk. Every prompt has the same weight. The average
    is exponential over the last `POOL_MEMORY` of them. `var_log` is thus the mean spread *within* a
    prompt, which determines budgets, not the far wider spread between prompts.
    """
    step = 1.0 / (pool.weight + 1.0)
    return LengthStats(
        min(pool.weight + 1.0, POOL_MEMORY),
        pool.mean_log + step * (stats.mean_log - pool.mean_log),
        pool.var_log + step * (stats.var_log - pool.var_log),
    )


def spread(stats: LengthStats) -> float:
    """Standard deviation of log length: the published method's sigma, without a unit."""
    return math.sqrt(stats.var_log)


def expected_length(stats: LengthStats, limit: int) -> float:
    """Mean number of tokens of a response that is cut at `limit`."""
    sigma = spread(stats)
    z = (math.log(max(1, limit)) - stats.mean_log) / sigma
    below = math.exp(min(stats.mean_log + 0.5 * stats.var_log, 700.0)) * _upper_tail(sigma - z)
    return min(below + limit * _upper_tail(z), float(limit))


def length_std(stats: LengthStats, limit: int) -> float:
    """Standard deviation, in tokens, of a response that is cut at `limit`: sigma as published."""
    sigma = spread(stats)
    z = (math.log(max(1, limit)) - stats.mean_log) / sigma
    square = math.exp(min(2.0 * (stats.mean_log + stats.var_log), 700.0)) * _upper_tail(
        2.0 * sigma - z
    ) + limit**2 * _upper_tail(z)
    return math.sqrt(max(0.0, square - expected_length(stats, limit) ** 2))


def _expected_moments(
    exact: list[float], bounds: list[float], guess: LengthStats
) -> tuple[float, float]:
    """E-step: the expected sums of the logs, and of their squared deviations from their mean."""
    sigma = math.sqrt(guess.var_log)
    values, doubt = list(exact), 0.0
    for bound in bounds:
        z = (bound - guess.mean_log) / sigma
        hazard = _hazard(z)
        values.append(max(bound, guess.mean_log + sigma * hazard))
        doubt += max(0.0, guess.var_log * (1.0 + z * hazard - hazard * hazard))
    total = math.fsum(values)
    mean = total / len(values)
    deviations = math.fsum((value - mean) ** 2 for value in values)
    return total, deviations + doubt * (1.0 - 1.0 / len(values))


def _hazard(z: float) -> float:
    """Standard normal density over upper tail: the mean of a normal that is known to exceed z."""
    if z > 25.0:  # both underflow further out
        return z + 1.0 / z - 2.0 / z**3
    return math.exp(-0.5 * z * z) / (math.sqrt(2.0 * math.pi) * _upper_tail(z))


def _upper_tail(z: float) -> float:
    return 0.5 * math.erfc(z / math.sqrt(2.0))


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
