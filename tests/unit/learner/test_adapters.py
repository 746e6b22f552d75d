"""Adapters alone are trained, saved and published, and merged weights are those of a model in which
they are merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs import cli
from configs.schema import Config, LoraConfig
from learner import fsdp
from learner.adapters import adapters_of, only_adapters
from learner.snapshots.publish import WeightPublisher, gather, published_names
from learner.train import save, train_step
from tests.families import save_family
from tests.learner_cases import (
    make_config,
    make_shards,
    make_trajectories,
    single_rank,
    train,
    with_and_without_restart,
)
from tools.export import export

FAMILIES = ["llama", "qwen3", "phi3", "gpt_neox", "lfm2"]
MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def lora_config(folder: Path, family: str, lora: LoraConfig, **changes: Any) -> Config:
    model = save_family(folder / "model", family)
    return make_config(model, folder / "run", model__lora=lora, **changes)


@torch.no_grad()
def logits(model: Any, **arguments: Any) -> torch.Tensor:
    tokens = torch.tensor([[40 + 7 * i % 200 for i in range(30)]])
    return model(input_ids=tokens, use_cache=False, **arguments).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_snapshot_computes_what_the_learner_computes(tmp_path: Path, family: str) -> None:
    lora = LoraConfig(rank=4, merge=True)
    config = lora_config(tmp_path, family, lora, optimizer__lr=1e-2, weights__transport="file")
    base = load_file(tmp_path / "model" / "model.safetensors")
    with single_rank(config) as state, WeightPublisher(config, rank=0) as publisher:
        first = gather(state.model, torch.float32, keep=True)
        assert first.keys() == base.keys() == published_names(state.model).keys()
        assert all(torch.equal(first[name], tensor) for name, tensor in base.items())
        train(state, 2)
        snapshot = publisher.publish(state.model, version=1)
        expected = logits(state.model, lengths=(30,))
    assert snapshot is not None
    published = load_file(snapshot.path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    unchanged = logits(plain)
    plain.load_state_dict(published, strict=False)
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=2e-5)
    assert (expected - unchanged).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_published_adapters_are_a_file_that_peft_reads(tmp_path: Path, family: str) -> None:
    config = lora_config(
        tmp_path, family, LoraConfig(rank=4), optimizer__lr=1e-2, weights__transport="file"
    )
    with single_rank(config) as state, WeightPublisher(config, rank=0) as publisher:
        train(state, 2)
        snapshot = publisher.publish(state.model, version=1)
        expected = logits(state.model, lengths=(30,))
    assert snapshot is not None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    unchanged = logits(plain)
    settings = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear")
    adapted = peft.PeftModel(plain, settings)
    read = peft.set_peft_model_state_dict(adapted, load_file(snapshot.path))
    assert not read.unexpected_keys
    assert not [name for name in read.missing_keys if ".lora_" in name]
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=2e-5)
    assert (expected - unchanged).abs().max() > 1e-2


def test_adapters_are_published_in_the_type_of_the_model(tmp_path: Path) -> None:
    lora = LoraConfig(rank=4)
    config = lora_config(
        tmp_path, "llama", lora, model__dtype="bfloat16", weights__transport="file"
    )
    with single_rank(config) as state, WeightPublisher(config, rank=0) as publisher:
        train(state, 1)
        snapshot = publisher.publish(state.model, version=1)
        held = only_adapters(state.model)
        assert snapshot is not None
        published = load_file(snapshot.path)
        assert published.keys() == held.keys()
        for name, tensor in published.items():
            assert torch.equal(tensor, fsdp.whole(held[name]).bfloat16()), name


def test_only_adapters_change_and_only_they_are_saved(tmp_path: Path) -> None:
    config = lora_config(tmp_path, "qwen3", LoraConfig(rank=4), optimizer__weight_decay=0.1)
    with single_rank(config) as state:
        before = {n: fsdp.whole(p.detach()).clone() for n, p in state.model.named_parameters()}
        train(state, 2)
        save(state)
        for name, parameter in state.model.named_parameters():
            changed = not torch.equal(fsdp.whole(parameter.detach()), before[name])
            assert changed == parameter.requires_grad == (".lora_" in name), name
        trained = gather(state.model, torch.float32, keep=True)
    base = load_file(tmp_path / "model" / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert {name.split(".")[-2] for name in changed} == MATRICES
    (saved,) = (tmp_path / "run" / "checkpoints" / "step_000002").glob("*.safetensors")
    with safe_open(saved, "pt") as file:
        names = set(file.keys())
    assert all(".lora_" in name for name in names)
    assert len(names) == 4 * 2 * len(changed)  # weight, two moments and step, of two matrices


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    config = lora_config(tmp_path, "llama", LoraConfig(rank=4))
    resumed, undisturbed = with_and_without_restart(config)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in undisturbed.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_has_the_merged_weights_that_were_published(tmp_path: Path, dtype: str) -> None:
    config = lora_config(tmp_path, "llama", LoraConfig(rank=4), model__dtype=dtype)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(cli.to_yaml(config))
    with single_rank(config) as state:
        held = {p.dtype for p in state.model.parameters() if not p.requires_grad}
        assert held == {getattr(torch, dtype)}  # frozen weights need no float32 copy
        assert {p.dtype for p in state.optimizer.param_groups[0]["params"]} == {torch.float32}
        train(state, 2)
        save(state)
        published = gather(state.model, getattr(torch, dtype), keep=True)
    assert export(tmp_path / "run", tmp_path / "out") == 2
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == published.keys()
    for name, tensor in published.items():
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=1e-6)


def test_rank_alpha_and_targets_decide_the_adapters(tmp_path: Path) -> None:
    config = lora_config(tmp_path, "llama", LoraConfig(rank=3, alpha=6, targets=["q_proj"]))
    model = fsdp.load_model(config.model)
    adapters = adapters_of(model)
    assert set(adapters) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert {a.scale for a in adapters.values()} == {2.0}
    assert {tuple(a.down.shape) for a in adapters.values()} == {(3, 64)}
    assert all(not a.up.any() and a.down.any() for a in adapters.values())


@pytest.mark.parametrize(
    ("family", "targets", "named"),
    [
        ("llama", ["q_proj", "qproj"], "llama models have no layer qproj"),
        ("llama", ["nothing"], "nothing"),
        ("llama", ["lm_head"], "lm_head of llama models cannot have an adapter"),
        ("llama", ["embed_tokens"], "model.embed_tokens of llama models cannot have an adapter"),
        ("qwen3_moe", ["all-linear"], "mlp.experts of qwen3_moe models cannot have an adapter"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # peft's own, about the same
def test_a_layer_without_a_possible_adapter_is_refused_by_name(
    tmp_path: Path, family: str, targets: list[str], named: str
) -> None:
    config = lora_config(tmp_path, family, LoraConfig(rank=4, targets=targets))
    with pytest.raises(ValueError, match=named) as refusal:
        fsdp.load_model(config.model)
    assert str(refusal.value).startswith("model.lora.targets=")


def test_the_kl_penalty_is_measured_from_the_model_without_adapters(tmp_path: Path) -> None:
    config = lora_config(tmp_path, "llama", LoraConfig(rank=4), loss__kl=1.0)
    with single_rank(config) as state:
        assert state.reference is not None
        assert not any(".lora_" in name for name, _ in state.reference.model.named_parameters())
        shards = [make_shards(make_trajectories(seed=step), step)[0] for step in range(2)]
        kl = [train_step(state, shard)["train/kl"] for shard in shards]
    assert kl[0] == pytest.approx(0.0, abs=1e-7)
    assert kl[1] > 1e-6
