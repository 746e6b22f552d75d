"""Immutable, versioned weight snapshots, gathered from all ranks and offered to the actors.

Owns the content of a snapshot, which is a model's weights or only its adapters;
`buffer.wire.snapshots` owns its transport. Never changes a weight. Driven by `learner.publication`,
which trains on as soon as the weights are copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from buffer.wire.messages import SnapshotRef
from buffer.wire.snapshots import NUM_KEPT, SnapshotServer, write_snapshot
from configs.adapters import swaps_adapters
from configs.schema import Config
from learner import fsdp
from learner.adapters import adapters_of, only_adapters, without_adapters
from learner.snapshots.gathering import gather_into
from learner.snapshots.layout import Layout

Finish = Callable[[Callable[[], None]], SnapshotRef]  # its argument raises if it is to end early
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Plan:
    """How the tensors of a model become those of its checkpoint, or of its adapters' file."""

    layout: Layout  # of the file's tensors
    in_place: bool  # whether they are the model's tensors, with the same names
    shapes: dict[str, torch.Tensor]  # of the model's tensors, in the published type, on meta


def plan(model: PreTrainedModel, dtype: torch.dtype, adapters_alone: bool = False) -> Plan:
    """The plan for all snapshots of `model` in `dtype`."""
    tensors = only_adapters(model) if adapters_alone else _untied(model)
    shapes = {
        name: torch.empty(tensor.shape, dtype=_published(tensor, dtype), device="meta")
        for name, tensor in tensors.items()
    }
    reverted = shapes if adapters_alone else _as_in_checkpoint(model, shapes)
    in_place = reverted.keys() == shapes.keys() and all(
        reverted[name] is tensor for name, tensor in shapes.items()
    )
    return Plan(Layout(reverted), in_place, shapes)


def gather(model: PreTrainedModel, dtype: torch.dtype, keep: bool) -> dict[str, torch.Tensor]:
    """The whole model on the CPU in `dtype`, with a checkpoint's names. A collective.

    Ranks without `keep` get {}.
    """
    weights = _targets(plan(model, dtype).shapes) if keep else None
    _copy(model, dtype, weights)
    return _as_in_checkpoint(model, weights) if weights is not None else {}


def _targets(shapes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.empty_like(meta, device="cpu") for name, meta in shapes.items()}


def _copy(
    model: PreTrainedModel, dtype: torch.dtype, targets: dict[str, torch.Tensor] | None
) -> None:
    """Copy the model's tensors in `dtype` into `targets`, which rank 0 has. A collective.

    Tied weights appear once, under the name that a checkpoint gives them: an engine knows by itself
    whether its head has to be filled from the embeddings. Adapters are added to the weights that
    they belong to.
    """
    adapters = adapters_of(model)

    def cast(name: str, rows: torch.Tensor, first: int) -> torch.Tensor:
        if name in adapters:
            delta = adapters[name].delta(fsdp.whole)
            rows = rows.float() + delta[first : first + rows.shape[0]]
        return rows.to(_published(rows, dtype))

    gather_into(_untied(model), targets, cast)


def _published(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype


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
        for name, tensor in without_adapters(model, model.state_dict()).items()
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

    A context manager. Its buffers are used in turn: two hold the snapshots that are served, and a
    third one is filled. A folder needs only the one that is filled.
    """

    def __init__(self, config: Config, rank: int) -> None:
        self._dtype = DTYPES[config.model.dtype]
        self._adapters_alone = swaps_adapters(config)
        self._keep = rank == 0
        self._folder = Path(
            config.weights.dir or Path(config.run.dir) / config.run.name / "weights"
        )
        over_zmq = self._keep and config.weights.transport == "zmq"
        self._server = (
            SnapshotServer(
                config.weights.address,
                config.buffer.keys,
                self._dtype.itemsize if config.weights.deltas else 0,
            )
            if over_zmq
            else None
        )
        self._plan: Plan | None = None
        self._buffers: deque[torch.Tensor] = deque(maxlen=NUM_KEPT + 1 if over_zmq else 1)

    def publish(self, model: PreTrainedModel, version: int) -> SnapshotRef | None:
        """Make `version` available. Returns its reference on rank 0, else None. A collective."""
        finish = self.copy(model, version)
        return finish(lambda: None) if finish else None

    def copy(self, model: PreTrainedModel, version: int) -> Finish | None:
        """Copy the weights as `version`. A collective, after which the weights may change.

        Rank 0 gets a function that makes the copy available. It may be called by another thread,
        and must have returned before the next copy.
        """
        if not self._keep:
            self._copy(model, None)
            return None
        if self._plan is None:
            self._plan = plan(model, self._dtype, self._adapters_alone)
        planned, buffer = self._plan, self._next_buffer(self._plan.layout)
        views = planned.layout.views(buffer)
        targets = views if planned.in_place else _targets(planned.shapes)
        self._copy(model, targets)

        def finish(go_on: Callable[[], None]) -> SnapshotRef:
            if not planned.in_place:
                for name, tensor in _as_in_checkpoint(model, targets).items():
                    go_on()
                    views[name].copy_(tensor)
            data = memoryview(buffer.numpy().data)
            if self._server:
                return self._server.publish(version, data, go_on)
            return write_snapshot(self._folder, version, data, go_on)

        return finish

    def take_metrics(self) -> dict[str, float]:
        """Bytes that this rank has sent to engines since the last call, if it serves them."""
        if self._server is None:
            return {}
        return {"publish/served_bytes": float(self._server.take_served_bytes())}

    def _copy(self, model: PreTrainedModel, targets: dict[str, torch.Tensor] | None) -> None:
        if not self._adapters_alone:
            _copy(model, self._dtype, targets)
            return
        gather_into(only_adapters(model), targets, lambda _, rows, first: rows.to(self._dtype))

    def _next_buffer(self, layout: Layout) -> torch.Tensor:
        if len(self._buffers) == self._buffers.maxlen:
            self._buffers.rotate(-1)
        else:
            self._buffers.append(layout.buffer(pinned=torch.cuda.is_available()))
        return self._buffers[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._server:
            self._server.close()
