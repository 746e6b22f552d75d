"""A model's sizes come from its configuration alone, and the memory computed from them is that of
real training steps.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from configs import cli
from configs.memory import learner as memory
from learner import fits, fsdp
from learner.adapters import adapters_of
from learner.model_shape import shape_of, shape_of_path
from tests.families import FAMILIES, save_family
from tests.learner_cases import make_config, save_model, single_rank

ROOT = Path(__file__).parents[3]
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gemma2"])
def test_the_sizes_are_those_of_the_model_that_is_loaded(family: str, tmp_path: Path) -> None:
    assert family in FAMILIES
    folder = save_family(tmp_path, family)
    shape = shape_of_path(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert shape.block_parameters == max(layers)
    assert shape.outer_parameters == shape.parameters - sum(layers)
    assert (shape.num_layers, shape.query_width, shape.kv_width) == (2, 64, 32)


def test_tied_embeddings_count_once() -> None:
    tied, untied = (
        shape_of(LlamaConfig(**SIZES | {"tie_word_embeddings": tied})) for tied in (True, False)
    )
    assert untied.parameters - tied.parameters == 256 * 512
    assert untied.outer_parameters - tied.outer_parameters == 256 * 512


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model.path={tmp_path}: this folder holds no model"):
        shape_of_path(str(tmp_path))


@pytest.mark.parametrize("targets", ["[all-linear]", "[q_proj,v_proj]", "[down_proj]"])
def test_adapters_are_counted_as_peft_makes_them(targets: str, tmp_path: Path) -> None:
    sizes = Qwen3Config(**SIZES)
    AutoModelForCausalLM.from_config(sizes).save_pretrained(tmp_path)
    keys = [f"model.path={tmp_path}", "model.lora.rank=4", f"model.lora.targets={targets}"]
    config = cli.load(keys)
    made = adapters_of(fsdp.load_model(config.model)).values()
    number = sum(adapter.down.numel() + adapter.up.numel() for adapter in made)
    assert memory.adapter_parameters(shape_of(sizes), config) == number


LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
CASES: dict[str, tuple[Any, ...]] = {  # the part that dominates: model sizes, tokens, other keys
    "optimizer": (LARGE, 1024),
    "activations": ({"num_hidden_layers": 4}, 4096),
    "loss": ({"vocab_size": 16384}, 2048),
    "frozen weights": (LARGE, 1024, "model.lora.rank=8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_measured_peaks_are_within_the_tolerance(case: str, tmp_path: Path) -> None:
    changes, tokens, *others = CASES[case]
    sizes = Qwen3Config(**SIZES | changes)
    AutoModelForCausalLM.from_config(sizes).save_pretrained(tmp_path)
    keys = [f"batch.max_tokens={tokens}", *others]
    done = subprocess.run(
        [sys.executable, "-m", "tests.step_memory", str(tmp_path), *keys],
        # A fixed threshold, from which freed memory returns to the system at once.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout)
    computed = memory.on_device(shape_of(sizes), cli.load(keys), cuda=False)
    beyond_imports = computed.total - memory.LIBRARY_BYTES
    assert abs(beyond_imports / measured - 1) <= memory.TOLERANCE, (measured / 2**20, str(computed))


def test_a_learner_that_certainly_does_not_fit_is_refused_with_the_arithmetic() -> None:
    shape = shape_of(Qwen3Config(**SIZES))
    config = cli.load(["batch.max_tokens=1024"])
    certain = 16 * shape.parameters
    arithmetic = r"needs at least 40 MiB .* 16 MiB optimizer \(8 B x 2.1e6 parameters\)"
    with pytest.raises(ValueError, match=arithmetic):
        fits.compare(shape, config, certain, cuda=True)
    probable = fits.compare(shape, config, 2 * certain, cuda=True)
    assert probable.startswith("a rank probably needs 1.1 GiB = 1.0 GiB CUDA")
    assert fits.compare(shape, config, 80 * 2**30, cuda=True) == ""
    assert fits.compare(shape, config, certain, cuda=False)  # memory may be swapped
    assert fits.compare(shape, config, 2 * 2**30, cuda=False) == ""


def test_a_learner_looks_at_the_memory_of_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(save_model(tmp_path / "model"), tmp_path / "run")
    monkeypatch.setattr(fits, "available_bytes", lambda device: 2**20)
    with single_rank(config):
        assert "a rank probably needs" in capsys.readouterr().err
