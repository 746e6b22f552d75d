"""Packing: the layout of a pack, omitted trajectories, and refused ones."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from buffer.wire.messages import Trajectory
from darts.events import ProtocolError
from learner.packs.batch import empty_pack, first_fit, make_packs
from tests.learner_cases import make_trajectories, num_sampled


def trajectory(
    tokens: list[int], sampled: list[int], versions: list[tuple[int, int]], reward: float = 1.0
) -> Trajectory:
    logprobs = [-0.1 * position * mark for position, mark in enumerate(sampled)]
    return Trajectory(
        rollout_id=7,
        group_id=3,
        tokens=np.array(tokens, "<i4").tobytes(),
        sampled=np.array(sampled, np.uint8).tobytes(),
        actor_logprobs=np.array(logprobs, "<f4").tobytes(),
        versions=versions,
        reward=reward,
        truncated=False,
        advantage=2 * reward - 1,
    )


def test_two_trajectories_in_one_row() -> None:
    first = trajectory([10, 11, 12, 13], [0, 0, 1, 1], [(4, 1), (5, 1)])
    second = trajectory([20, 21, 22], [0, 1, 1], [(5, 2)], reward=0.0)
    (pack,) = make_packs([first, second], max_tokens=5, current_version=5)
    assert pack.input_ids_T.tolist() == [10, 11, 12, 20, 21]
    assert pack.position_ids_T.tolist() == [0, 1, 2, 0, 1]
    assert pack.lengths == (3, 2)
    assert pack.predicts_S.tolist() == [1, 2, 3, 4]
    assert pack.targets_S.tolist() == [12, 13, 21, 22]
    assert pack.response_S.tolist() == [0, 0, 1, 1]
    assert pack.actor_logprobs_S.tolist() == pytest.approx([-0.2, -0.3, -0.1, -0.2])
    assert pack.advantages_S.tolist() == pytest.approx([1, 1, -1, -1], abs=1e-5)
    assert pack.current_S.tolist() == [False, True, True, True]


def test_given_tokens_between_turns_are_only_context() -> None:
    turns = trajectory([10, 11, 12, 13, 14], [0, 1, 0, 0, 1], [(0, 2)])
    (pack,) = make_packs([turns], 64, 0)
    assert pack.input_ids_T.tolist() == [10, 11, 12, 13]
    assert pack.targets_S.tolist() == [11, 14]
    assert pack.predicts_S.tolist() == [0, 3]


@pytest.mark.parametrize("max_tokens", [16, 48, 100, 10_000])
def test_every_sampled_token_is_trained_once_within_the_limit(max_tokens: int) -> None:
    trajectories = make_trajectories(seed=1)
    packs = make_packs(trajectories, max_tokens, 0)
    assert sum(len(pack.targets_S) for pack in packs) == num_sampled(trajectories)
    for pack in packs:
        assert len(pack.input_ids_T) <= max_tokens or (pack.position_ids_T == 0).sum() == 1


def test_first_fit_is_longest_first_and_packs_an_oversized_one_alone() -> None:
    assert first_fit([3, 9, 4, 6], capacity=7) == [[1], [3], [2, 0]]
    assert first_fit([], capacity=7) == []


def test_an_empty_pack_trains_nothing() -> None:
    pack = empty_pack()
    assert len(pack.input_ids_T) == len(pack.position_ids_T) > 0
    assert (
        len(pack.targets_S)
        == len(pack.predicts_S)
        == len(pack.actor_logprobs_S)
        == len(pack.advantages_S)
        == len(pack.current_S)
        == 0
    )
    assert pack.predicts_S.dtype == torch.int64


@pytest.mark.parametrize(
    "broken",
    [
        trajectory([1, 2, 3], [0, 1], [(0, 1)]),
        trajectory([1, 2], [1, 1], [(0, 2)]),
        trajectory([1, 2, 3], [0, 1, 1], [(0, 1)]),
        msgspec.structs.replace(
            trajectory([1, 2], [0, 1], [(0, 1)]),
            actor_logprobs=np.array([0, np.nan], "<f4").tobytes(),
        ),
    ],
    ids=["lengths differ", "nothing precedes", "versions do not add up", "not finite"],
)
def test_a_malformed_trajectory_is_refused_by_name(broken: Trajectory) -> None:
    with pytest.raises(ProtocolError, match="rollout 7 of group 3"):
        make_packs([broken], 64, 0)


def test_weights_depend_on_the_length_of_the_response() -> None:
    first = trajectory([10, 11, 12, 13], [0, 0, 1, 1], [(4, 2)])
    second = trajectory([20, 21], [0, 1], [(5, 1)])
    (pack,) = make_packs([first, second], 64, 0, weight=lambda num_sampled: 1 / num_sampled)
    assert pack.weights_S.tolist() == [0.5, 0.5, 1.0]
