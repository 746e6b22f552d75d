"""Keys of the learner: two values of each change its weights, work or files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # has the backend "fake"
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from buffer.wire.client import LearnerLink
from buffer.wire.transport import TransportError
from configs.schema import Config
from learner import compiling, fsdp
from learner.agreement import Disagreement
from learner.session import BufferSession
from learner.snapshots.publish import WeightPublisher, gather
from learner.train import run_rank, train_step
from tests.knobs import Turn, check_turn
from tests.learner_cases import (
    FakeBuffer,
    make_groups,
    make_shards,
    make_trajectories,
    save_model,
    shipped,
    single_rank,
)

STEPS = 4


def weights(config: Config, own: Path) -> object:
    """All weights after two steps on the same trajectories, as they would be published."""
    with single_rank(config) as state:
        for step in range(2):
            train_step(state, shipped(make_trajectories(seed=step), config.loss, step)[0])
        published = gather(state.model, torch.float32, keep=True)
        return torch.cat([tensor.flatten() for tensor in published.values()]).tolist()


def passes(config: Config, own: Path) -> object:
    """Runs of the first MLP in one step: one per pack, and another if it recomputes."""
    calls = []
    with single_rank(config) as state:
        mlp = state.model.get_submodule("model.layers.0.mlp")
        mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        train_step(state, make_shards(make_trajectories(seed=0))[0])
    return len(calls)


def layout(config: Config, own: Path) -> object:
    """The lengths of the first pack that goes through the model, and those of its prompts."""
    with single_rank(config) as state:
        with patch.object(state.boundaries, "logprobs", wraps=state.boundaries.logprobs) as forward:
            train_step(state, make_shards(make_groups(seed=0))[0])
        pack = forward.call_args_list[0].args[0]
    return pack.lengths, pack.num_saved


def asks_to_take_over(config: Config, own: Path) -> object:
    """Whether its hello asks the buffer to replace a learner that is alive."""
    session = BufferSession(config, rank=0, num_ranks=1, incarnation="a", vocab_size=100)
    with patch.object(session.link, "connect") as connect:
        session.join(0)
    return connect.call_args[0][0].take_over


def model(config: Config, own: Path) -> object:
    with single_rank(config) as state:
        return type(state.model).__name__, state.model.config._attn_implementation


def device(config: Config, own: Path) -> object:
    """The type of its device, or the refusal of a machine without a GPU."""
    try:
        with fsdp.process_group(config) as found:
            return found.type
    except ValueError:
        return "refused"


def rows_held(config: Config, own: Path) -> object:
    """The rows of the embeddings that a rank holds, beside ranks that do not exist."""
    dist.init_process_group(
        "fake", rank=0, world_size=config.learner.num_ranks, store=dist.HashStore()
    )
    try:
        model = fsdp.load_sharded(config, torch.device("cpu"))
        weight = next(model.parameters())
        assert isinstance(weight, DTensor)
        return weight.to_local().shape[0]
    finally:
        dist.destroy_process_group()


def holds_in_memory(config: Config, own: Path) -> object:
    """The policy by which FSDP holds shards; on a CPU, all of them are in its memory."""
    with patch.object(fsdp, "fully_shard", wraps=fsdp.fully_shard) as shard, single_rank(config):
        return {type(call.kwargs["offload_policy"]).__name__ for call in shard.call_args_list}


def compiles(config: Config, own: Path) -> object:
    """How often blocks are to be compiled; tests/unit/learner/test_compiling.py compiles them."""
    with patch.object(compiling, "compile_blocks") as given:
        with single_rank(config):
            return given.call_count


def stops(config: Config, own: Path) -> object:
    """Whether a step stops a run whose actors' log-probabilities are random, and so disagree."""
    with single_rank(config) as state:
        state.policy_version, state.published = 0, True
        try:
            train_step(state, make_shards(make_trajectories(seed=0))[0])
        except Disagreement:
            return True
    return False


def published(config: Config, own: Path) -> object:
    """The location of a snapshot: an address, or the folder of its file."""
    config.run.dir = str(own)
    with single_rank(config) as state, WeightPublisher(config, rank=0) as publisher:
        snapshot = publisher.publish(state.model, version=0)
    assert snapshot is not None
    folder = str(Path(snapshot.path).parent.relative_to(own.parent)) if snapshot.path else ""
    return folder.replace(own.name, "own"), snapshot.address.replace("*", "")


def published_tensors(config: Config, own: Path) -> object:
    """The names of the tensors in a snapshot."""
    config.run.dir = str(own)
    with single_rank(config) as state, WeightPublisher(config, rank=0) as publisher:
        snapshot = publisher.publish(state.model, version=0)
    assert snapshot is not None
    return sorted(load_file(snapshot.path))


def offers_a_delta(config: Config, own: Path) -> object:
    """Whether the second of two equal snapshots can be had as a difference."""
    config.run.dir = str(own)
    with single_rank(config) as state, WeightPublisher(config, rank=0) as publisher:
        publisher.publish(state.model, version=0)
        snapshot = publisher.publish(state.model, version=1)
    assert snapshot is not None
    return snapshot.delta_bytes > 0


def checkpoints(config: Config, own: Path) -> object:
    """The folders that four steps leave, of which the first does best on held-out prompts."""
    config.run.dir = str(own)
    shards = {step: make_shards(make_trajectories(seed=step), step) for step in range(STEPS)}
    rewards = {step + 1: 1 / (step + 1) for step in range(STEPS)}
    with FakeBuffer(config.buffer.address, shards, last_step=STEPS - 1, rewards=rewards):
        assert run_rank(config) == 0
    return sorted(path.parent.name for path in own.rglob("meta.json"))


