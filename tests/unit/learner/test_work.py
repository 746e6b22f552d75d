"""The work of a model, worked out by hand from its sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.schema import ModelConfig
from learner.fsdp import load_model
from learner.work import training_work
from tests.learner_cases import save_model

# Hidden size 32, two layers, two heads of 16 and one key-value head, an MLP of 64.
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
HEAD = 48 * 32


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_attention_are_in_units_of_the_layers(tmp_path: Path, tied: bool) -> None:
    model = load_model(ModelConfig(path=str(save_model(tmp_path / "model", tied=tied))))
    work = training_work(model)
    assert not work.shares_prompts and training_work(model, True).shares_prompts
    assert work.per_prediction == pytest.approx(HEAD / (2 * LAYER))
    # Two layers with two heads: 2 FLOPs x 2 x 16 for each pair, against 2 per weight and token.
    assert work.per_pair == pytest.approx(2 * 2 * 16 / (2 * LAYER))
