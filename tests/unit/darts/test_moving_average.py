"""`redundancy.variance=ema`: the moving averages of mean and spread, as published."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darts import events as ev
from darts.config import CoreConfig
from darts.core import Core
from darts.sizing import moving_average
from darts.sizing.budgets import Budgeter
from darts.sizing.lengths import LengthStats
from darts.sizing.redundancy import published_norm

GROUPS = st.lists(st.lists(st.integers(1, 30_000), min_size=2, max_size=16), min_size=1, max_size=6)


@given(GROUPS, st.floats(0.05, 1.0))
def test_the_spread_is_the_moving_average_of_each_groups_standard_deviation(
    groups: list[list[int]], alpha: float
) -> None:
    stats: LengthStats | None = None
    mean = std = 0.0
    for number, lengths in enumerate(groups):
        share = alpha if number else 1.0
        mean += share * (fmean(lengths) - mean)
        std = max(std + share * (stdev(lengths) - std), 0.01 * mean)  # the least spread of a fit
        stats = moving_average.update(stats, lengths, alpha)
        assert moving_average.mean(stats) == pytest.approx(mean)
        assert moving_average.std(stats) == pytest.approx(std, rel=1e-2)


@given(GROUPS)
def test_an_unknown_prompt_takes_the_mean_of_the_known(groups: list[list[int]]) -> None:
    known = [moving_average.update(None, lengths, 0.3) for lengths in groups]
    pool = moving_average.POOL_PRIOR
    for stats in known:
        pool = moving_average.update_pool(pool, stats)
    guess = moving_average.estimate(None, pool)
    assert moving_average.mean(guess) == pytest.approx(fmean(map(moving_average.mean, known)))
    assert moving_average.std(guess) == pytest.approx(
        fmean(map(moving_average.std, known)), rel=1e-2
    )
    assert moving_average.estimate(known[0], pool) is known[0]


def test_the_published_split_reads_sigma_in_tokens_uncut() -> None:
    """Even where the lognormal with these moments would reach beyond the limit."""
    budgeter = Budgeter(
        rule="paper", group_size=8, num_long=1, long_end="longest", upper=2.0, price=0.3,
        max_tokens=512, variance="ema",
    )  # fmt: skip
    groups = [[10, 510] * 4, [200, 300] * 4, [100, 110] * 4]
    window = [moving_average.update(None, lengths, 0.3) for lengths in groups]
    sigmas = [budgeter.sigma(stats) for stats in window]
    assert sigmas == pytest.approx([stdev(lengths) for lengths in groups])
    assert published_norm(sigmas)[0] == pytest.approx(1.0 + 1.0 / (sigmas[0] - sigmas[2]))


def learned(variance: str) -> LengthStats:
    """The pool after one group of lengths 10 and 30, with a third rollout cancelled at 31."""
    core = Core(
        CoreConfig(
            groups_per_step=1, group_size=2, redundancy="fixed", upper=1.5, long_end="none",
            num_long=0, variance="ema" if variance == "ema" else "censored",
        )
    )  # fmt: skip
    for event in (
        ev.PolicyPublished(0),
        ev.EngineJoined("engine", "type", 3, 0),
        ev.PromptsDrawn((ev.Prompt("p"),)),
        ev.ShardsRequested(0),
    ):
        core.handle(event)
    a, b, c = sorted(core.rollouts)
    core.handle(ev.RolloutFinished(a, 10, False, 1.0, 0))
    core.handle(ev.RolloutFinished(b, 30, False, 0.0, 0))
    decisions = core.handle(ev.RolloutProgressed(c, 31))
    assert ev.Cancel in map(type, decisions)
    return core.memory.lengths


def test_a_cancelled_rollout_counts_only_if_censored() -> None:
    ema, censored = learned("ema"), learned("censored")
    assert moving_average.mean(ema) == pytest.approx(20.0)
    assert moving_average.std(ema) == pytest.approx(math.sqrt(200.0))
    assert moving_average.mean(censored) > 25.0
