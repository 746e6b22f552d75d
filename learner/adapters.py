"""LoRA adapters, through peft: small matrices that are trained in place of a model's own weights.

Owns which layers have adapters, their names in a snapshot, and how an adapter is merged into the
weight to which it belongs, as `tools.export` and `model.lora.merge` need it. Driven by
`learner.fsdp`.

Left out: adapters of the head, of embeddings and of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from configs.errors import one_line
from configs.extras import import_extra
from configs.schema import LoraConfig

ADAPTER = "default"  # peft's name of the only adapter
ALL = "all-linear"


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter of one weight, as two matrices and a scale."""

    down: torch.Tensor  # [rank, inputs]
    up: torch.Tensor  # [outputs, rank]
    scale: float
    transposed: bool  # whether its weight is [inputs, outputs]

    def delta(self, whole: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> torch.Tensor:
        """What it adds to its weight, in float32. `whole` gathers a sharded tensor."""
        product = whole(self.up.detach()).float() @ whole(self.down.detach()).float() * self.scale
        return product.T if self.transposed else product


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freeze the model, and add float32 adapters that change nothing yet. The same on every rank.

    Raises `ValueError` if peft is missing, or if a target cannot have an adapter.
    """
    key = f"model.lora.targets={config.targets}"
    peft = import_extra("peft", f"model.lora.rank={config.rank}", "lora")
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=ALL if config.targets == [ALL] else list(config.targets),
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            peft.inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise ValueError(f"{key}: {one_line(error)}") from error
    adapted = _layers(model)
    for target in set(config.targets) - {ALL}:
        if not any(f".{name}".endswith(f".{target}") for name in adapted):
            raise ValueError(f"{key}: {model.config.model_type} models have no layer {target}")
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, layer in adapted.items():
        if layer in ends or not isinstance(layer.base_layer, torch.nn.Linear | Conv1D):
            raise ValueError(
                f"{key}: {name} of {model.config.model_type} models cannot have an adapter, "
                "because it is no linear layer between embeddings and head; name other layers"
            )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapters_of(model: torch.nn.Module) -> dict[str, Adapter]:
    """Every adapter, by the name of its weight in a model without adapters."""
    return {
        f"{name}.weight": Adapter(
            down=layer.lora_A[ADAPTER].weight,
            up=layer.lora_B[ADAPTER].weight,
            scale=layer.scaling[ADAPTER],
            transposed=layer.fan_in_fan_out,
        )
        for name, layer in _layers(model).items()
    }


def only_adapters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The matrices of all adapters, by the names that peft gives them in a file."""
    return {
        f"base_model.model.{name}.{matrix}.weight": getattr(layer, matrix)[ADAPTER].weight.detach()
        for name, layer in _layers(model).items()
        for matrix in ("lora_A", "lora_B")
    }


def without_adapters(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a state dict that are the model's own, by the names that they had before."""
    renamed, added = {}, set()
    for name, layer in _layers(model).items():
        for inner in layer.state_dict():
            if inner.startswith("base_layer."):
                renamed[f"{name}.{inner}"] = f"{name}.{inner.removeprefix('base_layer.')}"
            else:
                added.add(f"{name}.{inner}")
    return {renamed.get(n, n): tensor for n, tensor in tensors.items() if n not in added}


@torch.no_grad()
def merge(model: torch.nn.Module) -> None:
    """Add all adapters of a model that is not sharded to its weights, and remove them."""
    adapters = adapters_of(model)
    for name, layer in _layers(model).items():
        base = layer.base_layer
        base.weight.add_(adapters[f"{name}.weight"].delta())
        model.set_submodule(name, base)


def _layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers that peft has wrapped (its `LoraLayer`, which is also a module), by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    }
