"""The learning rate of every step, worked out by hand, and that training and resuming use it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from learner.schedule import learning_rate
from learner.train import train_step
from tests.learner_cases import make_config, make_shards, make_trajectories, save_model, single_rank


def rates(schedule: str, warmup_steps: int, num_steps: int) -> list[float]:
    config = make_config(
        Path("model"),
        Path("runs/run"),
        run__steps=num_steps,
        optimizer__lr=2.0,
        optimizer__schedule=schedule,
        optimizer__warmup_steps=warmup_steps,
    )
    return [learning_rate(config, step) / 2.0 for step in range(num_steps)]


def test_a_constant_rate_follows_the_warmup() -> None:
    assert rates("constant", 0, 3) == [1.0, 1.0, 1.0]
    assert rates("constant", 4, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_linear_rate_would_be_0_one_step_after_the_last() -> None:
    assert rates("linear", 0, 4) == [1.0, 0.75, 0.5, 0.25]
    assert rates("linear", 2, 5) == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25])


def test_a_cosine_rate_is_half_a_period() -> None:
    half = [(1 + math.cos(math.pi * part / 4)) / 2 for part in range(4)]
    assert rates("cosine", 0, 4) == pytest.approx(half)
    assert rates("cosine", 2, 5) == pytest.approx([0.5, *half])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 3, 20])
def test_no_step_has_a_rate_of_0(schedule: str, warmup_steps: int) -> None:
    assert all(0 < rate <= 1 for rate in rates(schedule, warmup_steps, 8))


def test_a_step_trains_and_reports_its_rate_also_after_a_resume(tmp_path: Path) -> None:
    config = make_config(
        save_model(tmp_path / "model"),
        tmp_path / "run",
        run__steps=4,
        optimizer__lr=1e-3,
        optimizer__schedule="linear",
    )
    shards = [make_shards(make_trajectories(seed=step), step)[0] for step in range(4)]
    with single_rank(config) as state:
        reported = [train_step(state, shard)["train/lr"] for shard in shards[:2]]
        assert state.optimizer.param_groups[0]["lr"] == reported[-1]
    with single_rank(config) as state:
        state.step = 2
        reported += [train_step(state, shard)["train/lr"] for shard in shards[2:]]
    assert reported == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
