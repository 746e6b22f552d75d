"""A step that comes in portions (`batch.stream=group`) has the gradient of the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from buffer.wire.messages import Shard
from configs.objectives import PRESETS
from learner.fsdp import whole
from learner.train import Accumulated, LearnerState, accumulate, train_step
from tests.learner_cases import (
    assert_same_gradients,
    in_portions,
    make_config,
    make_groups,
    make_trajectories,
    save_model,
    shipped,
    single_rank,
    step_gradients,
    with_advantages,
)

SAME = ("train/loss", "train/entropy", "train/kl", "train/ratio_mean", "train/logprob_diff_all")
COUNTS = ("train/tokens", "train/skipped", "train/lr", "train/clip_frac")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def gradients_of_portions(
    state: LearnerState, portions: list[list[Shard]]
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    found: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        for name, parameter in state.model.named_parameters():
            if parameter.grad is not None:
                found[name] = whole(parameter.grad).clone()

    handle = state.optimizer.register_step_pre_hook(keep)
    earlier = Accumulated()
    for [shard] in portions[:-1]:
        accumulate(state, shard, earlier)
    metrics = train_step(state, portions[-1][0], earlier)
    handle.remove()
    return metrics, found


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("kind", sorted(PRESETS))
def test_portions_have_the_gradient_of_the_whole_batch(
    model_path: Path, tmp_path: Path, kind: str, kl: float
) -> None:
    """For every objective, with a truncated response that is in no loss."""
    trajectories = make_groups(seed=0)
    trajectories[1] = msgspec.structs.replace(trajectories[1], truncated=True)
    config = make_config(
        model_path, tmp_path / "run", loss__kind=kind, loss__kl=kl, optimizer__max_grad_norm=1e9
    )
    config.optimizer.lr = 0.0
    with single_rank(config) as state:
        [one] = shipped(trajectories, config.loss)
        single, expected = step_gradients(state, one)
        portions = in_portions(trajectories, config.loss, step=1)
        metrics, measured = gradients_of_portions(state, portions)
        assert all(parameter.grad is None for parameter in state.model.parameters())
    assert len(portions) == 3 and metrics["train/portions"] == 3 and single["train/portions"] == 1
    assert_same_gradients(measured, expected)
    for name in SAME:
        assert metrics[name] == pytest.approx(single[name], rel=1e-4, abs=1e-9), name
    for name in COUNTS:
        assert metrics[name] == single[name], name


def test_a_step_without_any_gradient_changes_nothing(model_path: Path, tmp_path: Path) -> None:
    config = make_config(model_path, tmp_path / "run")
    mute = [msgspec.structs.replace(t, reward=1.0) for t in make_trajectories(seed=0)]
    with single_rank(config) as state:
        before = [whole(p.detach()).clone() for p in state.model.parameters()]
        portions = in_portions(with_advantages(mute), config.loss)
        metrics, measured = gradients_of_portions(state, portions)
        assert metrics["train/skipped"] == 1.0 and not measured
        after = [whole(p.detach()) for p in state.model.parameters()]
        assert all(map(torch.equal, before, after))


def test_a_portion_without_a_gradient_still_counts_in_the_denominator(
    model_path: Path, tmp_path: Path
) -> None:
    """The last portion has no trajectory of its own, and the loss is divided by its tokens too."""
    trajectories = make_groups(seed=0)
    last = trajectories[-1].group_id
    trajectories = [
        msgspec.structs.replace(t, reward=1.0) if t.group_id == last else t for t in trajectories
    ]
    config = make_config(model_path, tmp_path / "run", optimizer__max_grad_norm=1e9)
    config.optimizer.lr = 0.0
    with single_rank(config) as state:
        _, expected = step_gradients(state, shipped(trajectories, config.loss)[0])
        portions = in_portions(trajectories, config.loss, step=1)
        assert not portions[-1][0].trajectories and portions[-1][0].loss_tokens
        _, measured = gradients_of_portions(state, portions)
    assert_same_gradients(measured, expected)
