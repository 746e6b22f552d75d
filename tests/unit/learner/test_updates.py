"""Several updates per step (`batch.updates`): minibatches of whole groups, and the policy at the
start of the step as the proximal one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from msgspec.structs import replace

from buffer.wire.messages import Shard, Trajectory
from learner import train
from learner.fsdp import whole
from learner.packs.batch import Pack, make_packs
from learner.train import LearnerState, train_step
from tests.learner_cases import (
    make_config,
    make_shards,
    make_trajectories,
    num_sampled,
    pack_gradients,
    save_model,
    shipped,
    single_rank,
    step_gradients,
    with_advantages,
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def config_of(model_path: Path, folder: Path, **changes: Any) -> Any:
    """Without a limit on the gradient's norm, so that gradients can be compared."""
    unbounded = {"optimizer__max_grad_norm": 1e9}
    return make_config(model_path, folder / "run", **(unbounded | changes))


def weights(state: LearnerState) -> list[torch.Tensor]:
    return [whole(parameter.detach()).clone() for parameter in state.model.parameters()]


def gradients_of_updates(
    state: LearnerState, shard: Shard
) -> tuple[dict[str, float], list[list[torch.Tensor]]]:
    """Take a step. Returns its metrics and the gradient of each update."""
    found: list[list[torch.Tensor]] = []

    def keep(*_: Any) -> None:
        grads = [p.grad for p in state.model.parameters()]
        found.append([whole(grad).clone() for grad in grads if grad is not None])

    handle = state.optimizer.register_step_pre_hook(keep)
    metrics = train_step(state, shard)
    handle.remove()
    return metrics, found


def test_one_update_has_the_gradient_of_the_whole_batch_bit_for_bit(
    model_path: Path, tmp_path: Path
) -> None:
    config = config_of(model_path, tmp_path)
    with single_rank(config) as state:
        expected = pack_gradients(state, config.batch.max_tokens)
        with patch.object(train, "_with_start_logprobs", side_effect=AssertionError):
            _, measured = step_gradients(state, make_shards(make_trajectories(seed=0))[0])
    assert measured.keys() == expected.keys()
    assert all(torch.equal(measured[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["dapo", "gspo", "decoupled_ppo"])
def test_without_a_learning_rate_updates_are_parts_of_the_whole_batch(
    model_path: Path, tmp_path: Path, kind: str
) -> None:
    trajectories = make_trajectories(seed=0, num_groups=4)
    config = config_of(model_path, tmp_path, loss__kind=kind, optimizer__weight_decay=0.1)
    config.optimizer.lr = 0.0
    with single_rank(config) as state:
        before = weights(state)
        [one] = shipped(trajectories, config.loss)
        single, [whole_batch] = gradients_of_updates(state, one)
        [shard] = shipped(trajectories, config.loss, updates=2)
        metrics, parts = gradients_of_updates(state, shard)
        assert all(map(torch.equal, weights(state), before))
    by_responses = kind == "gspo"
    shares = [m.loss_responses if by_responses else m.loss_tokens for m in shard.minibatches]
    total = one.minibatches[0].loss_responses if by_responses else one.loss_tokens
    assert sum(shares) == total and len(parts) == 2
    for full, first, second in zip(whole_batch, *parts, strict=True):
        mean = (shares[0] * first + shares[1] * second) / total
        torch.testing.assert_close(mean, full, rtol=1e-4, atol=1e-7)
    for name in ("train/tokens", "train/entropy", "train/ratio_mean", "train/logprob_diff_all"):
        assert metrics[name] == pytest.approx(single[name], rel=1e-5)


def tokens_of(pack: Pack) -> tuple[int, ...]:
    return tuple(pack.input_ids_T.tolist())


def present_logprobs(
    state: LearnerState, trajectories: list[Trajectory]
) -> dict[tuple[int, ...], torch.Tensor]:
    """Log-probabilities of each trajectory under the present weights, by its tokens."""
    with torch.no_grad():
        return {
            tokens_of(pack): state.boundaries.logprobs(pack, 1.0)[0]
            for pack in make_packs(trajectories, 1, -1)
        }


def test_later_updates_know_the_policy_at_the_start_of_the_step(
    model_path: Path, tmp_path: Path
) -> None:
    config = config_of(
        model_path, tmp_path, loss__kind="decoupled_ppo", optimizer__lr=1e-2, batch__max_tokens=1
    )
    trajectories = with_advantages(make_trajectories(seed=0, num_groups=2))
    seen: list[tuple[torch.Tensor, Pack]] = []
    surrogate = train.surrogate

    def watched(logprobs_S: torch.Tensor, pack: Pack, loss: Any) -> Any:
        seen.append((logprobs_S.detach().clone(), pack))
        return surrogate(logprobs_S, pack, loss)

    with single_rank(config) as state, patch.object(train, "surrogate", watched):
        start = present_logprobs(state, trajectories)
        metrics = train_step(state, shipped(trajectories, config.loss, updates=2)[0])
    assert len(seen) == len(trajectories)  # each has a pack of its own
    moved, difference = 0, 0.0
    for logprobs_S, pack in seen:
        assert pack.start_logprobs_S is not None
        torch.testing.assert_close(pack.start_logprobs_S, start[tokens_of(pack)])
        moved += not torch.allclose(logprobs_S, pack.start_logprobs_S, atol=1e-4)
        difference += float((pack.start_logprobs_S - pack.actor_logprobs_S).abs().sum())
    assert moved == len(trajectories) // 2  # those of the second update
    # The difference from the actor is measured at the start, too.
    expected = difference / num_sampled(trajectories)
    assert metrics["train/logprob_diff_all"] == pytest.approx(expected, rel=1e-5)


def test_an_update_without_signal_is_skipped_and_the_others_are_taken(
    model_path: Path, tmp_path: Path
) -> None:
    config = config_of(model_path, tmp_path)
    signal = make_trajectories(seed=0, num_groups=1)
    mute = [replace(t, reward=1.0, group_id=9) for t in make_trajectories(seed=1, num_groups=1)]
    for order in ([*signal, *mute], [*mute, *signal]):
        with single_rank(config) as state:
            metrics, parts = gradients_of_updates(state, shipped(order, config.loss, updates=2)[0])
        assert len(parts) == 1 and metrics["train/skipped"] == 0.0
        assert metrics["train/tokens"] == num_sampled(signal)


def test_each_update_moves_the_weights(model_path: Path, tmp_path: Path) -> None:
    config = config_of(model_path, tmp_path, optimizer__lr=1e-3)
    trajectories = make_trajectories(seed=0, num_groups=4)
    ends = []
    for updates in (1, 2, 4):
        with single_rank(config) as state:
            train_step(state, shipped(trajectories, config.loss, updates=updates)[0])
            assert state.step == 1
            steps = {int(s["step"]) for s in state.optimizer.state.values()}
            ends.append(steps)
    assert ends == [{1}, {2}, {4}]
