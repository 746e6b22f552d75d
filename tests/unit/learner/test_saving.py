"""Checkpoints are saved beside training: whole, one at a time, and never waited for in vain."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from buffer.wire.messages import Evaluated
from configs.schema import Config
from learner import checkpoint, fsdp, train
from learner.train import build_state, save, start_save
from tests import learner_cases
from tests.learner_cases import make_config, save_model, single_rank

WriteData = Callable[..., Any]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model_path: Path, tmp_path: Path) -> Config:
    return make_config(model_path, tmp_path / "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Saves are written once this is set."""
    event, write = threading.Event(), checkpoint.CheckpointWriter.write_data

    def held(*arguments: Any) -> Any:
        assert event.wait(300)
        return write(*arguments)

    monkeypatch.setattr(checkpoint.CheckpointWriter, "write_data", held)
    return event


def full(*_: object) -> None:
    raise SafetensorError("Error: I/O error: No space left on device (os error 28)")


def broken_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save_file", full)


def latest(folder: Path) -> str:
    return (folder / "latest").read_text().strip()


def test_a_checkpoint_holds_the_state_from_which_training_went_on(
    config: Config, folder: Path, release: threading.Event
) -> None:
    with single_rank(config) as state, state.saver:
        learner_cases.train(state, 2)
        before = {k: v.clone() for k, v in contents(state).items()}
        start_save(state)
        learner_cases.train(state, 2)
        assert state.saver.under_way == 2 and not (folder / "latest").exists()
        after = {k: v.clone() for k, v in contents(state).items()}
        release.set()
        state.saver.wait()
        assert state.saver.under_way is None and latest(folder) == "step_000002"
        meta = checkpoint.load_latest(folder, state.model, state.optimizer)
        assert meta == {"step": 2, "policy_version": -1}
        loaded = contents(state)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in before.items())
        assert not any(torch.equal(before[name], tensor) for name, tensor in after.items())


def contents(state: train.LearnerState) -> dict[str, torch.Tensor]:
    tensors = checkpoint.tensors_of(state.model, state.optimizer)
    return {name: fsdp.whole(tensor) for name, tensor in tensors.items()}


class Awaited(Future[Any]):
    """A save that can go on once the learner waits for it, and a little later."""

    def __init__(self, save: Future[Any], release: threading.Event) -> None:
        super().__init__()
        self._save, self._release = save, release

    def done(self) -> bool:
        return self._save.done()

    def result(self, timeout: float | None = None) -> Any:
        self._release.set()
        time.sleep(0.05)
        return self._save.result(timeout)


def test_a_second_save_waits_for_the_first_which_is_measured(
    config: Config, folder: Path, release: threading.Event
) -> None:
    with single_rank(config) as state, state.saver:
        learner_cases.train(state, 1)
        start_save(state)
        assert state.saver.take_metrics()["checkpoint/wait_s"] == 0
        assert state.saver._save is not None
        state.saver._save = Awaited(state.saver._save, release)
        learner_cases.train(state, 1)
        start_save(state)
        assert (folder / "step_000001" / "meta.json").exists()  # the first one is complete
        measured = state.saver.take_metrics()
        assert measured["checkpoint/wait_s"] >= 0.05
        assert measured["checkpoint/seconds"] >= 0.05
        assert measured["checkpoint/copy_s"] > 0
        assert state.saver.take_metrics()["checkpoint/wait_s"] == 0
    assert latest(folder) == "step_000002"


