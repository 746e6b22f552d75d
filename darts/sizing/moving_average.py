"""The lengths of a prompt's responses as published: moving averages of mean and spread in tokens.

The rival of `darts.sizing.lengths`, whose form of statistics it shares, so that budgets and the
journal need not know which of the two made them: a lognormal with these moments. Never decides
anything. `darts.state.memory` calls it if `redundancy.variance=ema`.
Source: DARTS (arXiv 2605.30859), adaptive redundancy allocation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev

from darts.sizing import lengths
from darts.sizing.lengths import MIN_VAR_LOG, POOL_MEMORY, LengthStats

POOL_PRIOR = replace(lengths.POOL_PRIOR, weight=0.0)
"""The pool before any group has closed. It is no known prompt, so the first one replaces it."""


def mean(stats: LengthStats) -> float:
    """The moving average of a prompt's mean length, in tokens."""
    return math.exp(stats.mean_log + 0.5 * stats.var_log)


def std(stats: LengthStats) -> float:
    """sigma: the moving average of the standard deviation of a prompt's lengths, in tokens."""
    return mean(stats) * math.sqrt(math.expm1(stats.var_log))


def update(stats: LengthStats | None, ended: Sequence[int], alpha: float) -> LengthStats:
    """A prompt's statistics after one more group, whose responses ended at these lengths.

    At least two, or there is no standard deviation. The group counts `alpha`, and everything before
    it 1 - `alpha`. The first group counts fully. Cancelled responses are ignored, so a rule that
    cancels long responses sees a spread that is too small; `darts.sizing.lengths` corrects that.
    """
    num, group = float(len(ended)), (max(1.0, fmean(ended)), stdev(ended))
    if stats is None:
        return _stats(num, *group)
    return _blend(stats, group, alpha, stats.weight + num)


def update_pool(pool: LengthStats, stats: LengthStats) -> LengthStats:
    """The pool after one more group, whose prompt now has `stats`: the mean of the known prompts.

    Differs: the average is exponential over the last `POOL_MEMORY` groups, since the pool knows no
    single prompts.
    """
    weight = pool.weight + 1.0
    return _blend(pool, (mean(stats), std(stats)), 1.0 / weight, min(weight, POOL_MEMORY))


def estimate(stats: LengthStats | None, pool: LengthStats) -> LengthStats:
    """The prompt's own statistics, or the pool's if it has none."""
    return stats or LengthStats(0.0, pool.mean_log, pool.var_log)


def _blend(old: LengthStats, new: tuple[float, float], share: float, weight: float) -> LengthStats:
    """Mean and standard deviation move toward `new` by `share` of the way."""
    old_mean, old_std = mean(old), std(old)
    return _stats(
        weight, old_mean + share * (new[0] - old_mean), old_std + share * (new[1] - old_std)
    )


def _stats(weight: float, mean_tokens: float, std_tokens: float) -> LengthStats:
    """The lognormal with these moments."""
    var_log = max(math.log1p((std_tokens / mean_tokens) ** 2), MIN_VAR_LOG)
    return LengthStats(weight, math.log(mean_tokens) - 0.5 * var_log, var_log)
