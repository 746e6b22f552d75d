"""Shards partition their items evenly and deterministically."""

import heapq
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.records.event_log import Learner
from buffer.shards import balance, make_shards, training_cost
from buffer.wire.messages import Trajectory, Work
from configs.schema import LossConfig

COSTS = st.lists(st.integers(0, 5000), max_size=60)


def totals(costs, shards):
    return [sum(costs[index] for index in shard) for shard in shards]


def greedy_largest(costs, num_shards):
    heap = [0] * num_shards
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(heap, heap[0] + cost)
    return max(heap)


def optimal_largest(costs, num_shards):
    return min(
        max(
            sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == shard)
            for shard in range(num_shards)
        )
        for owners in product(range(num_shards), repeat=len(costs))
    )


@given(COSTS, st.integers(1, 9))
def test_every_item_is_in_exactly_one_shard(costs, num_shards):
    shards = balance(costs, num_shards)
    assert len(shards) == num_shards
    assert sorted(index for shard in shards for index in shard) == list(range(len(costs)))
    assert all(shard == sorted(shard) for shard in shards)


@given(COSTS, st.integers(1, 9))
def test_no_shard_is_empty_if_there_are_enough_items(costs, num_shards):
    assert sum(bool(shard) for shard in balance(costs, num_shards)) == min(num_shards, len(costs))


@given(COSTS, st.integers(1, 9))
def test_never_worse_than_greedy(costs, num_shards):
    assert max(totals(costs, balance(costs, num_shards))) <= greedy_largest(costs, num_shards)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 9))
def test_the_spread_is_at_most_one_item(costs, num_shards):
    loads = totals(costs, balance(costs, num_shards))
    assert max(loads) - min(loads) <= max(costs)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 3))
def test_the_largest_shard_is_within_the_known_bound(costs, num_shards):
    largest = max(totals(costs, balance(costs, num_shards)))
    assert 3 * num_shards * largest <= (4 * num_shards - 1) * optimal_largest(costs, num_shards)


def test_differencing_beats_greedy_on_a_known_example():
    costs = [8, 7, 6, 5, 4]
    assert sorted(totals(costs, balance(costs, 2))) == [14, 16]
    assert greedy_largest(costs, 2) == 17
    assert optimal_largest(costs, 2) == 15


def test_long_tailed_lengths_are_split_almost_evenly():
    costs = [20 + (index * index * 7919) % 480 for index in range(128)]
    loads = totals(costs, balance(costs, 8))
    assert (max(loads) - min(loads)) / max(loads) < 0.002


@given(COSTS, st.integers(1, 9))
def test_the_same_costs_give_the_same_shards(costs, num_shards):
    assert balance(costs, num_shards) == balance(tuple(costs), num_shards)


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="num_shards=0"):
        balance([1], 0)
    with pytest.raises(ValueError, match="-3"):
        balance([1, -3], 2)


# The shards of a step ----------------------------------------------------------------------------


def trajectory(number: int, num_tokens: int, advantage: float, truncated: bool = False):
    """A prompt of two tokens, and `num_tokens` sampled ones."""
    marks = b"\0\0" + b"\1" * num_tokens
    return Trajectory(
        rollout_id=number,
        group_id=0,
        tokens=b"\1\0\0\0" * len(marks),
        sampled=marks,
        actor_logprobs=bytes(4 * len(marks)),
        versions=[(0, num_tokens)],
        reward=0.0,
        truncated=truncated,
        advantage=advantage,
    )


SELECTED = [
    trajectory(0, 10, 1.0),
    trajectory(1, 20, 0.0),
    trajectory(2, 40, -1.0),
    trajectory(3, 80, 0.5, truncated=True),
]


BY_TOKENS = Work()


def shards_of(loss, num_ranks=2, selected=SELECTED, work=BY_TOKENS):
    learner = Learner("i", num_ranks, 100, work)
    return make_shards(selected, loss, learner, step=3, policy_version=5)


@pytest.mark.parametrize(
    ("loss", "rollouts", "num_tokens", "num_responses"),
    [
        (LossConfig(), [0, 2], 70, 3),
        (LossConfig(train_truncated=True), [0, 2, 3], 150, 4),
        (LossConfig(kl=0.1), [0, 1, 2], 70, 3),
        (LossConfig(kl=0.1, train_truncated=True), [0, 1, 2, 3], 150, 4),
    ],
    ids=["default", "train_truncated", "kl", "both"],
)
def test_trajectories_without_a_gradient_count_in_the_totals_alone(
    loss, rollouts, num_tokens, num_responses
):
    shards = shards_of(loss)
    assert sorted(t.rollout_id for shard in shards for t in shard.trajectories) == rollouts
    for shard in shards:
        assert (shard.step, shard.policy_version) == (3, 5)
        assert (shard.step_loss_tokens, shard.step_loss_responses) == (num_tokens, num_responses)


def test_those_without_a_gradient_leave_no_rank_idle():
    """With eight of them beside two others, each of two ranks gets one of the others."""
    mute = [trajectory(10 + i, 50, 0.0) for i in range(8)]
    shards = shards_of(LossConfig(), selected=[*mute[:4], SELECTED[0], *mute[4:], SELECTED[2]])
    assert [len(shard.trajectories) for shard in shards] == [1, 1]


def test_a_step_without_a_gradient_gives_empty_shards():
    shards = shards_of(LossConfig(), selected=[SELECTED[1]] * 3)
    assert [(s.trajectories, s.step_loss_tokens) for s in shards] == [([], 60)] * 2


def test_the_work_of_a_trajectory_is_that_of_layers_head_and_attention():
    assert training_cost(SELECTED[0], Work()) == 1024 * 12
    assert training_cost(SELECTED[0], Work(per_prediction=0.5, per_pair=0.25)) == 1024 * (
        12 + 5 + 36
    )


def test_long_trajectories_weigh_more_with_attention():
    """One of 32 tokens against three of 12: the same tokens, but not the same pairs."""
    selected = [trajectory(0, 30, 1.0), *(trajectory(i, 10, 1.0) for i in (1, 2, 3))]
    selected.append(trajectory(4, 2, 1.0))

    def lengths(work):
        shards = shards_of(LossConfig(), selected=selected, work=work)
        return sorted(sorted(len(t.sampled) for t in shard.trajectories) for shard in shards)

    assert lengths(Work()) == [[4, 32], [12, 12, 12]]
    assert lengths(Work(per_pair=1.0)) == [[4, 12, 12, 12], [32]]
