"""A snapshot has the names and shapes of the model's checkpoint and, before a step, its bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from learner.fsdp import load_model
from learner.snapshots import publish
from learner.train import train_step
from tests.families import FAMILIES, save_family
from tests.learner_cases import make_config, make_shards, make_trajectories, single_rank

FUSED = {"qwen3_moe", "mixtral", "qwen3_next"}  # transformers fuses their experts into one tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_a_snapshot_of_untrained_weights_equals_the_checkpoint(tmp_path: Path, family: str) -> None:
    path = save_family(tmp_path / "model", family)
    checkpoint = safetensors.torch.load_file(path / "model.safetensors")
    config = make_config(path, tmp_path / "run", weights__transport="file")
    with single_rank(config) as state, publish.WeightPublisher(config, rank=0) as publisher:
        names = publish.published_names(state.model)
        snapshot = publisher.publish(state.model, version=0)
        fused = not set(checkpoint) >= set(dict(state.model.named_parameters()))
    assert snapshot is not None
    published = safetensors.torch.load_file(snapshot.path)
    assert published.keys() == checkpoint.keys()
    assert names == {name: tensor.shape for name, tensor in published.items()}
    assert all(torch.equal(published[name], tensor) for name, tensor in checkpoint.items())
    assert fused == (family in FUSED or family == "gpt_neox")


@pytest.mark.parametrize("family", sorted(FUSED))
def test_a_trained_expert_is_published_under_its_own_name(tmp_path: Path, family: str) -> None:
    path = save_family(tmp_path / "model", family)
    config = make_config(path, tmp_path / "run")
    with single_rank(config) as state:
        before = publish.gather(state.model, torch.float32, keep=True)
        train_step(state, make_shards(make_trajectories(seed=0))[0])
        after = publish.gather(state.model, torch.float32, keep=True)
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 2 * 4 * 3  # layers, experts, projections
    for name in experts:
        # One step at a learning rate of 1e-3.
        assert 0 < (after[name] - before[name]).abs().max() < 2e-3, name


def test_a_model_that_is_not_sharded_is_gathered_without_a_process_group(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "qwen3")
    model = load_model(make_config(path, tmp_path / "run").model)
    gathered = publish.gather(model, torch.bfloat16, keep=True)
    checkpoint = safetensors.torch.load_file(path / "model.safetensors")
    assert gathered.keys() == checkpoint.keys()
    assert all(torch.equal(gathered[name], checkpoint[name].bfloat16()) for name in checkpoint)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_published_if_it_is_not_the_embeddings(tmp_path: Path, tied: bool) -> None:
    path = save_family(tmp_path / "model", "gemma2", tie_word_embeddings=tied)
    with single_rank(make_config(path, tmp_path / "run")) as state:
        assert ("lm_head.weight" in publish.published_names(state.model)) == (not tied)
