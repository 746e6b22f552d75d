"""Every family computes the same packed as alone: as it is, with split layers, or with one
sequence per pack, and those of plain attention also with shared prompts. Models that cannot are
refused by name.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.packs.attention import PACKED_SDPA
from learner.packs.batch import make_packs
from learner.packs.boundaries import Boundaries
from learner.probes.capability import Packing, probe_packing
from tests.families import FAMILIES, save_family
from tests.learner_cases import (
    assert_same_gradients,
    make_config,
    make_groups,
    make_trajectories,
    pack_gradients,
    single_rank,
)

SPLIT = {
    "qwen3_5_text": ("Qwen3_5GatedDeltaNet",),
    "qwen3_next": ("Qwen3NextGatedDeltaNet",),
    "lfm2": ("Lfm2ShortConv",),
    "bamba": ("BambaMixer",),
    "falcon_h1": ("FalconH1Mixer",),
}
WINDOWED = {"gemma2", "gemma3_text", "mistral", "cohere2"}


def load(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(save_family(folder / family, family), dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_the_same_packed_as_alone(tmp_path: Path, family: str) -> None:
    path = save_family(tmp_path / "model", family)
    with single_rank(make_config(path, tmp_path / "run")) as state:
        packing = state.packing
        assert packing.split_kinds == SPLIT.get(family, ())
        assert not packing.one_per_pack
        assert max(packing.difference.logprob, packing.difference.gradient) < 1e-5
        assert packing.difference.leak == 0.0
        assert (max(packing.unaided.logprob, packing.unaided.gradient) > 0.05) == (family in SPLIT)
        expected = "sdpa" if family in WINDOWED else PACKED_SDPA
        assert state.model.config._attn_implementation == expected
        alone = pack_gradients(state, max_tokens=1)
        packed = pack_gradients(state, packing.capacity(4096))
        assert_same_gradients(packed, alone)
        assert state.shares_prompts == (family not in SPLIT and family not in WINDOWED)
        if state.shares_prompts:
            groups = make_groups(seed=1)
            repeated = pack_gradients(state, 1, groups)
            for max_tokens in (64, 4096):
                shared = pack_gradients(state, max_tokens, groups, share_prompts=True)
                assert_same_gradients(shared, repeated)


def test_a_leak_without_a_leaking_layer_is_packed_one_by_one(tmp_path: Path) -> None:
    """Bloom's attention bias depends on distance and is built for the whole row."""
    path = save_family(tmp_path / "model", "bloom", n_layer=2, n_head=2)
    with single_rank(make_config(path, tmp_path / "run")) as state:
        packing = state.packing
        assert packing.one_per_pack and packing.split_kinds == ()
        assert packing.unaided.logprob > 0.1
        assert packing.difference.logprob < 1e-5
        packs = make_packs(make_trajectories(seed=0), packing.capacity(64), 0)
        assert {len(pack.lengths) for pack in packs} == {1}
        assert "forward and a backward pass per response" in str(packing)


def test_a_model_that_explicit_positions_change_is_refused_by_name(tmp_path: Path) -> None:
    """RoBERTa's positions begin after its padding token, so positions from 0 are wrong even for a
    sequence that is alone.
    """
    model = load(tmp_path, "roberta")
    with pytest.raises(ValueError, match=r"roberta models cannot be trained: .* nats.*0\.0001"):
        probe_packing(Boundaries(model))


def test_a_model_that_cannot_run_is_refused_with_its_own_error(tmp_path: Path) -> None:
    model = load(tmp_path, "llama")
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(ValueError, match="llama models cannot be trained: a plain forward"):
        probe_packing(Boundaries(model))


class Smear(torch.nn.Linear):
    """A layer of no known family that mixes each token with the one before it."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(
            tokens + tokens.roll(1, dims=1) * (torch.arange(tokens.shape[1]) > 0)[:, None]
        )


def smeared(folder: Path) -> PreTrainedModel:
    model = load(folder, "llama")
    for layer in model.model.layers:
        weight = layer.self_attn.o_proj.weight
        layer.self_attn.o_proj = Smear(*reversed(weight.shape), bias=False)
        layer.self_attn.o_proj.weight = weight
    return model


def test_a_layer_that_leaks_is_found_by_measurement(tmp_path: Path) -> None:
    model = smeared(tmp_path)
    packing = probe_packing(Boundaries(model))
    assert packing.split_kinds == ("Smear",)
    assert packing.unaided.leak > 0.01
    assert packing.difference.leak == 0.0
    assert "Smear" in str(packing)


def test_the_probe_leaves_neither_gradients_nor_hooks(tmp_path: Path) -> None:
    model = smeared(tmp_path)
    probe_packing(Boundaries(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "lfm2", "mistral"])
def test_the_optimizer_steps_the_sharded_parameters(tmp_path: Path, family: str) -> None:
    path = save_family(tmp_path / "model", family)
    with single_rank(make_config(path, tmp_path / "run")) as state:
        (group,) = state.optimizer.param_groups
        assert all(isinstance(parameter, DTensor) for parameter in group["params"])
        assert {id(p) for p in group["params"]} == {id(p) for p in state.model.parameters()}


@pytest.mark.parametrize("family", SPLIT)
def test_a_leak_is_found_in_bfloat16_too(tmp_path: Path, family: str) -> None:
    packing: Packing = probe_packing(
        Boundaries(load(tmp_path, family, torch.bfloat16)), torch.bfloat16
    )
    assert packing.split_kinds == SPLIT[family]
    assert packing.difference.leak == 0.0


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "mixtral"])
def test_rounding_in_bfloat16_is_no_leak(tmp_path: Path, family: str) -> None:
    packing = probe_packing(Boundaries(load(tmp_path, family, torch.bfloat16)), torch.bfloat16)
    assert packing.split_kinds == () and not packing.one_per_pack
    assert packing.difference.leak == 0.0
