"""Process group, model and sharding of one learner rank.

Owns everything that differs between devices and numbers of ranks: device and threads of a rank,
FSDP2 on one or several copies of the model, mixed precision, activation checkpointing, and the few
collectives that training needs besides FSDP's own. One rank takes the same path as many. Never
trains. Driven by `learner.train`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from configs.errors import one_line
from configs.extras import import_extra
from configs.model_path import check_model
from configs.schema import Config, ModelConfig
from learner.adapters import add_adapters
from learner.packs.attention import PACKED_SDPA
from learner.stored import cast_shards, uncast

# float16 gradients would underflow without loss scaling, so a learner whose engines use float16
# computes in float32.
COMPUTE_DTYPE = {"float32": torch.float32, "float16": torch.float32, "bfloat16": torch.bfloat16}

CPUINFO = Path("/proc/cpuinfo")
NATIVE_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # CPU flags of x86 and Arm


def pick_device(config: Config, local_rank: int) -> torch.device:
    """This rank's device. Raises `ValueError` if CUDA is asked for and this rank has no GPU."""
    wanted = config.learner.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if torch.cuda.device_count() <= local_rank:
        raise ValueError(
            f"learner.device={wanted}: rank {local_rank} of this node needs a GPU of its own, but "
            f"{torch.cuda.device_count()} are visible; lower learner.num_ranks, or use "
            "learner.device=cpu"
        )
    return torch.device("cuda", local_rank)


def slow_dtype(config: Config, device: torch.device, cpuinfo: Path = CPUINFO) -> str:
    """A warning if this CPU computes `model.dtype` in software, "" otherwise."""
    if device.type != "cpu" or config.model.dtype != "bfloat16":
        return ""
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if flags & NATIVE_BFLOAT16:
        return ""
    return (
        "model.dtype=bfloat16: this CPU has no bfloat16 arithmetic, so a step takes 15 to 30 times "
        "as long as in float32; use model.dtype=float32"
    )


@contextmanager
def process_group(
    config: Config, rank: int = 0, num_ranks: int = 1, local_rank: int = 0
) -> Iterator[torch.device]:
    """Join the learner's process group and yield this rank's device.

    A single rank needs no rendezvous. Several ranks meet at the rendezvous that `learner.__main__`
    (`LEARNER_RENDEZVOUS`) or torchrun sets.
    """
    device, offload = pick_device(config, local_rank), config.learner.offload
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu" or offload:
        # Leave one core to the engine and the buffer, which share this machine in a small run.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
        torch.set_num_threads(max(1, (len(os.sched_getaffinity(0)) - 1) // ranks_here))
    on_gpus = "cpu:gloo,cuda:nccl" if offload else "nccl"
    backend = on_gpus if device.type == "cuda" else "gloo"
    rendezvous: dict[str, Any] = (
        {"store": dist.HashStore()}
        if num_ranks == 1
        else {"init_method": os.environ.get("LEARNER_RENDEZVOUS", "env://")}
    )
    dist.init_process_group(backend, rank=rank, world_size=num_ranks, **rendezvous)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def load_sharded(
    config: Config, device: torch.device, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model of `model.path`, sharded over `learner.shard_ranks`, with weights in `dtype`.

    None: as training needs them (`held_dtype`). A rank maps the files (`learner.stored`), and
    copies and casts only its shard; a model that gets adapters is cast before. Raises `ValueError`
    if it cannot be loaded.
    """
    dtype = dtype or held_dtype(config.model)
    mesh = make_mesh(config, device)
    with nullcontext([]) if config.model.lora.rank else uncast() as left_as_stored:
        model = load_model(config.model, dtype)
    # Evaluation mode: dropout would make the learner's log-probabilities differ from the actors'.
    model.eval()
    blocks = [
        module
        for module in model.modules()
        if type(module).__name__ in set(model._no_split_modules or ())
    ]
    if config.learner.activation_checkpointing:
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    precision = MixedPrecisionPolicy(
        param_dtype=COMPUTE_DTYPE[config.model.dtype], reduce_dtype=torch.float32
    )
    offload = OffloadPolicy()
    if config.learner.offload:
        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the token count of the whole step, so gradients are
            # summed; FSDP would average them.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    if left_as_stored:
        cast_shards(model, dtype)
    for buffer in model.buffers():  # parameters are where `fully_shard` holds them
        buffer.data = buffer.data.to(device)
    return model


def make_mesh(config: Config, device: torch.device) -> DeviceMesh:
    """All ranks, as replicas of the model by shards of each. A collective.

    One replica is a mesh of one dimension. Otherwise a replica's ranks follow each other, so that
    they share a node if there is room for them. Raises `ValueError` if ranks are left over.
    """
    num_ranks = dist.get_world_size()
    shards = config.learner.shard_ranks or num_ranks
    if num_ranks % shards:
        raise ValueError(
            f"learner.shard_ranks={shards}: must be 0 or divide the number of ranks, {num_ranks}; "
            "otherwise some ranks would hold no whole copy of the model"
        )
    if shards == num_ranks:
        return init_device_mesh(device.type, (num_ranks,))
    return init_device_mesh(
        device.type, (num_ranks // shards, shards), mesh_dim_names=("replicate", "shard")
    )


def held_dtype(config: ModelConfig) -> torch.dtype:
    """The type of the model's own weights: float32, or that of computation if they are frozen."""
    return COMPUTE_DTYPE[config.dtype] if config.lora.rank else torch.float32


def load_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of `model.path` on the CPU, in `dtype`, not sharded, with adapters if it gets some.

    Raises `ValueError` if it cannot be loaded.
    """
    if config.attention == "flash_attention_2" and config.dtype == "float16":
        raise ValueError(
            "model.attention=flash_attention_2: needs model.dtype=bfloat16, because the learner "
            "never trains in float16"
        )
    if config.attention == "flash_attention_2":
        import_extra("flash_attn", "model.attention=flash_attention_2", "flash-attn")
    check_model(config.path)
    disable_progress_bar()
    ours = config.attention == "sdpa"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.path,
            dtype=dtype,
            attn_implementation=None if ours else config.attention,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"model.path={config.path}, model.attention={config.attention}: the learner cannot "
            f"load it: {one_line(error)}"
        ) from error
    if (
        ours
        and model.config._attn_implementation == "sdpa"
        and model._can_set_attn_implementation()
    ):
        model.set_attn_implementation(PACKED_SDPA)  # `learner.probes.capability` tests it
    if config.lora.rank:
        add_adapters(model, config.lora)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor on every rank. A collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(model: torch.nn.Module) -> None:
    """Free parameters that a forward pass gathered, so that a rank holds only its shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def barrier() -> None:
    """Wait until every rank has called this."""
    dist.barrier()


def all_sum(values: list[float], device: torch.device) -> list[float]:
    """The sums over all ranks, in float64."""
    return _reduce(values, device, dist.ReduceOp.SUM)


def all_max(value: float, device: torch.device) -> float:
    """The largest value of any rank."""
    return _reduce([value], device, dist.ReduceOp.MAX)[0]


def _reduce(
    values: list[float], device: torch.device, operation: dist.ReduceOp.RedOpType
) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=operation)
    return tensor.tolist()
