"""Checkpoints from which a learner can resume, on any number of ranks.

They are never half-written and contain no pickle.

Owns <run>/checkpoints: `step_000040/` (model and optimizer as sharded safetensors, `meta.json`) and
`latest`, which names the newest complete one. A checkpoint of step 40 holds the state after 40
steps. Never decides when to save, or what to keep (`learner.retention`). Driven by `learner.train`.

Left out: the random state (training draws no random numbers) and the learning rate's schedule (a
function of the step).
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from buffer.records.files import UNFINISHED, atomic_write, replace_folder
from configs.errors import one_line

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


def save(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    meta: dict[str, int],
) -> None:
    """Write the checkpoint of `meta["step"]` and point `latest` at it. A collective.

    It gets its name once it is complete and durable, so a kill or a power cut at any moment leaves
    the previous one intact. If a rank cannot write (full disk), all ranks raise its `OSError`.
    """
    name = f"step_{meta['step']:06d}"
    partial = folder / f".{name}{UNFINISHED}"
    leads = dist.get_rank() == 0
    if leads:
        for leftover in folder.glob(f".step_*{UNFINISHED}"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    dist.barrier()
    # Sharded safetensors: torch.distributed.checkpoint's default format keeps its metadata as a
    # pickle.
    try:
        dcp.save(
            _tensors(model, optimizer),
            storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
        )
    except dcp.CheckpointException as error:  # every rank gets it, whichever one has failed
        raise next(cause for cause, _ in error.failures.values()) from None
    dist.barrier()
    if leads:
        (partial / "meta.json").write_text(json.dumps(meta) + "\n")
        replace_folder(partial, folder / name)
        atomic_write(folder / "latest", name + "\n")
    dist.barrier()


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
        dcp.load(_tensors(model, optimizer), storage_reader=HuggingFaceStorageReader(str(source)))
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


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
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
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter]:
                continue
            step_device = parameter.device if group["fused"] else "cpu"
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=step_device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
