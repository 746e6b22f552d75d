"""The budget rules agree with brute force, exact fractions and direct simulation."""

import heapq
import itertools
import math
import random
from fractions import Fraction
from statistics import NormalDist, fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import LongEnd, largest_budget
from darts.sizing.latency import LatencyCurve
from darts.sizing.lengths import LengthStats
from darts.sizing.redundancy import (
    marginal_budget,
    net_tokens,
    normalised_spread,
    paper_split,
    paper_total,
    published_norm,
    rollout_time,
)

CPU = LatencyCurve.from_points(
    [(1, 5.9), (4, 6.3), (8, 5.9), (16, 7.0), (32, 8.6), (64, 13.7), (128, 22.8)]
)
FLAT = LatencyCurve.from_points([(1, 10.0), (4096, 10.0)])


def prompt(sigma: float, mean_log: float = 6.0) -> LengthStats:
    return LengthStats(weight=50.0, mean_log=mean_log, var_log=sigma**2)


def marginal(
    sigma: float,
    price: float = 0.3,
    batch: float = 32.0,
    curve: LatencyCurve = CPU,
    long_end: LongEnd = "survivor",
) -> int:
    v = sigma / 0.8
    return marginal_budget(
        prompt(sigma),
        v,
        curve.elasticity(batch),
        price,
        M=8,
        num_long=1,
        long_end=long_end,
        max_budget=16,
    )


# Norms and the fixed rule ------------------------------------------------------------------------


def test_the_largest_budget_is_rounded():
    assert [largest_budget(8, upper) for upper in (1.0, 1.2, 1.3, 2.0)] == [8, 10, 10, 16]


def test_published_norm_follows_the_formula_and_depends_on_the_unit():
    assert published_norm([2.0, 4.0, 6.0]) == [0.25, 0.75, 1.25]
    tokens, thousands = published_norm([100.0, 300.0]), published_norm([0.1, 0.3])
    assert tokens[1] / tokens[0] != pytest.approx(thousands[1] / thousands[0], rel=0.5)


def test_published_norm_of_equal_spreads_is_one():
    assert published_norm([3.0, 3.0]) == [1.0, 1.0]


def test_normalised_spread_of_an_average_prompt_is_one():
    assert normalised_spread(prompt(0.6), prompt(0.6)) == 1.0
    assert normalised_spread(prompt(1.2), prompt(0.6)) == pytest.approx(2.0)


# Rollout time ------------------------------------------------------------------------------------


def simulated_time(lengths: list[int], curve: LatencyCurve) -> float:
    """Simulates token by token: each rollout decodes one token per step of the current batch."""
    left, time_ms = list(lengths), 0.0
    while left:
        time_ms += curve.ptl(len(left))
        left = [tokens - 1 for tokens in left if tokens > 1]
    return time_ms


@settings(max_examples=50)
@given(st.lists(st.integers(1, 60), max_size=20))
def test_rollout_time_equals_a_token_by_token_simulation(lengths):
    assert rollout_time(sorted(lengths), CPU) == pytest.approx(simulated_time(lengths, CPU))


def test_rollout_time_refuses_unsorted_lengths():
    with pytest.raises(ValueError, match="ascend"):
        rollout_time([5, 3], CPU)


# The published split -----------------------------------------------------------------------------


def objective(norms, budgets) -> Fraction:
    return sum((Fraction(v) / m for v, m in zip(norms, budgets, strict=True)), Fraction(0))


@settings(max_examples=60)
@given(
    st.lists(st.fractions(0, 5, max_denominator=20), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 4),
    st.data(),
)
def test_split_is_optimal_by_exhaustive_search(norms, lower, room, data):
    upper = lower + room
    total = data.draw(st.integers(len(norms) * lower, len(norms) * upper))
    budgets = paper_split(norms, total, lower, upper)
    assert sum(budgets) == total and all(lower <= m <= upper for m in budgets)
    choices = itertools.product(range(lower, upper + 1), repeat=len(norms))
    assert objective(norms, budgets) == min(
        objective(norms, choice) for choice in choices if sum(choice) == total
    )


@settings(max_examples=60)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=40), st.floats(0, 1))
def test_no_single_move_improves_the_split(norms, share):
    total = 8 * len(norms) + int(share * 8 * len(norms))
    budgets = paper_split(norms, total, 8, 16)
    gains = [Fraction(v, m * (m + 1)) for v, m in zip(norms, budgets, strict=True) if m < 16]
    losses = [Fraction(v, m * (m - 1)) for v, m in zip(norms, budgets, strict=True) if m > 8]
    assert not gains or not losses or max(gains) <= min(losses)


@pytest.mark.parametrize("total", [15, 33])
def test_split_refuses_an_unreachable_total(total):
    with pytest.raises(ValueError, match=rf"{total}.*16\.\.32"):
        paper_split([1.0, 1.0], total, 8, 16)


# The published total -----------------------------------------------------------------------------


def brute_force_total(window, curve, M, upper, price) -> int:
    def time_ms(m: int) -> float:
        scores = [NormalDist().inv_cdf((k - 0.375) / (m + 0.25)) for k in range(1, m + 1)]
        return rollout_time(
            sorted(
                math.exp(p.mean_log + math.sqrt(p.var_log) * score)
                for p in window
                for score in scores
            ),
            curve,
        )

    def utility(m: int) -> float:
        return 1 - M / m - price * (time_ms(m) / time_ms(M) - 1)

    return len(window) * max(range(M, int(upper * M) + 1), key=utility)


