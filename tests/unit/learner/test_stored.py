"""A model sharded from mapped files has exactly the weights and buffers of `from_pretrained`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from configs.schema import Config
from learner import fsdp
from learner.stored import uncast
from tests.families import FAMILIES, save_family
from tests.learner_cases import make_config

CPU = torch.device("cpu")


def stored_as(folder: Path, family: str, dtype: torch.dtype, **changes: Any) -> Path:
    """A tiny model whose files hold `dtype`."""
    save_family(folder, family, **changes)
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder


def assert_same(model: PreTrainedModel, path: Path, dtype: torch.dtype) -> None:
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    pairs = [
        (dict(model.named_parameters(remove_duplicate=False)), expected.named_parameters),
        (dict(model.named_buffers(remove_duplicate=False)), expected.named_buffers),
    ]
    for got, all_expected in pairs:
        wanted = dict(all_expected(remove_duplicate=False))
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert got[name].dtype == tensor.dtype, name
            assert torch.equal(fsdp.whole(got[name].detach()), tensor), name
    tied = {n for n, p in model.named_parameters()}
    assert tied == {n for n, p in expected.named_parameters()}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_bit_by_bit(
    tmp_path: Path, family: str, stored: torch.dtype
) -> None:
    path = stored_as(tmp_path / "model", family, stored)
    config = make_config(path, tmp_path / "run")
    with fsdp.process_group(config) as device:
        for dtype in (torch.float32, torch.bfloat16):
            assert_same(fsdp.load_sharded(config, device, dtype), path, dtype)


def test_pickled_weights_are_loaded_too(tmp_path: Path) -> None:
    path = stored_as(tmp_path / "model", "llama", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    config = make_config(path, tmp_path / "run")
    with fsdp.process_group(config) as device:
        assert_same(fsdp.load_sharded(config, device), path, torch.float32)


def test_weights_that_transformers_keeps_in_float32_stay_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"norm"})
    path = stored_as(tmp_path / "model", "llama", torch.float32)
    config = make_config(path, tmp_path / "run")
    with fsdp.process_group(config) as device:
        model = fsdp.load_sharded(config, device, torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
        assert_same(model, path, torch.bfloat16)


def test_weights_stay_views_of_their_file(tmp_path: Path) -> None:
    """Otherwise each rank of a node would hold a copy of the whole model."""
    path = stored_as(tmp_path / "model", "llama", torch.bfloat16)
    config = make_config(path, tmp_path / "run")
    with uncast():
        model = fsdp.load_model(config.model)
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("model.safetensors")
    ]
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert any(a <= parameter.data_ptr() < b for a, b in mapped), name
    assert next(fsdp.load_model(config.model).parameters()).dtype == torch.float32


def test_only_shards_are_cast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored_as(tmp_path / "model", "llama", torch.bfloat16)
    config = make_config(path, tmp_path / "run")
    monkeypatch.setattr(fsdp, "cast_shards", lambda model, dtype: None)
    with fsdp.process_group(config) as device:
        model = fsdp.load_sharded(config, device)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def check_rank(rank: int, num_ranks: int, config: Config, path: Path, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=num_ranks, init_method=f"file://{store}"
    )
    model = fsdp.load_sharded(config, CPU)
    assert_same(model, path, torch.float32)
    alone = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    gradients = []
    for each in (model, alone):
        each.set_attn_implementation("eager")
        each(input_ids=torch.arange(12)[None]).logits.logsumexp(-1).sum().backward()
        named = each.named_parameters()
        gradients.append({name: fsdp.whole(p.grad) for name, p in named if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():  # the sum over ranks, each with the same input
        torch.testing.assert_close(gradients[0][name], num_ranks * gradient, rtol=1e-4, atol=1e-4)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("tied", [True, False])
def test_ranks_of_unequal_shards_hold_the_same_weights(tmp_path: Path, tied: bool) -> None:
    """Three ranks divide neither 64 nor 320 rows evenly, so that shards are padded."""
    path = stored_as(tmp_path / "model", "qwen2", torch.bfloat16, tie_word_embeddings=tied)
    config = make_config(path, tmp_path / "run")
    config = replace(config, learner=replace(config.learner, num_ranks=3))
    arguments = (3, config, path, str(tmp_path / "store"))
    multiprocessing.spawn(check_rank, arguments, nprocs=3)
