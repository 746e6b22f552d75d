"""From the selected trajectories of a step to one shard per rank, of nearly equal work.

Owns which trajectories leave no gradient and are dropped, the totals by which the loss is divided,
and the balance. Pure; driven by `buffer.learner_side`. Every rank waits for the slowest, so the
largest shard determines the time of a step.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from buffer.prompts import common_prompt
from buffer.records.event_log import Learner
from buffer.wire.messages import Minibatch, Shard, Trajectory, Work
from configs.schema import LossConfig

UNITS = 1024  # of cost per token, so that costs are whole numbers
# (total cost, number of items, items). The count puts empty parts last among zeros.
Part = tuple[int, int, list[int]]


def make_shards(
    minibatches: Sequence[Sequence[Trajectory]],
    loss: LossConfig,
    learner: Learner,
    *,
    step: int,
    policy_version: int,
    portion: int = 0,
    last: bool = True,
) -> list[Shard]:
    """One shard for each rank of `learner`, given the selected trajectories of each update.

    They are a whole step, or a portion of it, which has one update.

    Trajectories without a gradient go to no rank: truncated ones, unless `loss.train_truncated`,
    and those without an advantage, unless a KL penalty moves them, too. The latter still count in
    the loss's totals, so the gradient does not change.
    """
    shards = [
        Shard(
            step=step,
            policy_version=policy_version,
            trajectories=[],
            minibatches=[],
            portion=portion,
            last=last,
        )
        for _ in range(learner.num_ranks)
    ]
    for selected in minibatches:
        in_loss = [t for t in selected if loss.train_truncated or not t.truncated]
        trained = [t for t in in_loss if t.advantage or loss.kl]
        parts = balance_groups(trained, learner.work, learner.num_ranks)
        for shard, indices in zip(shards, parts, strict=True):
            shard.trajectories.extend(trained[index] for index in indices)
            shard.minibatches.append(
                Minibatch(
                    num_trajectories=len(indices),
                    loss_tokens=sum(num_sampled(t) for t in in_loss),
                    loss_responses=len(in_loss),
                )
            )
    return shards


def num_sampled(trajectory: Trajectory) -> int:
    return sum([num_tokens for _, num_tokens in trajectory.versions])


def balance_groups(
    trajectories: Sequence[Trajectory], work: Work, num_shards: int
) -> list[list[int]]:
    """Split the indices of `trajectories` into `num_shards` ascending lists of nearly equal work.

    If the learner shares prompts, the responses of a group stay together unless splitting each
    group into 2, 4, ... parts makes the largest shard smaller. Every part repeats the prompt.
    """
    if num_shards == 1:
        return [[*range(len(trajectories))]]
    whole: dict[int, list[int]] = {}
    for index, trajectory in enumerate(trajectories):
        whole.setdefault(trajectory.group_id if work.shares_prompts else index, []).append(index)
    size = max(map(len, whole.values()), default=1)
    best: tuple[int, list[list[int]]] | None = None
    while best is None or size > 1:
        size = size if best is None else (size + 1) // 2
        pieces = [
            members[start : start + size]
            for members in whole.values()
            for start in range(0, len(members), size)
        ]
        costs = [training_cost([trajectories[i] for i in piece], work) for piece in pieces]
        split = balance(costs, num_shards)
        largest = max(sum(costs[number] for number in part) for part in split)
        if best is None or largest < best[0]:
            best = largest, [sorted(i for number in part for i in pieces[number]) for part in split]
    return best[1]


def training_cost(trajectories: Sequence[Trajectory], work: Work) -> int:
    """The work of a forward and a backward pass, in parts of `UNITS` of a token's.

    The tokens of a shared prompt are passed once for all `trajectories`, which are of one group.
    """
    prompt = common_prompt(trajectories) if work.shares_prompts else 0
    cost = prompt + work.per_pair * prompt**2
    for trajectory in trajectories:
        num_tokens = len(trajectory.tokens) // 4
        cost += num_tokens - prompt + work.per_pair * (num_tokens**2 - prompt**2)
        cost += work.per_prediction * num_sampled(trajectory)
    return round(UNITS * cost)


def balance(costs: Sequence[int], num_shards: int) -> list[list[int]]:
    """Split the indices of `costs` into `num_shards` ascending lists of nearly equal total cost.

    Deterministic. No shard is empty if there are at least as many items as shards. Returns the
    better of largest differencing and greedy (longest first), so the largest total is never worse
    than greedy's (4 - 1/k)/3 of the optimum. Source: Karmarkar & Karp, The differencing method of
    set partitioning (1982), in its k-way form.
    """
    if num_shards < 1:
        raise ValueError(
            f"num_shards={num_shards}: at least 1 is needed, one shard per learner rank"
        )
    if any(cost < 0 for cost in costs):
        raise ValueError(f"costs: {min(costs)} is negative; a trajectory's work is at least 0")
    split = min(_largest_differencing(costs, num_shards), _greedy(costs, num_shards), key=_largest)
    return [sorted(items) for _, _, items in split]


def _largest(parts: list[Part]) -> int:
    return max(total for total, _, _ in parts)


def _greedy(costs: Sequence[int], num_shards: int) -> list[Part]:
    """Give each item, the costliest first, to the part with the smallest total so far."""
    heap: list[Part] = [(0, 0, []) for _ in range(num_shards)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        total, count, items = heap[0]
        heapq.heapreplace(heap, (total + costs[index], count + 1, [*items, index]))
    return sorted(heap)


def _largest_differencing(costs: Sequence[int], num_shards: int) -> list[Part]:
    """Merge the two splits with the widest spread until one split is left.

    The largest part of one is joined with the smallest part of the other.
    """
    empty: list[Part] = [(0, 0, [])] * num_shards
    heap: list[tuple[int, int, list[Part]]] = []
    for index, cost in enumerate(costs):
        heapq.heappush(heap, (-cost, index, [(cost, 1, [index]), *empty[1:]]))
    order = len(heap)  # breaks ties: the earlier split comes first
    while len(heap) > 1:
        _, _, wide = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        merged = [
            (a[0] + b[0], a[1] + b[1], a[2] + b[2])
            for a, b in zip(wide, reversed(other), strict=True)
        ]
        merged.sort(key=lambda part: (-part[0], -part[1], part[2]))
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], order, merged))
        order += 1
    return heap[0][2] if heap else empty
