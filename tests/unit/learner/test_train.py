"""A training step on one rank: the gradient does not depend on packing, and state survives on
disk and on the wire.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from buffer.wire.transport import TransportError
from learner import checkpoint
from learner.agreement import Disagreement
from learner.fsdp import load_model, whole
from learner.snapshots import publish
from learner.train import LearnerState, run_rank, save, train_step
from tests.families import save_family
from tests.learner_cases import (
    make_config,
    make_shards,
    make_trajectories,
    pack_gradients,
    save_model,
    shipped,
    single_rank,
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def weights(state: LearnerState) -> dict[str, torch.Tensor]:
    return {
        name: whole(parameter.detach()).clone()
        for name, parameter in state.model.named_parameters()
    }


def save_as(state: LearnerState, folder: Path, meta: dict[str, int]) -> None:
    """Write a checkpoint to another folder than the run's."""
    state.saver.folder = folder
    state.saver.start(state.model, state.optimizer, meta)
    state.saver.wait()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("max_tokens", [64, 4096])
def test_the_gradient_does_not_depend_on_the_packing(
    model_path: Path, tmp_path: Path, max_tokens: int, attention: str
) -> None:
    with single_rank(
        make_config(model_path, tmp_path / "run", model__attention=attention)
    ) as state:
        separate = pack_gradients(state, max_tokens=1)
        packed = pack_gradients(state, max_tokens)
        assert separate.keys() == packed.keys() == dict(state.model.named_parameters()).keys()
        for name, gradient in packed.items():
            torch.testing.assert_close(gradient, separate[name], rtol=1e-4, atol=1e-7)