def test_a_failed_save_is_raised_as_soon_as_it_is_noticed(
    config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with single_rank(config) as state:
        learner_cases.train(state, 1)
        save(state)
        broken_save(monkeypatch)
        learner_cases.train(state, 1)
        start_save(state)
        while state.saver.under_way is not None:
            time.sleep(0.01)
        with pytest.raises(OSError, match="No space left") as caught:
            state.saver.check()
        assert caught.value.filename == str(folder) and latest(folder) == "step_000001"
        state.saver.check()  # once


def test_a_learner_that_fails_completes_its_save_first(
    config: Config, folder: Path, release: threading.Event
) -> None:
    with single_rank(config) as state:
        learner_cases.train(state, 1)
        with pytest.raises(FloatingPointError), state.saver:
            start_save(state)
            assert state.saver._save is not None
            state.saver._save = Awaited(state.saver._save, release)
            raise FloatingPointError
    assert latest(folder) == "step_000001"


def test_a_failed_save_does_not_hide_why_the_learner_ends(
    config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    broken_save(monkeypatch)
    with single_rank(config) as state:
        learner_cases.train(state, 1)
        with pytest.raises(FloatingPointError), state.saver:
            start_save(state)
            raise FloatingPointError
    assert "step 1: its checkpoint is not complete: " in capfd.readouterr().err


def test_an_evaluation_waits_for_its_checkpoint(
    config: Config, folder: Path, release: threading.Event
) -> None:
    config.learner.keep_checkpoints = 1
    session: Any = Results()
    with single_rank(config) as state, state.saver:
        learner_cases.train(state, 1)
        start_save(state)
        session.results = [Evaluated(step=1, reward_mean=0.5)]
        train._note_evaluations(state, session)
        train._note_evaluations(state, session)  # it is kept until it can be written
        release.set()
        state.saver.wait()
        train._note_evaluations(state, session)
    result = json.loads((folder / "step_000001" / "evaluation.json").read_text())
    assert result["eval/reward_mean"] == 0.5
    assert state.evaluations == []


class Results:
    """A session that hands out each result once."""

    results: list[Evaluated]

    def take_evaluations(self) -> list[Evaluated]:
        taken, self.results = self.results, []
        return taken


# Two ranks ---------------------------------------------------------------------------------------


def _killed_while_saving(config: Config, rank: int, folder: str) -> None:
    """Rank 1 hangs in its save of step 3 while both train on, and then both are killed."""
    os.environ["LEARNER_RENDEZVOUS"] = f"file://{folder}/killed"
    with fsdp.process_group(config, rank, 2) as device:
        state = build_state(config, device, rank, 2)
        train_both(state, 2)
        save(state)
        train_both(state, 1)
        if rank == 1:
            writer: Any = checkpoint.CheckpointWriter
            writer.write_data = lambda *_: threading.Event().wait()
        start_save(state)
        train_both(state, 2)
        (Path(folder) / f"trained_{rank}").touch()
        while not all((Path(folder) / f"trained_{other}").exists() for other in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


def _resumed(config: Config, rank: int, folder: str) -> None:
    os.environ["LEARNER_RENDEZVOUS"] = f"file://{folder}/resumed"
    with fsdp.process_group(config, rank, 2) as device:
        state = build_state(config, device, rank, 2)
        train._resume(state)
        assert state.step == 2
        train_both(state, 3)
        with state.saver:
            start_save(state)


def _full_on_one(config: Config, rank: int, folder: str) -> None:
    """The disk of rank 1 is full, and both raise its error."""
    os.environ["LEARNER_RENDEZVOUS"] = f"file://{folder}/full"
    with fsdp.process_group(config, rank, 2) as device:
        state = build_state(config, device, rank, 2)
        train_both(state, 1)
        if rank == 1:
            checkpoint.save_file = full
        start_save(state)
        with pytest.raises(OSError, match="No space left"):
            state.saver.wait()


def train_both(state: train.LearnerState, num_steps: int) -> None:
    for step in range(state.step, state.step + num_steps):
        shards = learner_cases.make_shards(
            learner_cases.make_trajectories(seed=step), step, parts=[7, 5]
        )
        train.train_step(state, shards[state.rank])


def run_ranks(target: Callable[..., None], *arguments: object) -> list[int | None]:
    """The exit codes of two processes."""
    config, folder = arguments
    context = mp.get_context("spawn")
    ranks = [context.Process(target=target, args=(config, rank, folder)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_killed_in_a_save_resume_from_the_checkpoint_before(
    config: Config, folder: Path, tmp_path: Path
) -> None:
    assert run_ranks(_killed_while_saving, config, str(tmp_path)) == [-signal.SIGKILL] * 2
    assert latest(folder) == "step_000002"
    assert (folder / ".step_000003.unfinished").is_dir()
    assert run_ranks(_resumed, config, str(tmp_path)) == [0, 0]
    assert sorted(path.name for path in folder.iterdir()) == [
        *("latest", "step_000002", "step_000005")
    ]
    config.run.name = "undisturbed"
    with single_rank(config) as state:  # another number of ranks, for the comparison as well
        learner_cases.train(state, 5)
        expected = {k: v.clone() for k, v in contents(state).items() if k.startswith("model.")}
        checkpoint.load_latest(folder, state.model, state.optimizer)
        for name, tensor in contents(state).items():
            if name in expected:
                torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_that_cannot_write_fails_the_save_of_all(
    config: Config, folder: Path, tmp_path: Path
) -> None:
    assert run_ranks(_full_on_one, config, str(tmp_path)) == [0, 0]
    assert not (folder / "latest").exists()
