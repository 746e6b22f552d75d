"""Immutable, versioned weight snapshots: gathered from all ranks, serialised by rank 0, offered to the actors.

Owns what a snapshot contains. How it travels is `buffer.wire.snapshots`' business. Never changes a weight. Driven by `learner.train`.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import safetensors.torch
import torch
from transformers import PreTrainedModel

from buffer.wire.messages import SnapshotRef
from buffer.wire.snapshots import SnapshotServer, write_snapshot
from configs.schema import Config
from learner import fsdp

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def gather(model: PreTrainedModel, dtype: torch.dtype, keep: bool) -> dict[str, torch.Tensor]:
    """The whole model on the CPU in `dtype`, under Hugging Face names. A collective: every rank calls it; those without `keep` get {}.

    One tensor at a time is whole on the device. Tied weights appear under each of their names, each with its own memory: an engine that
    reloads layer by layer silently keeps its old head unless `lm_head.weight` comes too.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = fsdp.whole(tensor)
        if keep:
            kind = dtype if whole.is_floating_point() else whole.dtype
            weights[name] = torch.empty(whole.shape, dtype=kind).copy_(whole)
    head = model.get_output_embeddings()
    assert not keep or head is None or "lm_head.weight" in weights, (
        "the output head must be published under its own name"
    )
    return weights


class Publisher:
    """Rank 0's outlet for snapshots; on other ranks it only takes part in the gathering. A context manager."""

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
        """Make `version` available; where it is on rank 0, None elsewhere. A collective."""
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server:
            self._server.close()
