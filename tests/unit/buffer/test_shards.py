"""Shards partition their items evenly and deterministically."""

import heapq
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.shards import balance

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