def test_a_sliding_window_is_kept(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "mistral", sliding_window=4)
    tokens = torch.arange(20)[None]
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    with single_rank(make_config(path, tmp_path / "run")) as state, torch.no_grad():
        measured = state.model(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(measured, plain(input_ids=tokens).logits)


def test_a_disagreement_stops_before_the_weights_are_touched(
    model_path: Path, tmp_path: Path
) -> None:
    config = make_config(model_path, tmp_path / "run", learner__max_logprob_diff=0.0)
    shard = make_shards(make_trajectories(seed=0, version=3))[0]
    with single_rank(config) as state:
        state.policy_version, state.published = 3, True
        before = weights(state)
        with pytest.raises(Disagreement, match=r"step 0: .* nats .*max_logprob_diff allows 0.005"):
            train_step(state, shard)
        assert all(torch.equal(weights(state)[name], tensor) for name, tensor in before.items())


def test_activation_checkpointing_changes_nothing_but_memory(
    model_path: Path, tmp_path: Path
) -> None:
    with single_rank(make_config(model_path, tmp_path / "run")) as state:
        plain = pack_gradients(state, 128)
    with single_rank(
        make_config(model_path, tmp_path / "run", learner__activation_checkpointing=True)
    ) as state:
        recomputed = pack_gradients(state, 128)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_only_tokens_of_the_current_weights_are_compared(model_path: Path, tmp_path: Path) -> None:
    shard = make_shards(make_trajectories(seed=0, version=3))[0]
    with single_rank(make_config(model_path, tmp_path / "run")) as state:
        state.policy_version, state.published = 3, True
        metrics = train_step(state, shard)
        assert metrics["train/logprob_diff"] == pytest.approx(metrics["train/logprob_diff_all"])
        # Updated but not yet published: it no longer holds version 3.
        assert "train/logprob_diff" not in train_step(state, shard)


@pytest.mark.parametrize("signal", ["all truncated", "all rewards equal"])
def test_a_step_without_signal_changes_no_weight(
    model_path: Path, tmp_path: Path, signal: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither momentum nor weight decay moves the weights, and no token counts as trained."""
    mute = [
        msgspec.structs.replace(
            t, truncated=signal == "all truncated", reward=float(signal == "all truncated") * i
        )
        for i, t in enumerate(make_trajectories(seed=0))
    ]
    config = make_config(model_path, tmp_path / "run", optimizer__weight_decay=0.1)
    with single_rank(config) as state:
        assert train_step(state, make_shards(make_trajectories(seed=1))[0])["train/skipped"] == 0.0
        before = weights(state)
        metrics = train_step(state, shipped(mute, config.loss, step=1)[0])
        assert metrics["train/loss"] == metrics["train/grad_norm"] == metrics["train/tokens"] == 0.0
        assert metrics["train/skipped"] == 1.0
        assert "train/entropy" not in metrics
        assert state.step == 2
        assert all(torch.equal(weights(state)[name], tensor) for name, tensor in before.items())
    assert capfd.readouterr().err.count("learner: step 1: nothing to train on") == 1


def test_a_checkpoint_before_any_update_can_be_saved_and_resumed(
    model_path: Path, tmp_path: Path
) -> None:
    config = make_config(model_path, tmp_path / "run")
    shards = [make_shards(make_trajectories(seed=step), step)[0] for step in (1, 2)]
    with single_rank(config) as state:
        assert train_step(state, make_shards([])[0])["train/skipped"] == 1.0
        save(state)
        for shard in shards:
            train_step(state, shard)
        final = weights(state)
    with single_rank(config) as state:
        meta = checkpoint.load_latest(
            tmp_path / "run" / "checkpoints", state.model, state.optimizer
        )
        assert meta is not None and meta["step"] == 1
        state.step = 1
        for shard in shards:
            train_step(state, shard)
        assert all(torch.equal(weights(state)[name], tensor) for name, tensor in final.items())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    model_path: Path, tmp_path: Path
) -> None:
    trajectory = make_trajectories(seed=0)[0]
    broken = msgspec.structs.replace(trajectory, advantage=float("inf"))
    with single_rank(make_config(model_path, tmp_path / "run")) as state:
        before = weights(state)
        with pytest.raises(FloatingPointError, match="step 0"):
            train_step(state, make_shards([broken])[0])
        assert all(torch.equal(weights(state)[name], tensor) for name, tensor in before.items())


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    model_path: Path, tmp_path: Path
) -> None:
    config = make_config(model_path, tmp_path / "run", optimizer__weight_decay=0.1)
    shards = [make_shards(make_trajectories(seed=step), step)[0] for step in range(5)]
    with single_rank(config) as state:
        for shard in shards[:2]:
            train_step(state, shard)
        save_as(state, tmp_path / "checkpoints", {"step": 2, "policy_version": 1})
        losses = [train_step(state, shard)["train/loss"] for shard in shards[2:]]
        final = weights(state)
    with single_rank(config) as state:
        assert checkpoint.load_latest(tmp_path / "checkpoints", state.model, state.optimizer) == {
            "step": 2,
            "policy_version": 1,
        }
        state.step = 2
        assert [train_step(state, shard)["train/loss"] for shard in shards[2:]] == losses
        assert all(torch.equal(weights(state)[name], tensor) for name, tensor in final.items())


def test_latest_names_the_newest_complete_checkpoint_and_leftovers_are_removed(
    model_path: Path, tmp_path: Path
) -> None:
    (tmp_path / ".step_000001.unfinished").mkdir()  # left by a learner killed while saving
    with single_rank(
        make_config(model_path, tmp_path / "run", learner__keep_checkpoints=3)
    ) as state:
        train_step(state, make_shards(make_trajectories(seed=0))[0])
        for step in (1, 2, 3):
            save_as(state, tmp_path, {"step": step, "policy_version": step})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step_000001", "step_000002", "step_000003"]
    assert (tmp_path / "latest").read_text().strip() == "step_000003"
    assert json.loads((tmp_path / "step_000003" / "meta.json").read_text()) == {
        "step": 3,
        "policy_version": 3,
    }


def test_a_rank_keeps_as_many_checkpoints_as_configured(model_path: Path, tmp_path: Path) -> None:
    with single_rank(
        make_config(model_path, tmp_path / "run", learner__keep_checkpoints=1)
    ) as state:
        for step in range(3):
            train_step(state, make_shards(make_trajectories(seed=step), step)[0])
            save(state)
            save(state)  # this step is saved already, so nothing happens
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "latest",
        "step_000003",
    ]


def test_without_a_checkpoint_there_is_nothing_to_load(model_path: Path, tmp_path: Path) -> None:
    with single_rank(make_config(model_path, tmp_path / "run")) as state:
        assert checkpoint.load_latest(tmp_path, state.model, state.optimizer) is None


def test_the_weights_of_a_checkpoint_load_without_ranks(model_path: Path, tmp_path: Path) -> None:
    config = make_config(model_path, tmp_path / "run")
    with single_rank(config) as state:
        train_step(state, make_shards(make_trajectories(seed=0))[0])
        save_as(state, tmp_path, {"step": 1, "policy_version": 1})
        trained = weights(state)
    model = load_model(config.model)
    checkpoint.load_weights(tmp_path / "step_000001", model)
    assert all(
        torch.equal(parameter, trained[name]) for name, parameter in model.named_parameters()
    )
    other = load_model(
        make_config(
            save_model(tmp_path / "other", family="llama", tied=False), tmp_path / "run"
        ).model
    )
    with pytest.raises(ValueError, match="step_000001"):
        checkpoint.load_weights(tmp_path / "step_000001", other)


def test_a_checkpoint_of_another_model_is_refused(model_path: Path, tmp_path: Path) -> None:
    with single_rank(make_config(model_path, tmp_path / "run")) as state:
        train_step(state, make_shards(make_trajectories(seed=0))[0])
        save_as(state, tmp_path / "checkpoints", {"step": 1, "policy_version": 1})
    other = save_model(tmp_path / "other", family="llama", tied=False)
    with (
        single_rank(make_config(other, tmp_path / "run")) as state,
        pytest.raises(ValueError, match="step_000001"),
    ):
        checkpoint.load_latest(tmp_path / "checkpoints", state.model, state.optimizer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_snapshot_reloads_to_identical_logits(tmp_path: Path, family: str, tied: bool) -> None:
    path = save_model(tmp_path / "model", family, tied)
    config = make_config(path, tmp_path / "run", weights__transport="file")
    tokens = torch.arange(12)[None]
    with single_rank(config) as state:
        train_step(state, make_shards(make_trajectories(seed=0))[0])
        with publish.WeightPublisher(config, rank=0) as publisher:
            snapshot = publisher.publish(state.model, version=5)
        with torch.no_grad():
            expected = state.model(input_ids=tokens, use_cache=False, lengths=(12,)).logits
    assert snapshot is not None and snapshot.version == 5
    shutil.copy(path / "config.json", tmp_path / "config.json")
    shutil.copy(snapshot.path, tmp_path / "model.safetensors")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    fresh, found = loaded
    assert not any(found.values()), found
    with torch.no_grad():
        torch.testing.assert_close(
            fresh(input_ids=tokens, use_cache=False).logits, expected, rtol=0, atol=1e-6
        )


def test_file_snapshots_are_written_to_the_configured_folder(
    model_path: Path, tmp_path: Path
) -> None:
    config = make_config(
        model_path,
        tmp_path / "run",
        weights__transport="file",
        weights__dir=str(tmp_path / "shared"),
    )
    with single_rank(config) as state, publish.WeightPublisher(config, rank=0) as publisher:
        snapshot = publisher.publish(state.model, version=0)
    assert snapshot is not None and Path(snapshot.path).parent == tmp_path / "shared"


def test_the_learner_waits_for_a_buffer_as_long_as_configured(
    model_path: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(TransportError, match=address):
        run_rank(
            make_config(
                model_path, tmp_path / "run", buffer__address=address, buffer__connect_timeout_s=0.5
            )
        )
    assert 0.5 <= time.monotonic() - started < 20  # the default is a minute


def test_a_snapshot_has_the_dtype_of_the_engines(model_path: Path, tmp_path: Path) -> None:
    config = make_config(
        model_path, tmp_path / "run", weights__transport="file", model__dtype="bfloat16"
    )
    with single_rank(config) as state, publish.WeightPublisher(config, rank=0) as publisher:
        snapshot = publisher.publish(state.model, version=0)
    assert snapshot is not None
    assert {
        tensor.dtype for tensor in safetensors.torch.load(Path(snapshot.path).read_bytes()).values()
    } == {torch.bfloat16}


def test_a_checkpoint_on_a_full_disk_names_it_and_leaves_the_one_before(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = make_config(model_path, tmp_path / "run")
    folder = Path(config.run.dir) / config.run.name / "checkpoints"
    with single_rank(config) as state:
        train_step(state, make_shards(make_trajectories(seed=0))[0])
        save(state)
        before = (folder / "latest").read_text()
        state.step += 1
        monkeypatch.setattr(checkpoint.CheckpointWriter, "write_data", full)
        with pytest.raises(OSError, match="No space left") as caught:
            save(state)
        assert caught.value.filename == str(folder)
        assert (folder / "latest").read_text() == before