def is_patient(config: Config, own: Path) -> object:
    """Whether a learner tries for two seconds before it reports that there is no buffer."""
    config.run.dir = str(own)
    connect, times = LearnerLink.connect, []

    def timed(link: LearnerLink, *arguments: Any) -> Any:
        started = time.monotonic()
        try:
            return connect(link, *arguments)
        finally:
            times.append(time.monotonic() - started)

    with patch.object(LearnerLink, "connect", timed), pytest.raises(TransportError):
        run_rank(config)
    return [seconds >= 2 for seconds in times]


MODEL = (
    "model.path={folder}/qwen3",
    "learner.device=cpu",
    "optimizer.lr=1e-3",
    "batch.max_tokens=64",
    "buffer.address=tcp://127.0.0.1:{port}",
    f"run.steps={STEPS}",
    "learner.max_logprob_diff=9",  # the trajectories' log-probabilities are random
)
FILES = (*MODEL, "weights.transport=file")
KEEP_ALL = (*FILES, "learner.keep_checkpoints=9")
EVERY_STEP = (*FILES, "learner.checkpoint_every=1")
SERVED = (*MODEL, "weights.address=tcp://127.0.0.1:{port}")
MASK = (*MODEL, "loss.correction=mask")
LORA = (*MODEL, "model.lora.rank=2")
PENALTY = (*MODEL, "loss.kl=1")
TURNS = {
    "learner.take_over": Turn("false", "true", asks_to_take_over, MODEL),
    "loss.kind": Turn("dapo", "dr_grpo", weights, MODEL),
    "loss.ratio": Turn("token", "sequence", weights, MODEL),
    "loss.correction": Turn("truncated", "mask", weights, (*MODEL, "loss.mask_high=1.1")),
    "loss.aggregation": Turn("sequence_mean", "constant", weights, MODEL),
    "loss.baseline": Turn("group", "leave_one_out", weights, MODEL),
    "loss.scale": Turn("std", "none", weights, MODEL),
    "loss.clip_low": Turn("0.2", "0.01", weights, MODEL),
    "loss.clip_high": Turn("0.28", "0.01", weights, MODEL),
    "loss.tis_cap": Turn("2", "0.5", weights, MODEL),
    "loss.mask_low": Turn("0.5", "0.9", weights, MASK),
    "loss.mask_high": Turn("5", "1.1", weights, MASK),
    "loss.kl": Turn("0", "1", weights, MODEL),
    "loss.kl_estimator": Turn("k2", "k3", weights, PENALTY),
    "loss.reference": Turn('""', "{folder}/other", weights, PENALTY),
    "optimizer.lr": Turn("1e-3", "1e-2", weights, MODEL),
    "optimizer.betas": Turn("[0.9,0.95]", "[0.5,0.5]", weights, MODEL),
    "optimizer.weight_decay": Turn("0", "0.1", weights, MODEL),
    "optimizer.schedule": Turn("linear", "cosine", weights, MODEL),
    "optimizer.warmup_steps": Turn("0", "5", weights, MODEL),
    "optimizer.moments": Turn("float32", "bfloat16", weights, MODEL),
    "optimizer.max_grad_norm": Turn("1", "0.01", weights, MODEL),
    "sampling.temperature": Turn("1", "2", weights, MODEL),
    "model.dtype": Turn("float32", "bfloat16", weights, MODEL),
    "model.head_dtype": Turn("model", "float32", weights, (*MODEL, "model.dtype=bfloat16")),
    "model.lora.rank": Turn("0", "2", weights, MODEL),
    "model.lora.alpha": Turn("32", "4", weights, LORA),
    "model.lora.targets": Turn("[all-linear]", "[q_proj]", weights, LORA),
    "model.lora.merge": Turn("false", "true", published_tensors, (*LORA, "weights.transport=file")),
    "model.path": Turn("{folder}/qwen3", "{folder}/llama", model, MODEL),
    "model.attention": Turn("sdpa", "eager", model, MODEL),
    "batch.max_tokens": Turn("64", "4096", passes, MODEL),
    "batch.share_prompts": Turn("true", "false", layout, MODEL),
    "learner.activation_checkpointing": Turn("false", "true", passes, MODEL),
    "learner.shard_ranks": Turn("0", "2", rows_held, (*MODEL, "learner.num_ranks=4")),
    "learner.compile": Turn("false", "true", compiles, MODEL),
    "learner.offload": Turn("false", "true", holds_in_memory, MODEL),
    "learner.device": Turn("cpu", "cuda", device, MODEL),
    "learner.checkpoint_every": Turn("1", "3", checkpoints, KEEP_ALL),
    "learner.max_logprob_diff": Turn("0", "9", stops, MODEL),
    "learner.keep_best": Turn("0", "1", checkpoints, (*EVERY_STEP, "eval.every=1")),
    "learner.keep_checkpoints": Turn("1", "2", checkpoints, EVERY_STEP),
    "weights.transport": Turn("file", "zmq", published, SERVED),
    "weights.address": Turn("tcp://127.0.0.1:{port}", "tcp://127.0.0.1:{port2}", published, MODEL),
    "weights.deltas": Turn("false", "true", offers_a_delta, SERVED),
    "weights.dir": Turn('""', "{folder}/shared", published, FILES),
    "buffer.connect_timeout_s": Turn("0.1", "2", is_patient, MODEL),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("qwen3", "llama"):
        save_model(folder / family, family)
    save_model(folder / "other", seed=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", TURNS)
def test_a_key_changes_the_learner(
    path: str, tmp_path: Path, models: Path, free_port: Callable[[], int]
) -> None:
    for family in models.iterdir():
        (tmp_path / family.name).symlink_to(family)
    check_turn(path, TURNS[path], tmp_path, (free_port(), free_port()))
