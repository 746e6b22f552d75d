"""Immutable, versioned weight snapshots, gathered from all ranks and offered to the actors.

Owns the content of a snapshot; `buffer.wire.snapshots` owns its transport. Never changes a weight.
Driven by `learner.train`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import safetensors.torch
import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from buffer.wire.messages import SnapshotRef
from buffer.wire.snapshots import SnapshotServer, write_snapshot
from configs.schema import Config
from learner import fsdp

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def gather(model: PreTrainedModel, dtype: torch.dtype, keep: bool) -> dict[str, torch.Tensor]:
    """The whole model on the CPU in `dtype`, with a checkpoint's names. A collective.

    Ranks without `keep` get {}. One tensor at a time is whole on the device. Tied weights appear
    once, under the name that a checkpoint gives them: an engine knows by itself whether its head
    has to be filled from the embeddings.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in _untied(model).items():
        whole = fsdp.whole(tensor)
        if keep:
            kind = dtype if whole.is_floating_point() else whole.dtype
            weights[name] = torch.empty(whole.shape, dtype=kind).copy_(whole)
    return _as_in_checkpoint(model, weights) if keep else {}


def published_names(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Names and shapes of the tensors in each snapshot of `model`.

    They are those of the checkpoint from which it was loaded.
    """
    shapes = {
        name: torch.empty(tensor.shape, device="meta") for name, tensor in _untied(model).items()
    }
    return {name: tensor.shape for name, tensor in _as_in_checkpoint(model, shapes).items()}


def _untied(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }


def _as_in_checkpoint(
    model: PreTrainedModel, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Undo the renaming and fusing of transformers' loader, which concerns above all experts."""
    reverted = revert_weight_conversion(model, weights)
    return {name: tensor.contiguous() for name, tensor in reverted.items()}


class WeightPublisher:
    """Publishes snapshots on rank 0, while other ranks only take part in the gathering.

    A context manager.
    """

    def __init__(self, config: Config, rank: int) -> None:
        self._dtype = DTYPES[config.model.dtype]
        self._keep = rank == 0
        self._folder = Path(
            config.weights.dir or Path(config.run.dir) / config.run.name / "weights"
        )
        over_zmq = self._keep and config.weights.transport == "zmq"
        self._server = (
            SnapshotServer(config.weights.address, config.buffer.keys) if over_zmq else None
        )

    def publish(self, model: PreTrainedModel, version: int) -> SnapshotRef | None:
        """Make `version` available. Returns its reference on rank 0, else None. A collective."""
        weights = gather(model, self._dtype, self._keep)
        if not self._keep:
            return None
        data = safetensors.torch.save(
            weights, metadata={"format": "pt", "policy_version": str(version)}
        )
        return (
            self._server.publish(version, data)
            if self._server
            else write_snapshot(self._folder, version, data)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._server:
            self._server.close()
