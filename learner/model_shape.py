"""The sizes of a model, from its `config.json` alone: no weight is read or allocated.

Owns the translation of a Hugging Face configuration into a `ModelShape`. The model is built on
torch's meta device, so that the numbers are exact for every family that transformers knows. Driven
by `learner.train` before it loads a model, and by `tools.doctor`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from configs.errors import one_line
from configs.memory.shape import ModelShape, widths
from configs.model_path import check_model


def shape_of_path(path: str) -> ModelShape:
    """The sizes of the model at `path`, a folder or a name on the hub.

    Raises `ValueError` if its configuration cannot be read or built.
    """
    check_model(path)
    try:
        return shape_of(AutoConfig.from_pretrained(path))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"model.path={path}: the learner cannot load it: {one_line(error)}"
        ) from error


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """The sizes of a model with this configuration. Raises the errors of transformers."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    classes = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in classes]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    tensors = [parameter.numel() for parameter in model.parameters()]  # tied ones once
    return ModelShape(
        parameters=sum(tensors),
        block_parameters=max(sizes, default=0),
        outer_parameters=sum(tensors) - sum(sizes),
        **widths(partial(_entry, config.get_text_config())),
    )


def _entry(config: PreTrainedConfig, name: str) -> Any:
    return getattr(config, name, None)
