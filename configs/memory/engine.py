"""The memory of one engine on each of its GPUs, or in the machine's memory, and its cache.

vLLM takes `actors.gpu_memory_frac` of a GPU and fills it: weights and working memory first, and the
rest is key-value cache. Not measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.adapters import swaps_adapters
from configs.memory.learner import adapter_parameters, snapshots
from configs.memory.shape import DTYPE_BYTES, GIB, Memory, ModelShape, Part, billions
from configs.schema import Config

PREFILL_TOKENS = (
    8192  # that vLLM prefills at once on a GPU; on a CPU, we let it take a whole prompt
)
CUDA_BYTES = 2 * GIB  # context, CUDA graphs and the allocator's rounding
LIBRARY_BYTES = int(1.2 * GIB)  # vLLM, torch and transformers, resident after a start on a CPU


def without_cache(shape: ModelShape, config: Config, cuda: bool) -> Memory:
    """What an engine holds besides its cache, per GPU if `cuda`."""
    size, split = DTYPE_BYTES[config.model.dtype], config.actors.tensor_parallel
    of = f"{billions(shape.parameters)} parameters" + (f" / {split} GPUs" if split > 1 else "")
    tokens = PREFILL_TOKENS if cuda else config.model.max_context
    working = tokens * 2 * (shape.hidden + shape.intermediate // split) * size
    logits = 2 * 4 * (config.actors.slots + 1) * shape.vocabulary
    parts = [
        Part("weights", size * shape.parameters // split, f"{size} B x {of}"),
        Part("activations", working, f"{tokens} prefilled tokens x one layer"),
        Part("logits", logits, f"{config.actors.slots + 1} requests x {shape.vocabulary}, twice"),
    ]
    if swaps_adapters(config):
        number = adapter_parameters(shape, config)
        parts.append(Part("adapters", size * number // split, f"{size} B x {billions(number)}"))
    if cuda:
        parts.append(Part("CUDA", CUDA_BYTES, "context and graphs, a guess"))
    else:
        parts.append(Part("libraries", LIBRARY_BYTES, "measured"))
        held = config.weights.deltas
        what = "held, fetched, and handed to vLLM" if held else "fetched, and handed to vLLM"
        parts.append(snapshots(shape, config, 2 + held, what))
    return Memory(tuple(parts))


@dataclass(frozen=True)
class Cache:
    """A key-value cache: its size per engine, and the rollouts of full length that it holds."""

    num_bytes: int
    tokens: int
    full_rollouts: float


def cache(shape: ModelShape, config: Config, gpu_bytes: float | None) -> Cache:
    """The cache of one engine on GPUs of `gpu_bytes` each, or on a CPU if that is None.

    Negative if the weights alone exceed the engine's share.
    """
    if gpu_bytes is None:
        num_bytes = int(config.actors.kv_cache_gib * GIB)
    else:
        share = config.actors.gpu_memory_frac * gpu_bytes
        own = without_cache(shape, config, cuda=True).total
        num_bytes = int(share - own) * config.actors.tensor_parallel
    tokens = num_bytes // shape.kv_bytes(config.model.dtype)
    return Cache(num_bytes, tokens, tokens / config.model.max_context)
