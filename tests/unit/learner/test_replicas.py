"""Ranks that hold several copies of the model (`learner.shard_ranks`) train, publish and save what
ranks that share one do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # has the backend "fake"
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from configs import cli
from configs.memory import learner as memory
from configs.schema import Config, LoraConfig
from learner import checkpoint, fsdp
from learner.model_shape import shape_of_path
from learner.snapshots.publish import WeightPublisher, gather
from learner.train import LearnerState, build_state, save, train_step
from tests.learner_cases import (
    in_ranks,
    make_config,
    make_shards,
    make_trajectories,
    save_model,
    step_gradients,
)

NUM_RANKS = 4
PARTS = [5, 0, 4, 3]  # the second rank has no trajectory
CPU = torch.device("cpu")

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    model = save_model(tmp_path / "model")
    return make_config(model, tmp_path / "run", learner__num_ranks=NUM_RANKS)


def on_mesh(config: Config, shards: int, name: str, **changes: Any) -> Config:
    return replace(
        config,
        learner=replace(config.learner, shard_ranks=shards),
        run=replace(config.run, name=name),
        weights=replace(config.weights, transport="file"),
        **changes,
    )


def shard(step: int, rank: int) -> Any:
    return make_shards(make_trajectories(seed=step), step, PARTS)[rank]


def curve(
    state: LearnerState, steps: range
) -> tuple[list[dict[str, float]], list[dict[str, torch.Tensor]]]:
    """Metrics and gradients of the steps."""
    both = [step_gradients(state, shard(step, state.rank)) for step in steps]
    return [metrics for metrics, _ in both], [gradients for _, gradients in both]


def contents(state: LearnerState) -> dict[str, torch.Tensor]:
    tensors = checkpoint.tensors_of(state.model, state.optimizer)
    return {name: fsdp.whole(tensor).clone() for name, tensor in tensors.items()}


def assert_replicas_are_equal(state: LearnerState) -> None:
    for name, parameter in state.model.named_parameters():
        assert isinstance(parameter, DTensor)
        mine = parameter.to_local().detach().contiguous()
        group = parameter.device_mesh.get_group("replicate")
        copies = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(copies, mine, group=group)
        assert all(torch.equal(copy, mine) for copy in copies), name


def check_curve(rank: int, config: Config) -> None:
    plain = build_state(on_mesh(config, 0, "plain"), CPU, rank, NUM_RANKS)
    metrics, gradients = curve(plain, range(3))
    for shards in (1, 2):
        state = build_state(on_mesh(config, shards, f"by-{shards}"), CPU, rank, NUM_RANKS)
        weight: Any = next(iter(state.model.parameters()))
        mesh = weight.device_mesh
        assert mesh.shape == (NUM_RANKS // shards, shards)
        measured, of_mesh = curve(state, range(3))
        for name, expected in gradients[0].items():
            difference = (of_mesh[0][name] - expected).norm() / expected.norm()
            assert difference < 1e-5, (shards, name)
        for got, wanted in zip(measured, metrics, strict=True):
            for name in ("train/loss", "train/grad_norm", "train/entropy", "train/tokens"):
                assert got[name] == pytest.approx(wanted[name], rel=1e-4), (shards, name)
        assert_replicas_are_equal(state)


@pytest.mark.slow
def test_the_curve_is_that_of_one_copy(config: Config, tmp_path: Path) -> None:
    in_ranks(NUM_RANKS, check_curve, config, tmp_path)


def check_rounding(rank: int, config: Config) -> None:
    """Moments in bfloat16 are rounded at random, in each copy alike, and saved as such."""
    optimizer = replace(config.optimizer, moments="bfloat16")
    on = on_mesh(config, 2, "rounded", optimizer=optimizer)
    state = build_state(on, CPU, rank, NUM_RANKS)
    with state.saver:
        curve(state, range(3))
        save(state)
    assert_replicas_are_equal(state)
    resumed = build_state(on_mesh(on, 0, "rounded"), CPU, rank, NUM_RANKS)
    assert checkpoint.load_latest(resumed.saver.folder, resumed.model, resumed.optimizer)
    saved, loaded = contents(state), contents(resumed)
    assert {saved[name].dtype for name in saved if name.startswith("exp_")} == {torch.bfloat16}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


@pytest.mark.slow
def test_copies_round_moments_alike(config: Config, tmp_path: Path) -> None:
    in_ranks(NUM_RANKS, check_rounding, config, tmp_path)


def check_publication(rank: int, config: Config) -> None:
    for shards in (1, 2):
        on = on_mesh(config, shards, f"by-{shards}")
        state = build_state(on, CPU, rank, NUM_RANKS)
        with WeightPublisher(on, rank) as publisher:
            first = publisher.publish(state.model, 0)
            train_step(state, shard(0, rank))
            expected = {n: fsdp.whole(p.detach()) for n, p in state.model.named_parameters()}
            trained = publisher.publish(state.model, 1)
        if rank == 0:
            assert first is not None and trained is not None
            stored = load_file(Path(config.model.path) / "model.safetensors")
            published = [load_file(snapshot.path) for snapshot in (first, trained)]
            for wanted, got in zip((stored, expected), published, strict=True):
                assert wanted.keys() == got.keys()
                assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
            assert not all(torch.equal(published[1][name], stored[name]) for name in stored)


@pytest.mark.slow
def test_snapshots_have_the_bits_of_the_weights(config: Config, tmp_path: Path) -> None:
    in_ranks(NUM_RANKS, check_publication, config, tmp_path)


def check_adapters(rank: int, config: Config) -> None:
    lora = replace(config.model, lora=LoraConfig(rank=3))
    snapshots = []
    for shards in (0, 2):
        on = on_mesh(config, shards, f"by-{shards}", model=lora)
        state = build_state(on, CPU, rank, NUM_RANKS)
        train_step(state, shard(0, rank))
        train_step(state, shard(1, rank))
        merged = gather(state.model, torch.float32, keep=rank == 0)
        with WeightPublisher(on, rank) as publisher:
            alone = publisher.publish(state.model, 0)
        snapshots.append(merged | (load_file(alone.path) if alone else {}))
    for name, tensor in snapshots[0].items():
        torch.testing.assert_close(snapshots[1][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_adapters_are_published_merged_and_alone(config: Config, tmp_path: Path) -> None:
    in_ranks(NUM_RANKS, check_adapters, config, tmp_path)


def check_checkpoints(rank: int, config: Config) -> None:
    sizes = {}
    for before, after in ((2, 0), (0, 1), (1, 2)):
        run = f"from-{before}"
        state = build_state(on_mesh(config, before, run), CPU, rank, NUM_RANKS)
        with state.saver:
            curve(state, range(2))
            save(state)
        saved = contents(state)
        expected, _ = curve(state, range(2, 3))
        resumed = build_state(on_mesh(config, after, run), CPU, rank, NUM_RANKS)
        folder = resumed.saver.folder
        meta = checkpoint.load_latest(folder, resumed.model, resumed.optimizer)
        assert meta == {"step": 2, "policy_version": -1}
        resumed.step = 2
        loaded = contents(resumed)
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
        measured, _ = curve(resumed, range(2, 3))
        for name in ("train/loss", "train/grad_norm", "train/entropy"):
            assert measured[0][name] == pytest.approx(expected[0][name], rel=1e-4), (run, name)
        files = (folder / "step_000002").glob("*.safetensors")
        sizes[before] = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert len(set(sizes.values())) == 1, "a copy of the model is written more than once"


@pytest.mark.slow
def test_a_checkpoint_continues_on_another_mesh(config: Config, tmp_path: Path) -> None:
    in_ranks(NUM_RANKS, check_checkpoints, config, tmp_path)


def test_ranks_that_are_left_over_are_refused(config: Config) -> None:
    """As when torchrun starts another number of ranks than the configuration says."""
    dist.init_process_group("fake", rank=0, world_size=3, store=dist.HashStore())
    try:
        with pytest.raises(ValueError, match=r"learner.shard_ranks=2: .* the number of ranks, 3;"):
            fsdp.load_sharded(on_mesh(config, 2, "run"), CPU)
    finally:
        dist.destroy_process_group()


def test_the_memory_of_a_rank_is_that_of_its_shards(config: Config) -> None:
    shape = shape_of_path(config.model.path)

    def held(*overrides: str) -> tuple[int, int]:
        of = cli.load(["learner.num_ranks=4", *overrides])
        rank, host = memory.on_device(shape, of, cuda=True), memory.on_host(shape, of)
        (copies,) = (part.num_bytes for part in host.parts if part.name == "checkpoint")
        return sum(p.num_bytes for p in rank.parts if p.name in memory.HELD), copies

    sixteen, twelve = 16 * shape.parameters, 12 * shape.parameters
    assert held() == (sixteen // 4, twelve)
    assert held("learner.shard_ranks=2") == (sixteen // 2, 2 * twelve)
    assert held("learner.shard_ranks=1") == (sixteen, 4 * twelve)
    two_nodes = "cluster.learner.num_nodes=2"
    assert held(two_nodes) == (sixteen // 8, twelve // 2)
    assert held(two_nodes, "learner.shard_ranks=4") == (sixteen // 4, twelve)
