"""How many rollouts each prompt gets: M' between M and upper * M.

Owns the arithmetic of the budget rules, as pure functions. The published rule chooses a total for a
window of prompts by utility, and splits it among them by spread. The marginal rule is for engines
that never wait. Knows neither groups nor engines. `darts.core` calls it when it opens groups.

Lengths are in tokens, latencies in milliseconds, and budgets in rollouts. A prompt's `v` is its
spread over the pool's (`normalised_spread`). Gains and costs are fractions of the plain group's.
Source: DARTS (arXiv 2605.30859), adaptive redundancy allocation.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from configs.schema import LongEnd, largest_budget
from darts.sizing.latency import LatencyCurve
from darts.sizing.lengths import LengthStats, spread

# The length limit truncates lognormals wider than this.
MAX_TABLE_SPREAD, TABLE_STEPS = 2.0, 40


def normalised_spread(stats: LengthStats, pool: LengthStats) -> float:
    """v: a prompt's spread of log length over the pool's. An average prompt has 1.

    Differs from the published norm, which depends on the unit of length and on the other prompts in
    the window.
    """
    return spread(stats) / spread(pool)


def published_norm(sigmas: Sequence[float]) -> list[float]:
    """(sigma - min + 1) / (max - min) over a window, as published.

    All values are 1 if every sigma is the same. The added 1 has the unit of sigma: it vanishes if
    lengths are measured in tokens, and dominates if they are measured in thousands of tokens.
    """
    low, high = min(sigmas), max(sigmas)
    return (
        [1.0] * len(sigmas)
        if high == low
        else [(sigma - low + 1.0) / (high - low) for sigma in sigmas]
    )


# The published rule
# --------------------------------------------------------------------------------------------------


def rollout_time(sorted_lengths: Sequence[float], curve: LatencyCurve) -> float:
    """Milliseconds until all responses of these lengths have ended.

    They start together on one engine. T_rollout = sum_k (l_(k) - l_(k-1)) * PTL(M' - k + 1), as the
    batch between two ends is the set of rollouts that still decode.
    """
    num, time_ms, previous = len(sorted_lengths), 0.0, 0.0
    for ended, length in enumerate(sorted_lengths):
        if length < previous:
            raise ValueError(
                f"sorted_lengths[{ended}] = {length} is below its predecessor {previous}: lengths "
                "must ascend from 0"
            )
        if length > previous:
            time_ms += (length - previous) * curve.ptl(num - ended)
        previous = length
    return time_ms


def paper_total(
    window: Sequence[LengthStats],
    curve: LatencyCurve,
    M: int,
    upper: float,
    price: float,
    num_engines: int = 1,
) -> int:
    """M_total = N * m for the best mean budget m in M .. upper * M.

    The best m maximises U(m) = E(m) - price * T(m), and the smaller one wins a tie.

    E(m) = 1 - M/m is the share of the plain sum(norm/M) that a mean budget of m takes off the
    split's objective. T(m) = R(m)/R(M) - 1, where R is the `rollout_time` of the window's expected
    order statistics (each prompt's fitted lognormal at Blom's plotting positions) on one of
    `num_engines` engines that share the window evenly. Both are fractions, so `price` has no unit.
    Differs: the paper leaves E, T and lambda without units.
    """
    if not window or num_engines < 1:
        raise ValueError(
            f"a window of {len(window)} prompts on {num_engines} engines: both must be at least "
            "1, or nothing can be timed"
        )
    budgets = range(M, max(M, largest_budget(M, upper)) + 1)
    num_longest = len(window) * budgets[-1]
    ptl = np.array([curve.ptl(batch / num_engines) for batch in range(1, num_longest + 1)])
    times = [_window_time(window, m, ptl) for m in budgets]
    utility = [
        1.0 - M / m - price * (time / times[0] - 1.0)
        for m, time in zip(budgets, times, strict=True)
    ]
    return len(window) * budgets[int(np.argmax(utility))]


def _window_time(window: Sequence[LengthStats], m: int, ptl: np.ndarray) -> float:
    """`rollout_time` of N * m expected lengths, given PTL of every batch."""
    scores = np.array(_normal_scores(m))
    lengths = np.sort(
        np.concatenate([np.exp(stats.mean_log + spread(stats) * scores) for stats in window])
    )
    return float(np.diff(lengths, prepend=0.0) @ ptl[len(lengths) - 1 :: -1])


@lru_cache(maxsize=256)
def _normal_scores(m: int) -> tuple[float, ...]:
    """Expected order statistics of m standard normals, by Blom's approximation."""
    normal = NormalDist()
    return tuple(normal.inv_cdf((k - 0.375) / (m + 0.25)) for k in range(1, m + 1))


def paper_split(norms: Sequence[float], total: int, lower: int, upper: int) -> list[int]:
    """Budgets that minimise sum norms[i] / M'_i with sum M'_i = total and lower <= M'_i <= upper.

    The problem is convex and separable, so it is optimal to give rollouts one by one to the prompt
    that gains most, v/m - v/(m+1). The earlier prompt wins a tie.
    """
    num = len(norms)
    if not num * lower <= total <= num * upper:
        raise ValueError(
            f"total {total} must lie in {num * lower}..{num * upper} ({num} prompts of "
            f"{lower}..{upper} rollouts)"
        )
    budgets = [lower] * num
    gains = [(-v / (lower * (lower + 1)), i) for i, v in enumerate(norms)] if upper > lower else []
    heapq.heapify(gains)
    for _ in range(total - num * lower):
        _, i = gains[0]
        budgets[i] += 1
        if budgets[i] < upper:
            heapq.heapreplace(gains, (-norms[i] / (budgets[i] * (budgets[i] + 1)), i))
        else:
            heapq.heappop(gains)
    return budgets


# The marginal rule
# --------------------------------------------------------------------------------------------------


def marginal_budget(
    stats: LengthStats,
    v: float,
    elasticity: float,
    price: float,
    M: int,
    num_long: int,
    long_end: LongEnd,
    max_budget: int,
) -> int:
    """The m in M .. max_budget with the greatest worth. The larger one wins a tie.

    The worth of m is v * (1/M - 1/m) - price * elasticity * net_tokens(m). `stats` is the prompt's
    shrunk estimate, and `elasticity` its engine's at the batch that it would have.

    If each further rollout costs at least as much as the one before, this is the rule "from m to
    m+1 while v/(m(m+1)) >= price * eps * dtok(m)", with dtok(m) = net_tokens(m+1) - net_tokens(m).
    Differs from it because under `survivor` the first extra rollout costs most: nothing can be
    cancelled yet. A step-by-step search would stop there, although a larger budget saves tokens if
    the spread is wide.
    """
    if max_budget <= M:
        return M
    rate = price * elasticity
    extra = _net_tokens_row(spread(stats), M, num_long, long_end, max_budget)
    best, best_worth = M, 0.0
    for m in range(M + 1, max_budget + 1):
        worth = v * (1.0 / M - 1.0 / m) - rate * extra[m - M]
        if worth >= best_worth:
            best, best_worth = m, worth
    return best


def net_tokens(spread_log: float, M: int, num_long: int, long_end: LongEnd, m: int) -> float:
    """Expected tokens of a group of m over those of the plain group of M, minus 1.

    In the plain group, all M finish. The m rollouts have lognormal lengths and start together on
    one engine. `darts.long_end` decides which of them are cancelled when M have finished:

    - none: all others. The same holds for `darts.cancel=eager`, and for survivor without a long
      seat.
    - survivor: all others but one, and each is equally likely to be that one.
    - longest: no rollout.
    """
    return _net_tokens_row(spread_log, M, num_long, long_end, m)[m - M]


def _net_tokens_row(
    spread_log: float, M: int, num_long: int, long_end: LongEnd, max_budget: int
) -> list[float]:
    """`net_tokens` of M .. max_budget, interpolated between the table's spreads."""
    if long_end == "longest":
        return [m / M - 1.0 for m in range(M, max_budget + 1)]
    table = _net_tokens_table(M, max_budget, long_end == "survivor" and num_long > 0)
    place = min(max(spread_log, 0.0), MAX_TABLE_SPREAD) / MAX_TABLE_SPREAD * TABLE_STEPS
    below = min(int(place), TABLE_STEPS - 1)
    share = place - below
    return [
        low + share * (high - low) for low, high in zip(table[below], table[below + 1], strict=True)
    ]


@lru_cache(maxsize=32)
def _net_tokens_table(M: int, max_budget: int, survivor: bool) -> list[list[float]]:
    """`net_tokens` with one row per spread 0 .. MAX_TABLE_SPREAD and one column per budget.

    Computed from expected order statistics by quadrature, once per configuration, in a few
    milliseconds. The j-th smallest of m standard normals has density
    m!/((j-1)!(m-j)!) P^(j-1) Q^(m-j) phi. A length is exp(spread * z), and the median cancels.
    """
    z = np.linspace(-9.0, 13.0, 1101)
    below = np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in z])
    above = np.array([0.5 * math.erfc(x / math.sqrt(2.0)) for x in z])
    mass = np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi) * (z[1] - z[0])
    spreads = np.linspace(0.0, MAX_TABLE_SPREAD, TABLE_STEPS + 1)
    lengths = np.exp(np.outer(z, spreads))
    mean = np.exp(0.5 * spreads**2)
    table = np.zeros((len(spreads), max_budget - M + 1))
    for m in range(M + 1, max_budget + 1):
        counts = [math.comb(m - 1, j - 1) * m for j in range(1, M + 1)]
        density = (
            np.array(
                [
                    count * below ** (j - 1) * above ** (m - j)
                    for j, count in enumerate(counts, start=1)
                ]
            )
            * mass
        )
        shortest = density @ lengths  # [M, spreads]: expected j-th smallest
        finished, cut = shortest.sum(axis=0), shortest[-1]
        rest = (m * mean - finished) / (m - M)
        tokens = finished + (m - M) * cut + ((rest - cut) if survivor else 0.0)
        table[:, m - M] = tokens / (M * mean) - 1.0
    return table.tolist()
