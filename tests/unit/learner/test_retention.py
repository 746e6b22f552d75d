"""A run keeps its newest and its best checkpoints, and none of which only a part is left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.schema import Config
from learner import retention
from learner.train import run_rank
from tests.learner_cases import (
    FakeBuffer,
    make_config,
    make_shards,
    make_trajectories,
    save_model,
)


def config(newest: int, best: int, every: int) -> Config:
    made = Config()
    made.learner.keep_checkpoints, made.learner.keep_best = newest, best
    made.eval.every = every
    return made


@pytest.mark.parametrize(
    ("steps", "results", "rules", "expected"),
    [
        ([10, 20, 30], {}, (2, 0, 10), {20, 30}),
        ([10, 20, 30], {10: 0.5, 20: 0.4, 30: 0.1}, (1, 0, 10), {30}),
        ([10, 20, 30], {10: 0.5, 20: 0.4, 30: 0.1}, (1, 1, 10), {10, 30}),
        ([10, 20, 30], {10: 0.5, 20: 0.4, 30: 0.1}, (1, 2, 10), {10, 20, 30}),
        ([10, 20, 30], {10: 0.5, 20: 0.5, 30: 0.1}, (1, 1, 10), {20, 30}),  # the later of equals
        ([10, 20, 30, 40], {10: 0.5}, (1, 1, 10), {10, 20, 30, 40}),  # results are awaited
        ([10, 20, 30, 40], {10: 0.5}, (1, 1, 20), {10, 20, 40}),  # 30 is never evaluated
        ([10, 20, 30, 40], {10: 0.5, 30: 0.1}, (1, 1, 10), {10, 40}),  # 20 was skipped
        ([10, 20, 30], {}, (1, 1, 0), {30}),  # no evaluations
        ([10], {}, (2, 3, 10), {10}),
    ],
)
def test_kept_steps(
    steps: list[int],
    results: dict[int, float],
    rules: tuple[int, int, int],
    expected: set[int],
) -> None:
    assert retention.kept(steps, results, config(*rules)) == expected


def saved(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / f"step_{step:06d}").mkdir()
        (folder / f"step_{step:06d}" / "meta.json").write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_result_is_kept_with_its_checkpoint_and_decides_at_once(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    rules = config(1, 1, 1)
    for step, reward_mean in ((1, 0.25), (2, 0.75), (7, 1.0)):  # 7 has no checkpoint
        retention.note_evaluation(tmp_path, rules, step, reward_mean)
    assert names(tmp_path) == ["step_000002", "step_000003"]
    assert retention.evaluations(tmp_path) == {2: 0.75}


def test_a_kill_during_a_removal_leaves_no_part_under_the_name_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, 2)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        retention.remove_surplus(tmp_path, config(1, 0, 1))
    assert names(tmp_path) == [".step_000001.removed.unfinished", "step_000002"]


def test_a_learner_keeps_the_best_checkpoint_of_a_run(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    given = make_config(
        save_model(tmp_path / "model"),
        tmp_path / "run",
        buffer__address=address,
        weights__transport="file",
        run__steps=4,
        learner__checkpoint_every=1,
        learner__keep_checkpoints=1,
        eval__every=1,
    )
    shards = {step: make_shards(make_trajectories(seed=step), step) for step in range(4)}
    rewards = {1: 0.25, 2: 0.75, 3: 0.5, 4: 0.0}
    with FakeBuffer(address, shards, last_step=3, rewards=rewards):
        assert run_rank(given) == 0
    folder = tmp_path / "run" / "checkpoints"
    assert names(folder) == ["latest", "step_000002", "step_000004"]
    assert retention.evaluations(folder) == {2: 0.75, 4: 0.0}  # the last came with the end
