"""The keys with which a model fits on given GPUs, each with its reason.

Tries layouts from the simplest to the tightest, and takes the first that `configs.memory` says fits
with room to spare. Never starts anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

from configs.memory import engine, learner
from configs.memory.shape import Memory, ModelShape, gib
from configs.schema import Config
from tools.doctoring.sizing import COMFORTABLE_ROLLOUTS, Place

SPARE_FRAC = 0.05  # of a GPU, left to estimates that are too low
ALONE_FRAC = 0.9  # of a GPU, for an engine with a GPU of its own
PACKS = (16384, 8192, 4096, 2048, 1024)  # batch.max_tokens, from the fastest to the smallest
SLOTS = (128, 64, 32, 16)
SHARED = "shared"


@dataclass(frozen=True)
class Choice:
    """A key's value, and why."""

    key: str
    value: str
    reason: str


@dataclass(frozen=True)
class Suggestion:
    config: Config
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        """A file for `--config`, with the reasons as comments."""
        lines, section = list[str](), ""
        for choice in self.choices:
            head, _, name = choice.key.partition(".")
            if head != section:
                lines.append(f"{head}:")
                section = head
            lines.append(f"  {f'{name}: {choice.value}':<32}  # {choice.reason}")
        return "\n".join(lines)


def suggest(given: Config, shape: ModelShape, place: Place) -> Suggestion | None:
    """The first layout that fits, or None if none does. Other keys stay as `given`."""
    for config, why in _candidates(given, place):
        rank = learner.on_device(shape, config, cuda=True)
        room = place.gpu_bytes * (1 - SPARE_FRAC)
        if why == SHARED:
            config.actors.gpu_memory_frac = _rest(room - rank.total, place)
        cache = engine.cache(shape, config, place.gpu_bytes)
        if rank.total > room or cache.full_rollouts < COMFORTABLE_ROLLOUTS:
            continue
        config.actors.slots = _slots(cache.full_rollouts)
        return Suggestion(config, tuple(_choices(config, shape, place, rank, why == SHARED)))
    return None


def _candidates(given: Config, place: Place) -> Iterator[tuple[Config, str]]:
    """GPUs of their own first, with few for the learner, since decoding takes most of the time."""
    num = place.num_gpus
    layouts = [(ranks, num - ranks, "") for ranks in range(1, num // 2 + 1)]
    layouts.append((num, num, SHARED))
    layouts += [(ranks, num - ranks, "") for ranks in range(num // 2 + 1, num)]
    sizes = [size for size in (1, 2, 4, 8) if size <= num]
    for ranks, engine_gpus, why in layouts:
        for checkpointing in (False, True):
            for max_tokens in (n for n in PACKS if n >= given.model.max_context):
                for size in sizes:
                    if engine_gpus % size:
                        continue
                    config = deepcopy(given)
                    config.model.dtype = "bfloat16"
                    config.actors.device = config.learner.device = "cuda"
                    config.actors.num_engines = engine_gpus // size
                    config.actors.tensor_parallel = size
                    config.actors.gpu_memory_frac = ALONE_FRAC
                    config.learner.num_ranks = ranks
                    config.learner.shard_ranks = 0
                    config.learner.activation_checkpointing = checkpointing
                    config.batch.max_tokens = max_tokens
                    yield config, why


def _rest(num_bytes: float, place: Place) -> float:
    """The share of a GPU that a learner leaves, rounded down to percents. 0.01 at least."""
    return max(0.01, math.floor(num_bytes / place.gpu_bytes * 100) / 100)


def _slots(full_rollouts: float) -> int:
    """Most responses are far shorter than the longest: about a quarter of it."""
    return next((slots for slots in SLOTS if slots <= 4 * full_rollouts), SLOTS[-1])


def _choices(
    config: Config, shape: ModelShape, place: Place, rank: Memory, shared: bool
) -> Iterator[Choice]:
    given = "as given"
    yield Choice("model.path", config.model.path, given)
    yield Choice("model.dtype", "bfloat16", "half the memory of float32, and faster on GPUs")
    yield Choice("model.max_context", str(config.model.max_context), given)
    yield Choice("data.train", f'"{config.data.train}"', given)
    yield Choice("sampling.max_tokens", str(config.sampling.max_tokens), given)
    yield from _learner(config, rank)
    yield from _engines(config, shape, place, shared)


def _learner(config: Config, rank: Memory) -> Iterator[Choice]:
    ranks = config.learner.num_ranks
    held = sum(part.num_bytes for part in rank.parts if part.name in learner.HELD)
    loss = next(part for part in rank.parts if part.name == "loss")
    yield Choice(
        "batch.max_tokens",
        str(config.batch.max_tokens),
        f"the largest pack that fits; its logits and their gradient are {gib(loss.num_bytes)}",
    )
    what = f"weights, gradients and optimizer are {gib(ranks * held)}"
    what += f", so {gib(held)} per GPU" if ranks > 1 else ", which fit on one GPU"
    if config.optimizer.moments != "float32":
        yield Choice("optimizer.moments", config.optimizer.moments, "as given")
    if config.learner.offload:
        yield Choice("learner.offload", "true", "as given; the machine's memory holds the state")
        what = "layers and activations alone are on a GPU"
    yield Choice("learner.num_ranks", str(ranks), f"{what}; a rank needs {gib(rank.total)}")
    yield Choice("learner.device", "cuda", "the learner trains on GPUs")
    checkpointing = config.learner.activation_checkpointing
    yield Choice(
        "learner.activation_checkpointing",
        str(checkpointing).lower(),
        "the activations of every layer would not fit" if checkpointing else "all of them fit",
    )


def _engines(config: Config, shape: ModelShape, place: Place, shared: bool) -> Iterator[Choice]:
    actors, cache = config.actors, engine.cache(shape, config, place.gpu_bytes)
    size = actors.tensor_parallel
    where = "on the learner's GPUs" if shared else "on GPUs of their own"
    yield Choice("actors.device", "cuda", "the engines decode on GPUs")
    yield Choice("actors.num_engines", str(actors.num_engines), where)
    yield Choice(
        "actors.tensor_parallel",
        str(size),
        "the model fits on one GPU" if size == 1 else f"an engine needs {size} GPUs",
    )
    what = f"the learner leaves that much of {gib(place.gpu_bytes)}" if shared else "its own GPU"
    yield Choice(
        "actors.gpu_memory_frac",
        f"{actors.gpu_memory_frac:g}",
        f"{what}; the cache gets {gib(cache.num_bytes)}, which is {cache.tokens} tokens",
    )
    yield Choice(
        "actors.slots",
        str(actors.slots),
        f"the cache holds {cache.full_rollouts:.0f} rollouts of full length; most are shorter",
    )
