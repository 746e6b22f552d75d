"""Whether the learner fits into its device's memory, before a model is loaded.

The estimate may be wrong by `configs.memory.learner.TOLERANCE`, so only its certain part refuses a
run: all that a rank holds between steps, and gathered layers. Driven by `learner.train`.
"""

from __future__ import annotations

import psutil
import torch

from configs.memory.learner import HELD, on_device, on_host
from configs.memory.shape import ModelShape, gib
from configs.schema import Config
from learner.model_shape import shape_of_path

CERTAIN = (*HELD, "gathered layers")
REMEDY = (
    "learner.activation_checkpointing=true, a smaller batch.max_tokens and more learner.num_ranks "
    "need less per rank"
)


def check_fits(config: Config, device: torch.device) -> str:
    """A warning if a rank of `model.path` probably needs more memory than there is, "" otherwise.

    Raises `ValueError` if it certainly does, or if the model cannot be loaded.
    """
    shape = shape_of_path(config.model.path)
    tight = compare(shape, config, available_bytes(device), device.type == "cuda")
    if tight or device.type != "cuda" or not config.learner.offload:
        return tight
    return compare_offloaded(shape, config, psutil.virtual_memory().available)


def compare_offloaded(shape: ModelShape, config: Config, available: int) -> str:
    """A warning if the ranks of a machine probably need more than `available` bytes of its memory,
    "" otherwise.
    """
    memory = on_host(shape, config)
    if memory.total <= available:
        return ""
    return (
        f"learner.offload=true: the ranks of this machine probably need {memory} of its memory, "
        f"and {gib(available)} are free; ranks on more machines need less on each"
    )


def compare(shape: ModelShape, config: Config, available: int, cuda: bool) -> str:
    """A warning if a rank probably needs more than `available` bytes, "" otherwise.

    Raises `ValueError` with the arithmetic if it certainly does on a GPU. The machine's memory may
    be swapped, so a run on a processor is never refused.
    """
    memory = on_device(shape, config, cuda)
    certain = sum(part.num_bytes for part in memory.parts if part.name in CERTAIN)
    if cuda and certain > available:
        raise ValueError(
            f"model.path={config.model.path}, learner.num_ranks={config.learner.num_ranks}: a rank "
            f"needs at least {gib(certain)} on a GPU of {gib(available)}: {memory}; use more ranks"
            + (
                " or larger GPUs"
                if config.learner.offload
                else ", larger GPUs or learner.offload=true"
            )
        )
    if memory.total > available:
        return f"a rank probably needs {memory}, and there are {gib(available)}; {REMEDY}"
    return ""


def available_bytes(device: torch.device) -> int:
    """All memory of this rank's GPU, or the machine's memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available
