"""Whether the processes of a run fit into the memory that it has, with the arithmetic.

Computes from sizes alone; `configs.memory` has the formulas. Knows a machine only as a `Place`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from configs.memory import engine, learner
from configs.memory.shape import ModelShape, gib
from configs.schema import Config
from tools.checking.findings import Finding

COMFORTABLE_ROLLOUTS = 8.0  # of full length in an engine's cache; with fewer, requests wait


@dataclass(frozen=True)
class Place:
    """Memory of a machine. `num_gpus` is 0 if everything runs on the processor."""

    num_gpus: int
    gpu_bytes: float
    ram_bytes: float


@dataclass(frozen=True)
class Layout:
    """How a run divides the GPUs of a place, one engine or rank after the other."""

    engine_gpus: int
    ranks: int
    shared: bool  # whether engines and ranks use the same GPUs


def layout_of(config: Config, place: Place) -> Layout:
    """As `tools.launch` divides them: GPUs of their own if there are enough, otherwise shared."""
    engines = config.actors.num_engines * config.actors.tensor_parallel
    ranks = config.learner.num_ranks
    return Layout(engines, ranks, engines + ranks > place.num_gpus)


def check_memory(config: Config, shape: ModelShape, place: Place) -> Iterator[Finding]:
    """Learner, engines, GPUs that both share, and the machine's memory."""
    if place.num_gpus:
        yield from _on_gpus(config, shape, place)
    else:
        yield from _on_processor(config, shape, place)


def _on_gpus(config: Config, shape: ModelShape, place: Place) -> Iterator[Finding]:
    layout = layout_of(config, place)
    most = max(layout.engine_gpus, layout.ranks)
    if most > place.num_gpus:
        yield Finding(
            "error",
            "gpus",
            f"actors.num_engines x actors.tensor_parallel = {layout.engine_gpus}, learner.num_ranks"
            f" = {layout.ranks}, and there are {place.num_gpus} GPUs; lower the larger one",
        )
        return
    rank = learner.on_device(shape, config, cuda=True)
    yield _compared("learner", f"a rank needs {rank}", rank.total, place.gpu_bytes)
    share = config.actors.gpu_memory_frac * place.gpu_bytes
    own = engine.without_cache(shape, config, cuda=True)
    yield _compared("engine", f"it needs {own}, besides its cache", own.total, share)
    if own.total < share:
        yield _cache(config, engine.cache(shape, config, place.gpu_bytes))
    if layout.shared:
        both = rank.total + share
        result = (
            f"learner and engine share a GPU: {gib(rank.total)} + {gib(share)} "
            f"(actors.gpu_memory_frac={config.actors.gpu_memory_frac:g}) = {gib(both)}"
        )
        yield _compared("shared gpu", result, both, place.gpu_bytes)
    else:
        yield Finding(
            "ok",
            "gpus",
            f"{layout.engine_gpus} for engines and {layout.ranks} for the learner, "
            f"of {place.num_gpus}",
        )
    host = learner.on_host(shape, config).total + config.buffer.max_bytes
    engines = config.actors.num_engines * engine.LIBRARY_BYTES
    result = f"ranks, buffer (buffer.max_bytes) and engines need {gib(host + engines)}"
    if place.ram_bytes:
        yield _compared("memory", result, host + engines, place.ram_bytes, certain=False)
    else:
        yield Finding("note", "memory", f"{result} of the machine's memory")


def _on_processor(config: Config, shape: ModelShape, place: Place) -> Iterator[Finding]:
    rank = learner.on_device(shape, config, cuda=False)
    own = engine.without_cache(shape, config, cuda=False)
    cache = engine.cache(shape, config, None)
    yield Finding("ok", "learner", f"a rank needs {rank}")
    yield Finding("ok", "engine", f"it needs {own}, besides its cache")
    yield _cache(config, cache)
    ranks, engines = config.learner.num_ranks, config.actors.num_engines
    needed = ranks * rank.total + engines * (own.total + cache.num_bytes)
    needed += config.buffer.max_bytes
    result = (
        f"{ranks} x {gib(rank.total)} (learner) + {engines} x {gib(own.total + cache.num_bytes)} "
        f"(engine) + {gib(config.buffer.max_bytes)} (buffer.max_bytes) = {gib(needed)}"
    )
    # Memory may be swapped, and the buffer seldom holds so much.
    yield _compared("memory", result, needed, place.ram_bytes, certain=False)


def _compared(
    subject: str, needed: str, num_bytes: float, available: float, certain: bool = True
) -> Finding:
    if num_bytes <= available:
        return Finding("ok", subject, f"{needed}; there are {gib(available)}")
    advice = {
        "learner": "learner.activation_checkpointing=true, a smaller batch.max_tokens, and more "
        "learner.num_ranks need less per GPU, and learner.offload=true the least",
        "engine": "raise actors.gpu_memory_frac or actors.tensor_parallel",
        "shared gpu": "lower actors.gpu_memory_frac, or use GPUs of their own",
        "memory": "lower buffer.max_bytes or actors.kv_cache_gib, or use fewer processes",
    }[subject]
    verdict = "error" if certain else "warning"
    return Finding(verdict, subject, f"{needed}; there are only {gib(available)}: {advice}")


def _cache(config: Config, cache: engine.Cache) -> Finding:
    slots, context = config.actors.slots, config.model.max_context
    result = (
        f"{gib(cache.num_bytes)} hold {cache.tokens} tokens: {cache.full_rollouts:.1f} rollouts of "
        f"{context} tokens (model.max_context), for actors.slots={slots}"
    )
    if cache.full_rollouts < 1:
        return Finding("error", "cache", f"{result}; vLLM refuses to start with less than one")
    if cache.full_rollouts < min(COMFORTABLE_ROLLOUTS, slots):
        return Finding("warning", "cache", f"{result}; rollouts will wait: lower actors.slots")
    return Finding("ok", "cache", result)
