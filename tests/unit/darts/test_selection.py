"""Selection by reward per token: wrong responses tie, and their lengths decide nothing."""

from __future__ import annotations

from darts.selection import Candidate, select_efficient


def chosen(lengths: list[int], right: set[int]) -> set[int]:
    """The 4 of the rollouts 0, 1, ... that are selected."""
    finished = [Candidate(tokens, number) for number, tokens in enumerate(lengths)]
    rewards = {number: float(number in right) for number in range(len(lengths))}
    selection = select_efficient(finished, [], 4, True, rewards)
    assert selection is not None
    return set(selection.short)


def test_right_responses_come_first_and_the_short_ones_among_them() -> None:
    assert chosen([10, 90, 20, 30, 40, 50], right={1, 2, 3, 4, 5}) == {2, 3, 4, 5}


def test_wrong_responses_are_taken_in_order_of_launch_whatever_their_lengths() -> None:
    """Otherwise the long responses that are trained on would all be right."""
    for lengths in ([90, 80, 10, 20, 30, 500], [10, 20, 80, 90, 30, 500]):
        assert chosen(lengths, right={4, 5}) == {0, 1, 4, 5}
