"""Results of an evaluation, from its scored responses."""

from __future__ import annotations

import pytest

from buffer.records.held_out import Answer, judged


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.0, 1.0, 1.0, 1.0], {"eval/reward_mean": 0.75, "eval/accuracy": 0.75}),
        ([1.0], {"eval/reward_mean": 1.0, "eval/accuracy": 1.0}),
        ([0.0, 0.5, 1.0], {"eval/reward_mean": 0.5}),
        ([-1.0, 1.0], {"eval/reward_mean": 0.0}),
        ([], {}),
    ],
)
def test_a_mean_reward_is_an_accuracy_if_rewards_are_0_or_1(
    rewards: list[float], expected: dict[str, float]
) -> None:
    row = judged([Answer("", reward, 1) for reward in rewards])
    assert {name: value for name, value in row.items() if "length" not in name} == expected


def test_the_kinds_of_prompts_are_reported_separately_and_together() -> None:
    row = judged([Answer("easy", 1.0, 10), Answer("easy", 1.0, 20), Answer("deep", 0.0, 60)])
    assert (row["eval/accuracy"], row["eval/length_mean"]) == (pytest.approx(2 / 3), 30.0)
    assert (row["eval/easy/accuracy"], row["eval/easy/length_mean"]) == (1.0, 15.0)
    assert (row["eval/deep/accuracy"], row["eval/deep/length_mean"]) == (0.0, 60.0)


def test_prompts_of_no_kind_are_reported_only_together() -> None:
    assert {name.count("/") for name in judged([Answer("", 1.0, 10)])} == {1}