@pytest.mark.parametrize("price", [0.0, 0.3, 0.7, 1.0, 3.0])
def test_total_maximises_the_utility_over_every_mean_budget(price):
    window = [prompt(0.4 + 0.1 * i, mean_log=5.0 + 0.2 * i) for i in range(6)]
    assert paper_total(window, CPU, 8, 2.0, price) == brute_force_total(window, CPU, 8, 2.0, price)


def test_total_spends_less_at_a_higher_price():
    window = [prompt(0.6)] * 16
    totals = [paper_total(window, CPU, 8, 2.0, price) for price in (0.0, 0.5, 1.0, 1.5, 5.0)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == 256 and totals[-1] == 128 and 128 < totals[2] < 256


def test_total_spends_more_if_the_window_is_spread_over_engines():
    window = [prompt(0.6)] * 16
    assert paper_total(window, CPU, 8, 2.0, 1.0, num_engines=16) > paper_total(
        window, CPU, 8, 2.0, 1.0
    )


# Net tokens --------------------------------------------------------------------------------------


def simulated_tokens(
    lengths: list[float], M: int, num_long: int, long_end: str, rng: random.Random
) -> float:
    """Tokens decoded by one group on one engine until every rollout has ended under the cancel
    rule, simulated event by event.
    """
    running, finished, decoded = [(length, i) for i, length in enumerate(lengths)], 0, 0.0
    heapq.heapify(running)
    while running:
        length, _ = heapq.heappop(running)
        decoded += length
        finished += 1
        if finished == M and long_end != "longest":
            kept = [rng.choice(running)] if running and long_end == "survivor" and num_long else []
            decoded += length * (len(running) - len(kept))
            running = kept
    return decoded


@pytest.mark.parametrize(
    "long_end, num_long",
    [("none", 1), ("survivor", 1), ("survivor", 0), ("survivor", 2), ("longest", 1)],
)
@pytest.mark.parametrize("sigma, m", [(0.33, 9), (0.6, 12), (1.0, 16)])
def test_net_tokens_agrees_with_the_simulated_cancel_rule(long_end, num_long, sigma, m):
    rng = random.Random(0)
    draws = 4000
    spent = plain = 0.0
    for _ in range(draws):
        lengths = [rng.lognormvariate(0.0, sigma) for _ in range(m)]
        spent += simulated_tokens(lengths, 8, num_long, long_end, rng)
        # A plain group with the same draws, so that the ratio is less noisy.
        plain += 8 * fmean(lengths)
    assert net_tokens(sigma, 8, num_long, long_end, m) == pytest.approx(
        spent / plain - 1.0, abs=0.025
    )


def test_net_tokens_of_the_plain_group_are_zero():
    assert [net_tokens(1.0, 8, 1, rule, 8) for rule in ("none", "survivor", "longest")] == [
        0.0,
        0.0,
        0.0,
    ]


def test_racing_pays_for_itself_only_if_the_spread_is_wide():
    assert net_tokens(0.6, 8, 1, "none", 12) > 0.1 and net_tokens(1.1, 8, 1, "none", 12) < -0.1
    assert (
        net_tokens(0.6, 8, 1, "survivor", 16) > 0.3 and net_tokens(1.3, 8, 1, "survivor", 16) < -0.1
    )


# The marginal rule -------------------------------------------------------------------------------


def test_spare_slots_are_free():
    assert FLAT.elasticity(32) == 0.0
    assert [
        marginal(sigma, price=100.0, curve=FLAT, long_end="longest") for sigma in (0.1, 0.5, 1.5)
    ] == [16, 16, 16]


def test_without_spread_nothing_is_gained():
    assert marginal(0.1) == 8


def test_a_limit_at_the_group_size_leaves_the_group_plain():
    assert (
        marginal_budget(
            prompt(1.5), 2.0, 0.0, 0.3, M=8, num_long=1, long_end="survivor", max_budget=8
        )
        == 8
    )


@pytest.mark.parametrize("long_end", ["none", "survivor", "longest"])
@settings(max_examples=40)
@given(st.floats(0.0, 3.0), st.floats(0.0, 3.0), st.floats(0.05, 0.6), st.floats(1, 200))
def test_a_higher_price_never_buys_more_while_extra_rollouts_cost_tokens(
    long_end, price, rise, sigma, batch
):
    assert marginal(sigma, price + rise, batch, long_end=long_end) <= marginal(
        sigma, price, batch, long_end=long_end
    )


@pytest.mark.parametrize("long_end", ["none", "survivor", "longest"])
@settings(max_examples=40)
@given(st.floats(0.05, 1.8), st.floats(0.0, 0.5), st.floats(0.0, 3.0), st.floats(1, 200))
def test_a_wider_prompt_never_gets_less(long_end, sigma, wider, price, batch):
    assert marginal(sigma + wider, price, batch, long_end=long_end) >= marginal(
        sigma, price, batch, long_end=long_end
    )


@settings(max_examples=40)
@given(st.floats(0.05, 1.8), st.floats(0.01, 3.0), st.floats(1, 200))
def test_with_constant_costs_it_equals_the_step_by_step_rule(sigma, price, batch):
    """`longest` costs the same for each rollout, so adding rollouts one at a time until the next
    no longer pays finds the maximum.
    """
    v, m, eps = sigma / 0.8, 8, CPU.elasticity(batch)
    while m < 16 and v / (m * (m + 1)) >= price * eps / 8:
        m += 1
    assert marginal(sigma, price, batch, long_end="longest") == m


def test_an_expensive_first_rollout_does_not_hide_a_race_that_saves():
    assert net_tokens(1.5, 8, 1, "survivor", 9) > 0.1 > net_tokens(1.5, 8, 1, "survivor", 16)
    assert marginal(1.5, price=50.0) == 16
