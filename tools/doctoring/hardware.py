"""The GPUs and the processor of this machine, and whether the configuration can use them.

Asks torch and `nvidia-smi`. Never run on a GPU by us: tests give it descriptions of some.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from actors.inference.device import engine_device
from actors.inference.vllm_options import check_options
from configs.memory.shape import GIB
from configs.schema import Config
from learner.fsdp import CPUINFO, slow_dtype
from tools.checking.findings import Finding
from tools.doctoring.sizing import Place

NATIVE_BF16 = (8, 0)  # compute capability of the first GPUs with bfloat16 and flash attention
QUERY = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Gpu:
    name: str
    num_bytes: int
    capability: tuple[int, int]


def gpus_of_machine() -> list[Gpu]:
    """As `nvidia-smi` lists them, [] if there is none."""
    try:
        asked = subprocess.run(QUERY, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return parse_gpus(asked.stdout) if asked.returncode == 0 else []


def parse_gpus(listing: str) -> list[Gpu]:
    """The GPUs of a listing by `QUERY`, one per line."""
    gpus = []
    for line in listing.splitlines():
        name, mib, capability = (column.strip() for column in line.rsplit(",", 2))
        major, _, minor = capability.partition(".")
        gpus.append(Gpu(name, int(mib) * 2**20, (int(major), int(minor))))
    return gpus


def learner_on_gpu(config: Config, gpus: Sequence[Gpu]) -> bool:
    return config.learner.device == "cuda" or (config.learner.device == "auto" and bool(gpus))


def place_of(config: Config, gpus: Sequence[Gpu]) -> Place:
    """The memory of this machine, with its smallest GPU for all, if the run uses them."""
    if not learner_on_gpu(config, gpus) or engine_device(config) != "cuda":
        gpus = []
    smallest = min((gpu.num_bytes for gpu in gpus), default=0)
    return Place(len(gpus), smallest, psutil.virtual_memory().available)


def check_hardware(
    config: Config,
    gpus: Sequence[Gpu],
    torch_sees: int | None = None,
    cpuinfo: Path = CPUINFO,
    has_flash: bool | None = None,
) -> Iterator[Finding]:
    """GPUs, bfloat16 and attention. The last three arguments default to those of this machine."""
    torch_sees = torch.cuda.device_count() if torch_sees is None else torch_sees
    has_flash = find_spec("flash_attn") is not None if has_flash is None else has_flash
    yield from _gpus(config, gpus, torch_sees)
    yield _bfloat16(config, gpus, cpuinfo)
    yield _attention(config, gpus, has_flash)


def _gpus(config: Config, gpus: Sequence[Gpu], torch_sees: int) -> Iterator[Finding]:
    wanted = [
        f"{name}=cuda"
        for name, device in (
            ("actors.device", engine_device(config)),
            ("learner.device", config.learner.device),
        )
        if device == "cuda"
    ]
    if not gpus:
        if wanted:
            result = f"none, and the run asks for {' and '.join(wanted)}"
            yield Finding("error", "gpu", f"{result}; use cpu, or a machine with a GPU")
        else:
            yield Finding("ok", "gpu", "none; engines and learner run on the processor")
        return
    for gpu in gpus:
        yield Finding("ok", "gpu", f"{gpu.name}, {gpu.num_bytes / GIB:.1f} GiB")
    if engine_device(config) == "cpu":
        result = "the installed vLLM runs on the processor only"
        yield Finding("warning", "gpu", f"{result}; install the extra gpu to use these GPUs")
    if torch_sees < len(gpus):
        result = f"torch {torch.__version__} sees {torch_sees} of them"
        advice = "install a torch built for CUDA, and check CUDA_VISIBLE_DEVICES and the driver"
        yield Finding("error" if wanted else "warning", "gpu", f"{result}; {advice}")


def _bfloat16(config: Config, gpus: Sequence[Gpu], cpuinfo: Path) -> Finding:
    if learner_on_gpu(config, gpus):
        old = [gpu.name for gpu in gpus if gpu.capability < NATIVE_BF16]
        if config.model.dtype == "bfloat16" and old:
            result = f"{old[0]} computes it in software; use model.dtype=float16 or float32"
            return Finding("warning", "bfloat16", result)
        if config.model.dtype == "float32" and not old:
            result = "model.dtype=float32, though these GPUs compute bfloat16 several times faster"
            return Finding("warning", "bfloat16", f"{result}; set model.dtype=bfloat16")
    elif slow := slow_dtype(config, torch.device("cpu"), cpuinfo):
        return Finding("warning", "bfloat16", slow)
    return Finding("ok", "bfloat16", f"model.dtype={config.model.dtype}, which suits this machine")


def _attention(config: Config, gpus: Sequence[Gpu], has_flash: bool) -> Finding:
    kind = config.model.attention
    if kind == "flash_attention_2":
        if not has_flash:
            result = f"model.attention={kind}: the package flash_attn is missing"
            return Finding("error", "attention", f"{result}; install the extra flash-attn, or sdpa")
        old = [gpu.name for gpu in gpus if gpu.capability < NATIVE_BF16]
        if old or not learner_on_gpu(config, gpus):
            result = f"model.attention={kind} has no kernels for {old[0] if old else 'a processor'}"
            return Finding("error", "attention", f"{result}; use model.attention=sdpa")
    if kind == "eager":
        result = "model.attention=eager holds a matrix of tokens x tokens per head; use sdpa"
        return Finding("warning", "attention", result)
    return Finding("ok", "attention", f"model.attention={kind} in the learner")


def check_vllm(config: Config) -> Finding:
    """The options that are passed on to vLLM."""
    try:
        options = check_options(config)
    except ValueError as error:
        return Finding("error", "vllm", str(error))
    return Finding("ok", "vllm", f"{len(options)} options of its own (actors.vllm)")
