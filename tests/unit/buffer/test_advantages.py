"""Advantages of a group, worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.advantages import group_advantages, overlong_penalty
from configs.objectives import Objective
from configs.schema import LossConfig

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


@pytest.mark.parametrize(
    ("num_tokens", "penalty"),
    [(1, 0), (80, 0), (81, -0.1), (90, -1), (99, -1.9), (100, -2), (130, -2)],
)
def test_a_reward_falls_over_the_overlong_buffer(num_tokens: int, penalty: float) -> None:
    loss = LossConfig(overlong_buffer=20, overlong_factor=2.0)
    assert overlong_penalty(num_tokens, 100, loss) == pytest.approx(penalty)


@given(st.integers(0, 10_000), st.integers(1, 5000))
def test_without_a_buffer_there_is_no_penalty(num_tokens: int, max_tokens: int) -> None:
    assert overlong_penalty(num_tokens, max_tokens, LossConfig()) == 0


@given(st.data())
def test_a_longer_response_never_gains(data: st.DataObject) -> None:
    max_tokens = data.draw(st.integers(1, 5000))
    loss = LossConfig(overlong_buffer=data.draw(st.integers(1, max_tokens)))
    lengths = sorted(data.draw(st.lists(st.integers(0, 6000), min_size=2)))
    penalties = [overlong_penalty(length, max_tokens, loss) for length in lengths]
    assert penalties == sorted(penalties, reverse=True)
    assert all(-1 <= penalty <= 0 for penalty in penalties)
