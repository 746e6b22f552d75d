"""Every tiny model is a folder that loads like a downloaded one and is the same each time."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.families import FAMILIES, VOCABULARY, save_family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_loads_like_a_downloaded_one(tmp_path: Path, family: str) -> None:
    folder = save_family(tmp_path / "model", family)
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    assert 90_000 < model.num_parameters() < 300_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == VOCABULARY
    ids = tokenizer("Hello, wörld 12")["input_ids"]
    assert len(ids) == 16  # one per byte, nothing added
    assert tokenizer.decode(ids) == "Hello, wörld 12"


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    first, second, other = (
        save_family(tmp_path / str(number), "qwen3_moe", seed=seed) / "model.safetensors"
        for number, seed in enumerate([0, 0, 1])
    )
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
