"""Checkpoints from which a learner can resume, on any number of ranks.

They are never half-written and contain no pickle.

Owns the format of <run>/checkpoints: `step_000040/` (model and optimizer as sharded safetensors,
`meta.json`) and `latest`, which names the newest complete one. A checkpoint of step 40 holds the
state after 40 steps. Never decides when to save (`learner.train`), or what to keep
(`learner.retention`). Driven by `learner.saving`.

Left out: the random state (training draws no random numbers) and the learning rate's schedule (a
function of the step).
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    _gen_file_name,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from buffer.records.files import UNFINISHED, atomic_write, replace_folder, sync_file
from configs.errors import one_line
from learner import retention
from learner.optimizer import CompactAdamW, first_state

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


class CheckpointWriter(HuggingFaceStorageWriter):
    """Writes the checkpoint of `meta["step"]` and points `latest` at it, for torch's `save`.

    It gets its name once it is complete and durable, so a kill or a power cut at any moment leaves
    the previous one intact. Rank 0 makes its folder and completes it (`finish`) within torch's
    collectives, so that an error there reaches all ranks; `completed` is the last part of that.
    Sharded safetensors, because torch's default format keeps its metadata as a pickle.
    """

    def __init__(self, folder: Path, meta: dict[str, int], completed: Callable[[], None]) -> None:
        self._folder, self._meta, self._completed = folder, meta, completed
        self._name = f"step_{meta['step']:06d}"
        self._partial = folder / f".{self._name}{UNFINISHED}"
        super().__init__(str(self._partial), save_distributed=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # torch's own would make the folder on every rank

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        retention.remove_leftovers(self._folder)
        self._partial.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shards to one file, durably.

        Differs: torch serialises them in memory first, which takes as much memory again, and other
        threads wait meanwhile. `save_file` does neither, so that training goes on.
        """
        if plan.items:
            path = self._partial / _gen_file_name(1, 1, plan.storage_data["shard_index"])
            tensors, offsets = dict[str, torch.Tensor](), dict[str, Any]()
            for item in plan.items:
                name, data = item.index.fqn, planner.resolve_data(item)
                assert isinstance(data, torch.Tensor) and item.tensor_data is not None, name
                tensors[name] = data.contiguous()
                offsets[name] = {"saved_offsets": item.tensor_data.chunk.offsets}
            metadata = {
                CUSTOM_METADATA_KEY: json.dumps(offsets),
                DCP_VERSION_KEY: str(HF_DCP_VERSION),
                FORMAT_KEY: FORMAT_VALUE,
            }
            with _operating_system_errors():
                save_file(tensors, path, metadata)
            sync_file(path)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])  # only torch's own `finish` needs them
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        (self._partial / "meta.json").write_text(json.dumps(self._meta) + "\n")
        with retention.LOCK:
            replace_folder(self._partial, self._folder / self._name)
            atomic_write(self._folder / "latest", self._name + "\n")
            self._completed()


@contextmanager
def _operating_system_errors() -> Generator[None]:
    """Raise the `OSError` of a full disk as such. safetensors has it in its text alone."""
    try:
        yield
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def load_latest(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, int] | None:
    """Load the newest complete checkpoint in place and return its `meta.json`. A collective.

    None if there is no checkpoint. Raises `ValueError` if it does not fit the model or is damaged.
    """
    latest = folder / "latest"
    if not latest.is_file():
        return None
    source = folder / latest.read_text().strip()
    try:
        meta = json.loads((source / "meta.json").read_text())
        dcp.load(tensors_of(model, optimizer), storage_reader=HuggingFaceStorageReader(str(source)))
    except (OSError, KeyError, ValueError, RuntimeError, dcp.CheckpointException) as error:
        raise ValueError(
            f"run.resume=true: checkpoint {source} does not fit this model: {one_line(error)}; "
            "remove it to start again"
        ) from error
    return meta


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Load only the weights of the checkpoint `folder` into an unsharded model.

    No process group is needed. Raises `ValueError` if they do not fit.
    """
    try:
        wanted = {f"model.{name}": parameter.detach() for name, parameter in _trained(model)}
        # torch warns that there is no process group, which is intended.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (OSError, KeyError, ValueError, RuntimeError, dcp.CheckpointException) as error:
        raise ValueError(
            f"checkpoint {folder} does not fit this model: {one_line(error)}"
        ) from error


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The content of a checkpoint, as sharded tensors by name. Tied weights appear once."""
    tensors: dict[str, Any] = {}
    _create_state(optimizer)
    for name, parameter in _trained(model):
        tensors[f"model.{name}"] = parameter.detach()
        for part in ADAMW_STATE:
            tensors[f"{part}.{name}"] = optimizer.state[parameter][part]
    return tensors


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that change, by name. Others are those of the model that was loaded."""
    return [(n, parameter) for n, parameter in model.named_parameters() if parameter.requires_grad]


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters without a state the one that AdamW has before its first step.

    A parameter has none if it was never stepped or never had a gradient.
    """
    dtype = torch.bfloat16 if isinstance(optimizer, CompactAdamW) else torch.float32
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter]:
                continue
            optimizer.state[parameter] = first_state(parameter, dtype)
