"""Advantages of a group, worked out by hand."""

from __future__ import annotations

import math

import pytest

from buffer.advantages import group_advantages
from configs.objectives import Objective

REWARDS = [1.0, 0.0, 0.0, 0.0]
DEVIATION = math.sqrt(3) / 4


def test_the_mean_of_the_group_is_subtracted_and_its_deviation_divides() -> None:
    expected = [0.75 / DEVIATION] + [-0.25 / DEVIATION] * 3
    assert group_advantages(REWARDS, Objective()) == pytest.approx(expected, abs=1e-4)


def test_without_a_scale_nothing_divides() -> None:
    assert group_advantages(REWARDS, Objective(scale="none")) == pytest.approx(
        [0.75, -0.25, -0.25, -0.25]
    )


def test_the_mean_of_the_others_leaves_the_response_itself_out() -> None:
    alone = Objective(scale="none", baseline="leave_one_out")
    assert group_advantages(REWARDS, alone) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_equal_rewards_give_no_advantage(baseline: str) -> None:
    assert group_advantages([0.1] * 8, Objective(baseline=baseline)) == [0.0] * 8
