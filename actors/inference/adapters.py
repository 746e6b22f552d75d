"""Adapters in vLLM: its options for a run whose engines swap them, and the folder it reads.

The learner publishes the matrices of `peft`; vLLM reads them as `peft` saves them, and adds them to
layers that it has wrapped at its start. Never loads anything. Driven by `actors.inference.engine`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from vllm.config.lora import MaxLoRARanks

from configs.schema import Config, LoraConfig

ALL = "all-linear"


def options(config: Config) -> dict[str, Any]:
    """vLLM's options for one adapter, which all requests use.

    Raises `ValueError` if the rank is too high, and the errors of transformers.
    """
    lora = config.model.lora
    targets = linear_layers(config.model.path) if lora.targets == [ALL] else list(lora.targets)
    # Left to itself, vLLM wraps the head as well, and then fails while it scores a sequence.
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": _largest_rank(lora.rank),
        "lora_target_modules": targets,
    }


def linear_layers(path: str) -> list[str]:
    """The names of the linear layers of the model at `path`, without its head. No weight is read.

    As `peft` understands `all-linear`.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        }
    )


def _largest_rank(rank: int) -> int:
    """The smallest of the ranks for which vLLM reserves memory that is enough for `rank`."""
    known = sorted(get_args(MaxLoRARanks))
    if rank > known[-1]:
        raise ValueError(
            f"model.lora.rank={rank}: vLLM serves adapters of rank {known[-1]} at most; set "
            "model.lora.merge=true, so that engines load merged weights"
        )
    return next(one for one in known if one >= rank)


@contextmanager
def folder(path: str, lora: LoraConfig) -> Iterator[str]:
    """A folder as `peft` writes it, whose matrices are those of the safetensors file `path`."""
    with tempfile.TemporaryDirectory(prefix="adapter-") as name:
        settings = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": list(lora.targets)}
        Path(name, "adapter_config.json").write_text(json.dumps(settings))
        Path(name, "adapter_model.safetensors").symlink_to(path)
        yield name
