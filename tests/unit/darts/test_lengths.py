"""Length statistics from censored groups: the tracked moments against the true ones."""

import math
import random
from statistics import fmean, pstdev

import pytest

from darts.sizing.lengths import (
    MAX_MEAN_LOG,
    POOL_PRIOR,
    LengthStats,
    estimate,
    expected_length,
    length_std,
    spread,
    update,
    update_pool,
)

POOL = LengthStats(weight=256.0, mean_log=6.0, var_log=0.5)


def survivor_group(
    rng: random.Random, mean_log: float, sigma: float, budget: int = 12, M: int = 8
) -> tuple[list[int], list[int]]:
    """Once M have finished, one of the others, drawn uniformly, runs on and the rest are cut."""
    lengths = sorted(max(1, round(rng.lognormvariate(mean_log, sigma))) for _ in range(budget))
    stragglers = lengths[M:]
    survivor = [stragglers[rng.randrange(len(stragglers))]] if stragglers else []
    return lengths[:M] + survivor, [lengths[M - 1]] * (len(stragglers) - len(survivor))


def eager_group(
    rng: random.Random, mean_log: float, sigma: float, budget: int = 16, M: int = 8
) -> tuple[list[int], list[int]]:
    """Once M have finished, all others are cut at once."""
    lengths = sorted(max(1, round(rng.lognormvariate(mean_log, sigma))) for _ in range(budget))
    return lengths[:M], [lengths[M - 1]] * (budget - M)


def tracked_spread(
    draw, groups: int, seed: int, mean_log: float = 6.0, sigma: float = 1.0
) -> float:
    rng, stats = random.Random(seed), None
    for _ in range(groups):
        finished, censored = draw(rng, mean_log, sigma)
        stats = update(stats, finished, censored, POOL)
    return spread(estimate(stats, POOL))


@pytest.mark.parametrize("draw", [survivor_group, eager_group])
def test_tracks_the_spread_of_a_wide_prompt_through_its_cuts(draw):
    tracked = fmean(tracked_spread(draw, groups=6, seed=seed) for seed in range(60))
    assert tracked == pytest.approx(1.0, rel=0.1)


def test_ignoring_the_cuts_would_lose_half_of_the_spread():
    rng = random.Random(0)
    naive = fmean(
        pstdev(math.log(length) for length in eager_group(rng, 6.0, 1.0)[0]) for _ in range(60)
    )
    assert naive < 0.6


def test_treating_a_cut_as_a_length_would_lose_half_of_the_spread():
    rng = random.Random(0)
    groups = [eager_group(rng, 6.0, 1.0) for _ in range(60)]
    assert (
        fmean(
            pstdev(math.log(length) for length in finished + censored)
            for finished, censored in groups
        )
        < 0.6
    )


def test_tracks_the_mean_through_its_cuts():
    rng, means = random.Random(1), []
    for _ in range(60):
        stats = None
        for _ in range(6):
            stats = update(stats, *eager_group(rng, 7.0, 1.0), POOL)
        means.append(estimate(stats, POOL).mean_log)
    assert fmean(means) == pytest.approx(7.0, abs=0.15)


def test_without_cuts_the_moments_are_those_of_the_sample():
    stats = update(None, [10, 100, 1000], [], POOL)
    assert stats.weight == 3.0
    assert stats.mean_log == pytest.approx(math.log(100))
    assert stats.var_log == pytest.approx(math.log(10) ** 2)


def test_a_drifting_mean_is_followed_and_does_not_inflate_the_spread():
    rng, stats = random.Random(2), None
    for step in range(30):
        stats = update(stats, *survivor_group(rng, 8.0 - 0.1 * step, 0.5), POOL)
    assert estimate(stats, POOL).mean_log == pytest.approx(5.1, abs=0.5)
    assert spread(estimate(stats, POOL)) == pytest.approx(0.5, rel=0.3)


