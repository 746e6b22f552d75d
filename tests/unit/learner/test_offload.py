"""A learner that holds its state in the machine's memory (`learner.offload`) computes the same.

On a CPU, where all of it is there in any case. tests/gpu/test_learner.py compares it on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs import cli
from configs.memory import learner as memory
from configs.schema import Config
from learner import checkpoint, fits, fsdp
from learner.model_shape import shape_of_path
from learner.probes.differences import device_of
from learner.snapshots.publish import gather
from learner.train import build_state, save
from tests.learner_cases import (
    in_ranks,
    make_config,
    make_shards,
    make_trajectories,
    save_model,
    single_rank,
    step_gradients,
)

PARTS = [7, 5]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(save_model(tmp_path / "model"), tmp_path / "run", learner__num_ranks=2)


def check_rank(rank: int, config: Config) -> None:
    expected = None
    for offload, shards in ((False, 0), (True, 0), (True, 1)):
        learner = replace(config.learner, offload=offload, shard_ranks=shards)
        of = replace(config, learner=learner, run=replace(config.run, name=f"{offload}-{shards}"))
        state = build_state(of, torch.device("cpu"), rank, 2)
        with state.saver:
            steps = [
                step_gradients(state, make_shards(make_trajectories(seed=step), step, PARTS)[rank])
                for step in range(3)
            ]
            save(state)
        published = gather(state.model, torch.float32, keep=rank == 0)
        norms = [metrics["train/grad_norm"] for metrics, _ in steps]
        if expected is None:
            expected = (norms, steps, published)
            continue
        for (_, gradients), (_, wanted) in zip(steps, expected[1], strict=True):
            for name, gradient in wanted.items():
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)
        assert norms == pytest.approx(expected[0], rel=1e-4)
        for name, tensor in expected[2].items():
            torch.testing.assert_close(published[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_compute_the_same(config: Config, tmp_path: Path) -> None:
    in_ranks(2, check_rank, config, tmp_path)


def test_a_checkpoint_continues_with_another_placement(config: Config) -> None:
    offloading = replace(config, learner=replace(config.learner, offload=True))
    shards = [make_shards(make_trajectories(seed=step), step)[0] for step in range(3)]
    with single_rank(offloading) as state:
        for shard in shards[:2]:
            step_gradients(state, shard)
        save(state)
        _, expected = step_gradients(state, shards[2])
        undisturbed = gather(state.model, torch.float32, keep=True)
    with single_rank(config) as state:
        assert checkpoint.load_latest(state.saver.folder, state.model, state.optimizer)
        state.step = 2
        _, gradients = step_gradients(state, shards[2])
        resumed = gather(state.model, torch.float32, keep=True)
    assert all(torch.equal(gradients[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(resumed[name], tensor) for name, tensor in undisturbed.items())


def test_probes_compute_on_the_device_of_the_mesh(config: Config) -> None:
    with single_rank(replace(config, learner=replace(config.learner, offload=True))) as state:
        assert device_of(state.model) == state.device
    assert device_of(fsdp.load_model(config.model)) == torch.device("cpu")


@pytest.mark.parametrize("others", [(), ("loss.kl=1",), ("model.lora.rank=2",)])
def test_its_memory_is_counted_in_the_machine(config: Config, others: tuple[str, ...]) -> None:
    shape = shape_of_path(config.model.path)
    keys = ["learner.num_ranks=4", "learner.shard_ranks=2", "learner.device=cuda", *others]
    plain, offloading = cli.load(keys), cli.load([*keys, "learner.offload=true"])
    on_gpu, left = (memory.on_device(shape, of, cuda=True) for of in (plain, offloading))
    held = [part for part in on_gpu.parts if part.name in memory.HELD]
    assert held and not [part for part in left.parts if part.name in memory.HELD]
    moved = sum(part.num_bytes for part in held)
    under_way = [part.num_bytes for part in left.parts if part.name == "shards under way"]
    assert on_gpu.total - left.total == moved - sum(under_way)
    hosts = [memory.on_host(shape, of).total for of in (plain, offloading)]
    assert hosts[1] - hosts[0] == 4 * moved
    on_cpu = [memory.on_device(shape, of, cuda=False) for of in (plain, offloading)]
    assert on_cpu[0] == on_cpu[1]


def test_a_gpu_that_holds_only_gathered_layers_is_enough(config: Config) -> None:
    shape = shape_of_path(config.model.path)
    keys = ["learner.device=cuda", "learner.offload=true"]
    plain, offloading = cli.load(keys[:1]), cli.load(keys)
    room = 16 * shape.parameters
    with pytest.raises(ValueError, match=r"a rank needs at least .*learner.offload=true"):
        fits.compare(shape, plain, room, cuda=True)
    assert fits.compare(shape, offloading, room, cuda=True)


def test_a_machine_with_too_little_memory_is_a_warning(config: Config) -> None:
    shape = shape_of_path(config.model.path)
    offloading = cli.load(["learner.device=cuda", "learner.offload=true"])
    needed = memory.on_host(shape, offloading).total
    assert fits.compare_offloaded(shape, offloading, needed) == ""
    warning = fits.compare_offloaded(shape, offloading, needed - 1)
    assert warning.startswith("learner.offload=true: the ranks of this machine probably need")
