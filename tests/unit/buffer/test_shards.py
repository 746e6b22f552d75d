"""Shards partition their items evenly and deterministically."""

import heapq
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.records.event_log import Learner
from buffer.shards import balance, balance_groups, make_shards, training_cost
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
    return make_shards([selected], loss, learner, step=3, policy_version=5)


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
        [minibatch] = shard.minibatches
        assert (minibatch.loss_tokens, minibatch.loss_responses) == (num_tokens, num_responses)


def test_those_without_a_gradient_leave_no_rank_idle():
    """With eight of them beside two others, each of two ranks gets one of the others."""
    mute = [trajectory(10 + i, 50, 0.0) for i in range(8)]
    shards = shards_of(LossConfig(), selected=[*mute[:4], SELECTED[0], *mute[4:], SELECTED[2]])
    assert [len(shard.trajectories) for shard in shards] == [1, 1]


def test_a_step_without_a_gradient_gives_empty_shards():
    shards = shards_of(LossConfig(), selected=[SELECTED[1]] * 3)
    assert [(s.trajectories, s.loss_tokens) for s in shards] == [([], 60)] * 2


def test_each_update_is_balanced_over_the_ranks():
    """The first update has two long and two short trajectories, and the second one a single one."""
    first = [trajectory(i, n, 1.0) for i, n in enumerate((50, 10, 50, 10))]
    second = [trajectory(4, 30, 1.0), trajectory(5, 30, 0.0)]
    learner = Learner("i", 2, 100, BY_TOKENS)
    shards = make_shards([first, second], LossConfig(), learner, step=3, policy_version=5)
    parts = [[[t.rollout_id for t in part] for part, _ in shard.split()] for shard in shards]
    for of_first, _ in parts:
        assert sorted(len(first[i].sampled) for i in of_first) == [12, 52]
    assert sorted(of_second for _, of_second in parts) == [[], [4]]
    for shard in shards:
        totals = [(m.loss_tokens, m.loss_responses) for m in shard.minibatches]
        assert totals == [(120, 4), (60, 2)] and shard.loss_tokens == 180


def test_the_work_of_a_trajectory_is_that_of_layers_head_and_attention():
    assert training_cost([SELECTED[0]], Work()) == 1024 * 12
    assert training_cost([SELECTED[0]], Work(per_prediction=0.5, per_pair=0.25)) == 1024 * (
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


# Shared prompts -----------------------------------------------------------------------------------

SHARED = Work(per_prediction=0.5, per_pair=0.25, shares_prompts=True)


def group_of(group_id, prompt, responses):
    """Responses of the given lengths to a prompt of `prompt` tokens, all of them the group's id."""
    marks = [b"\0" * prompt + b"\1" * num_tokens for num_tokens in responses]
    return [
        Trajectory(
            rollout_id=100 * group_id + number,
            group_id=group_id,
            tokens=group_id.to_bytes(4, "little") * len(sampled),
            sampled=sampled,
            actor_logprobs=bytes(4 * len(sampled)),
            versions=[(0, len(sampled) - prompt)],
            reward=0.0,
            truncated=False,
            advantage=1.0,
        )
        for number, sampled in enumerate(marks)
    ]


def test_a_shared_prompt_is_paid_for_once():
    """Two responses of 4 and 10 tokens to a prompt of 10, of which 9 are shared."""
    tokens = 9 + (1 + 4) + (1 + 10)
    pairs = 9**2 + (14**2 - 9**2) + (20**2 - 9**2)
    assert training_cost(group_of(0, 10, [4, 10]), SHARED) == 1024 * (
        tokens + 0.5 * 14 + 0.25 * pairs
    )
    apart = Work(per_prediction=0.5, per_pair=0.25)
    alone = [training_cost([t], apart) for t in group_of(0, 10, [4, 10])]
    assert training_cost(group_of(0, 10, [4, 10]), apart) == sum(alone)
    assert [training_cost([t], SHARED) for t in group_of(0, 10, [4, 10])] == alone


def groups_by_shard(trajectories, work, num_shards):
    parts = balance_groups(trajectories, work, num_shards)
    assert sorted(index for part in parts for index in part) == list(range(len(trajectories)))
    assert all(part == sorted(part) for part in parts)
    return sorted(sorted(trajectories[index].group_id for index in part) for part in parts)


def test_responses_stay_together_if_that_is_balanced():
    four = [t for group_id in range(4) for t in group_of(group_id, 50, [10, 20])]
    assert groups_by_shard(four, SHARED, 2) in (
        [[0, 0, 1, 1], [2, 2, 3, 3]],
        [[0, 0, 2, 2], [1, 1, 3, 3]],
        [[0, 0, 3, 3], [1, 1, 2, 2]],
    )


def test_a_group_is_split_if_its_rank_would_be_the_slowest():
    one = group_of(0, 50, [10, 10, 10, 10])
    assert groups_by_shard(one, SHARED, 2) == [[0, 0], [0, 0]]
    assert groups_by_shard(one, SHARED, 4) == [[0], [0], [0], [0]]
    assert groups_by_shard([], SHARED, 2) == [[], []]


SIZES = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(1, 80), min_size=1)), max_size=8
)


@given(SIZES, st.integers(1, 5))
def test_the_slowest_rank_is_never_slower_than_with_repeated_prompts(sizes, num_shards):
    trajectories = [t for n, (p, lengths) in enumerate(sizes) for t in group_of(n, p, lengths)]

    def slowest(work):
        loads = []
        for part in balance_groups(trajectories, work, num_shards):
            groups = {trajectories[index].group_id: [] for index in part}
            for index in part:
                groups[trajectories[index].group_id].append(trajectories[index])
            loads.append(sum(training_cost(members, SHARED) for members in groups.values()))
        return max(loads)

    repeated = Work(per_prediction=0.5, per_pair=0.25)
    parts = balance_groups(trajectories, repeated, num_shards)
    apart = max(sum(training_cost([trajectories[i]], repeated) for i in part) for part in parts)
    assert slowest(SHARED) <= apart + 1
