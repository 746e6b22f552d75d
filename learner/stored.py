"""Weights as a checkpoint's files store them: mapped into memory, not yet cast.

transformers casts each tensor while it loads a model, so every rank of a node would hold a whole
float32 copy. A tensor that is not cast stays a view of its mapped file, which all ranks of a node
share; FSDP then copies a rank's shard, and `cast_shards` casts only that. Casts are elementwise, so
both orders give equal bits. Owns these two halves. Driven by `learner.fsdp`.

Left out: models that are quantized or keep some weights in float32, and adapters, which are cast
as before. Weights that transformers converts (packed experts) are copied, as stored, by each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

AS_STORED = {"*": None}  # a plan of types, by patterns of names: no cast


@contextmanager
def uncast() -> Iterator[list[PreTrainedModel]]:
    """Within, `from_pretrained` leaves parameters in the types of the checkpoint, if all of a
    model's are to have one type. Yields the list of models of which it has.

    All else is as it was: buffers, missing weights, tied weights and conversions. It replaces a
    private method of transformers; a version that never calls it would cast as usual.
    """
    loader: Any = PreTrainedModel
    original = loader._load_pretrained_model
    left_as_stored: list[PreTrainedModel] = []

    def load(model: PreTrainedModel, state: Any, files: Any, settings: Any) -> Any:
        made = {name: p.dtype for name, p in model.named_parameters()}
        kept = {name: b.dtype for name, b in model.named_buffers()}
        special = settings.dtype_plan or settings.is_quantized
        if special or set(made.values()) != {settings.dtype}:
            return original(model, state, files, settings)
        result = original(model, state, files, replace(settings, dtype_plan=AS_STORED))
        for name, buffer in model.named_buffers():
            buffer.data = buffer.data.to(kept[name])
        left_as_stored.append(model)
        return result

    loader._load_pretrained_model = staticmethod(load)
    try:
        yield left_as_stored
    finally:
        loader._load_pretrained_model = staticmethod(original)


def cast_shards(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast every parameter of a sharded model, one shard at a time."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if isinstance(tensor, DTensor) else tensor

    model._apply(cast)
