"""`tools.export` turns a checkpoint into an ordinary model folder, for any generation settings of
its source.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from configs import cli
from learner.fsdp import whole
from learner.train import save, train_step
from tests.families import save_family
from tests.learner_cases import make_config, make_shards, make_trajectories, single_rank
from tools.export import best_step, export

UNWRITABLE = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5]}


def trained_run(folder: Path, family: str, settings: dict[str, Any] | None) -> Path:
    """A run of one step with changed weights, whose source model has these generation settings."""
    model, run = save_family(folder / "model", family), folder / "run"
    (model / "generation_config.json").unlink()
    if settings is not None:
        (model / "generation_config.json").write_text(json.dumps(settings))
    config = make_config(model, run)
    run.mkdir()
    (run / "config.yaml").write_text(cli.to_yaml(config))
    with single_rank(config) as state:
        train_step(state, make_shards(make_trajectories(seed=0))[0])
        save(state)
        weights = {name: whole(tensor) for name, tensor in state.model.state_dict().items()}
    plain = AutoModelForCausalLM.from_pretrained(model)
    plain.load_state_dict(weights)
    torch.save(logits(plain), folder / "logits")
    return run


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.tensor([[40 + 7 * i % 200 for i in range(30)]])
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("settings", [None, UNWRITABLE])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "lfm2"])
def test_an_exported_model_computes_the_same_as_the_checkpoint(
    tmp_path: Path, family: str, settings: dict[str, Any] | None
) -> None:
    run = trained_run(tmp_path, family, settings)
    assert export(run, tmp_path / "out") == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = torch.load(tmp_path / "logits")
    assert (logits(model) - expected).abs().max() < 1e-5
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (logits(before) - expected).abs().max() > 1e-3
    written = tmp_path / "out" / "generation_config.json"
    assert (json.loads(written.read_text()) if written.exists() else None) == settings
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode(
        "ab"
    ) == AutoTokenizer.from_pretrained(tmp_path / "model").encode("ab")


def test_the_best_checkpoint_is_that_with_the_highest_reward(tmp_path: Path) -> None:
    run = trained_run(tmp_path, "llama", None)
    with pytest.raises(ValueError, match="no checkpoint that was evaluated"):
        best_step(run)
    for step, reward_mean in ((1, 0.5), (2, 0.25), (3, 0.5)):
        folder = run / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(exist_ok=True)
        result = {"eval/step": step, "eval/reward_mean": reward_mean}
        (folder / "evaluation.json").write_text(json.dumps(result))
    assert best_step(run) == 3
