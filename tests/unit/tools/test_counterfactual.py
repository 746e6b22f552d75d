"""The estimates about cancelled responses, against lengths drawn from known distributions."""

from __future__ import annotations

import random
from itertools import combinations
from statistics import fmean

import pytest

from darts.sizing.lengths import LengthStats
from tools.reporting.counterfactual import counterfactual, expected_longest, expected_rest

STATS = LengthStats(weight=100.0, mean_log=4.0, var_log=0.64)
LIMIT, GROUP_SIZE = 400, 4


def draw(rng: random.Random) -> int:
    return min(LIMIT, max(1, round(rng.lognormvariate(STATS.mean_log, STATS.var_log**0.5))))


def test_the_rest_of_a_response_agrees_with_drawn_lengths() -> None:
    rng = random.Random(1)
    lengths = [draw(rng) for _ in range(60_000)]
    for tokens in (1, 50, 200, 399):
        drawn = fmean(length - tokens for length in lengths if length > tokens)
        assert expected_rest(STATS, tokens, LIMIT) == pytest.approx(drawn, rel=0.05, abs=1)
    assert expected_rest(STATS, LIMIT, LIMIT) == 0


def test_the_longest_of_a_part_is_the_mean_over_all_such_parts() -> None:
    lengths = [5.0, 1.0, 9.0, 9.0, 30.0]
    for num in (1, 3, 5):
        every = fmean(max(part) for part in combinations(lengths, num))
        assert expected_longest(lengths, num) == pytest.approx(every)
    assert expected_longest(lengths, 8) == 30.0


def group(prompt: int, lengths: list[int]) -> dict:
    """The shortest four are trained on; the others are cancelled when the fourth has finished."""
    lengths = sorted(lengths)
    rollouts = [{"tokens": length, "end": "selected_short"} for length in lengths[:GROUP_SIZE]]
    rollouts += [
        {"tokens": lengths[GROUP_SIZE - 1], "end": "cancelled"} for _ in lengths[GROUP_SIZE:]
    ]
    return {"prompt_id": f"p{prompt}", "end": "shipped", "rollouts": rollouts}


def test_a_plain_run_and_the_cancelled_rest_are_estimated_from_censored_groups() -> None:
    rng = random.Random(3)
    drawn = [[draw(rng) for _ in range(6)] for _ in range(600)]
    found = counterfactual(
        [group(i % 50, lengths) for i, lengths in enumerate(drawn)], GROUP_SIZE, LIMIT
    )
    assert found is not None
    cut = [sorted(lengths) for lengths in drawn]
    rest = sum(length - lengths[3] for lengths in cut for length in lengths[4:])
    assert (found.num_groups, found.num_cut) == (600, 1200)
    assert found.cut_tokens == 2 * sum(lengths[3] for lengths in cut)
    assert found.rest_tokens == pytest.approx(rest, rel=0.15)
    assert found.plain_tokens == pytest.approx(4 / 6 * sum(map(sum, drawn)), rel=0.1)
    assert found.plain_longest == pytest.approx(fmean(max(ls[:4]) for ls in drawn), rel=0.1)
    assert found.longest == fmean(lengths[3] for lengths in cut)


def test_a_response_at_the_relative_limit_is_estimated_like_a_cancelled_one() -> None:
    rng = random.Random(4)
    drawn = [[draw(rng) for _ in range(6)] for _ in range(600)]
    groups = [group(i % 50, lengths) for i, lengths in enumerate(drawn)]
    cancelled = counterfactual(groups, GROUP_SIZE, LIMIT)
    for row in groups:
        for rollout in row["rollouts"]:
            if rollout["end"] == "cancelled":
                rollout |= {"end": "discarded", "curtailed": True}
    assert counterfactual(groups, GROUP_SIZE, LIMIT) == cancelled


def test_a_length_that_is_known_is_not_replaced_by_the_fit() -> None:
    """The tail of these groups is far heavier than that of the fitted distribution."""
    rollouts = [{"tokens": n, "end": "selected_short"} for n in (30, 30, 30, 31, 31, 380)]
    found = counterfactual(
        [{"prompt_id": "p", "end": "shipped", "rollouts": rollouts}] * 5, GROUP_SIZE, LIMIT
    )
    assert found is not None and found.rest_tokens == 0
    assert found.plain_tokens == pytest.approx(5 * 4 * 532 / 6)
    assert found.plain_longest == pytest.approx((380 * 10 + 31 * 4 + 31) / 15)


def test_dropped_groups_and_an_empty_ledger_give_no_estimate() -> None:
    assert counterfactual([], GROUP_SIZE, LIMIT) is None
    dropped = group(0, [10, 20, 30, 40, 50]) | {"end": "deadline"}
    assert counterfactual([dropped], GROUP_SIZE, LIMIT) is None
