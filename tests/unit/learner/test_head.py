"""The head of a model in chunks gives what whole logits give, also if the model scales or bounds
its logits. A model for which that does not hold keeps whole logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from learner import fsdp
from learner.packs import head
from learner.packs.boundaries import Boundaries
from learner.probes.capability import probe_packing
from tests.families import save_family
from tests.learner_cases import make_config, pack_gradients, single_rank

SCALED: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0},
    "cohere2": {"logit_scale": 0.3},
}


@pytest.mark.parametrize("family", SCALED)
def test_the_gradient_is_that_of_whole_logits(tmp_path: Path, family: str) -> None:
    path = save_family(tmp_path / "model", family, **SCALED[family])
    config = make_config(path, tmp_path / "run", sampling__temperature=0.8)
    with single_rank(config) as state:
        assert state.boundaries.fused
        in_chunks = pack_gradients(state, 64)
        state.boundaries.fused = False
        whole = pack_gradients(state, 64)
    assert in_chunks.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(in_chunks[name], gradient, rtol=1e-4, atol=1e-7)


def test_the_model_itself_still_returns_bounded_logits(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "gemma2", **SCALED["gemma2"])
    with single_rank(make_config(path, tmp_path / "run")) as state:
        pack_gradients(state, 64)
        tokens = torch.arange(12)[None]
        logits = state.model(input_ids=tokens, use_cache=False, lengths=(12,)).logits
    assert 1.0 < logits.abs().max().item() <= 2.0


class Squashed(torch.nn.Linear):
    """A head whose logits are not a linear function of its input."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(super().forward(hidden))


def test_a_head_that_is_not_linear_is_found_by_measurement(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "llama", tie_word_embeddings=False)
    model = fsdp.load_model(make_config(path, tmp_path / "run").model)
    squashed = Squashed(*reversed(model.lm_head.weight.shape), bias=False)
    squashed.weight = model.lm_head.weight
    model.lm_head = squashed
    boundaries = Boundaries(model)
    packing = probe_packing(boundaries)
    assert not boundaries.fused
    assert packing.difference.logprob < 1e-5


def test_a_bound_of_logits_of_another_name_keeps_whole_logits(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "llama")
    model = fsdp.load_model(make_config(path, tmp_path / "run").model)
    assert head.is_linear(model)
    model.config.logits_soft_cap = 30.0
    assert not Boundaries(model).fused


def test_logits_of_a_pack_never_exist_as_a_whole(tmp_path: Path) -> None:
    """The layer of the head is never multiplied with more rows than a chunk has."""
    path = save_family(tmp_path / "model", "llama")
    with single_rank(make_config(path, tmp_path / "run")) as state:
        rows: list[int] = []
        linear = torch.nn.functional.linear

        def counted(given: torch.Tensor, *rest: Any) -> torch.Tensor:
            rows.append(len(given))
            return linear(given, *rest)

        with (
            patch("learner.packs.logprobs.CHUNK_ELEMENTS", 5 * 320),
            patch("learner.packs.logprobs.linear", counted),
        ):
            pack_gradients(state, 4096)
    assert len(rows) > 100 and max(rows) == 5