def test_a_changed_spread_is_followed():
    rng, stats = random.Random(3), None
    for sigma in [1.2] * 10 + [0.3] * 15:
        stats = update(stats, *survivor_group(rng, 6.0, sigma), POOL)
    assert spread(estimate(stats, POOL)) < 0.5


def test_forgetting_bounds_the_weight():
    stats = None
    for _ in range(200):
        stats = update(stats, [100] * 8, [], POOL, forgetting=0.8)
    assert stats.weight == pytest.approx(8 / (1 - 0.8))


def test_an_unseen_prompt_takes_the_statistics_of_the_pool():
    seen = estimate(None, POOL)
    assert (seen.weight, seen.mean_log, seen.var_log) == (0.0, POOL.mean_log, POOL.var_log)


def test_shrinkage_fades_with_weight():
    few, many = (estimate(LengthStats(weight, 4.0, 2.0), POOL) for weight in (2.0, 200.0))
    assert POOL.var_log < few.var_log < many.var_log < 2.0
    assert POOL.mean_log > few.mean_log > many.mean_log > 4.0


@pytest.mark.parametrize(
    "finished, censored",
    [
        ([0], []),
        ([1], [1]),
        ([5] * 8, []),
        ([], [512] * 8),
        ([], [0]),
        ([10**7], [1]),
        ([1], [10**7] * 11),
        ([1, 10**7], []),
    ],
)
def test_unusual_groups_give_finite_plausible_numbers(finished, censored):
    stats = None
    for _ in range(50):
        stats = update(stats, finished, censored, POOL)
    assert 0.0 <= stats.mean_log <= MAX_MEAN_LOG
    assert 0.01 <= spread(estimate(stats, POOL)) <= 3.0
    assert 0.0 < expected_length(estimate(stats, POOL), 512) <= 512.0


def test_a_prompt_that_is_always_truncated_is_known_to_be_long():
    stats = None
    for _ in range(5):
        stats = update(stats, [], [512] * 8, POOL)
    assert expected_length(estimate(stats, POOL), 512) > 400
    assert stats.var_log == pytest.approx(POOL.var_log)  # bounds alone say nothing about the spread


def test_an_empty_group_changes_nothing():
    stats = LengthStats(8.0, 5.0, 0.3)
    assert update(stats, [], [], POOL) == stats


def test_the_pool_learns_the_spread_within_prompts_not_between_them():
    rng, pool = random.Random(4), POOL_PRIOR
    for _ in range(300):
        finished, censored = survivor_group(rng, rng.gauss(6.0, 2.0), 0.5)
        pool = update_pool(pool, update(None, finished, censored, pool))
    assert spread(pool) == pytest.approx(0.5, rel=0.15)
    assert pool.mean_log == pytest.approx(6.0, abs=0.4)


def test_the_pool_forgets():
    pool = LengthStats(weight=256.0, mean_log=9.0, var_log=2.0)
    for _ in range(2000):
        pool = update_pool(pool, LengthStats(8.0, 5.0, 0.25))
    assert pool.mean_log == pytest.approx(5.0, abs=0.01)
    assert spread(pool) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("sigma, limit", [(0.3, 512), (1.0, 512), (1.0, 120), (1.5, 4096)])
def test_length_std_is_that_of_the_cut_lognormal(sigma, limit):
    rng = random.Random(6)
    drawn = [min(limit, rng.lognormvariate(5.0, sigma)) for _ in range(40_000)]
    assert length_std(LengthStats(1.0, 5.0, sigma**2), limit) == pytest.approx(
        pstdev(drawn), rel=0.02
    )


@pytest.mark.parametrize("sigma, limit", [(0.3, 512), (1.0, 512), (1.5, 4096)])
def test_expected_length_is_the_mean_of_the_cut_lognormal(sigma, limit):
    rng = random.Random(5)
    mean = fmean(min(limit, rng.lognormvariate(6.0, sigma)) for _ in range(40_000))
    assert expected_length(LengthStats(1.0, 6.0, sigma**2), limit) == pytest.approx(mean, rel=0.02)
