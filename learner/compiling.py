"""The blocks of a model as compiled code (`learner.compile`), and the proof that it computes the
same.

Each block is compiled by itself, for packs of any length. Attention and the head stay as they are:
attention takes the lengths of a pack's sequences, and a compiler would make new code for each new
tuple of them, so a block runs as two parts, before it and after it. Never decides anything by a
model's name: it runs packs through the model before and after. Driven by `learner.train`, and
imported only by runs that compile, since torch's compiler takes seconds to import. Never run on a
GPU.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface

from configs.errors import one_line
from learner.packs.attention import PACKED_SDPA, packed_sdpa
from learner.packs.batch import Pack, concatenate, plain_pack, tree
from learner.packs.boundaries import OURS, Boundaries
from learner.probes.capability import Packing
from learner.probes.differences import (
    Difference,
    device_of,
    gradient_difference,
    largest_of_ranks,
    logprobs_of,
    ordinary_ids,
    run,
    settle,
)

BACKEND = "inductor"
# Of the packs that are tried: other numbers of sequences, and other lengths, in each. The last one
# comes after the code was made, and must not need any more.
PACKS = ((23, 17, 29), (31,), (11, 37))
SHARED = 8  # tokens that the sequences of a pack have in common, if prompts are shared

_told: dict[str, Any] = {}  # the layout of the pack that runs through a compiled block


@dataclass(frozen=True, slots=True)
class Compiled:
    """What was compiled, its cost, and how far its results are from those before."""

    num_blocks: int
    seconds: float
    difference: Difference

    def __str__(self) -> str:
        return (
            f"compiled {self.num_blocks} blocks in {self.seconds:.0f} s ({self.difference}); "
            "attention and the head stay as they are"
        )


def compile_blocks(
    boundaries: Boundaries, packing: Packing, dtype: torch.dtype, shares_prompts: bool
) -> Compiled:
    """Compile every block of the model. A collective if there are several ranks.

    Raises `ValueError`, in one line, if this model's layout does not allow it, if the compiler
    fails, if the results are others, or if new packs would need new code.
    """
    if reason := _excluded(boundaries, packing):
        raise ValueError(f"learner.compile=true: {packing.model_type}: {reason}; leave it false")
    blocks = [
        module
        for module in boundaries.model.modules()
        if isinstance(module, FSDPModule) and module is not boundaries.model
    ]
    packs = _packs(boundaries, shares_prompts)
    expected = run(boundaries, packs)
    started = time.monotonic()
    AttentionInterface.register(PACKED_SDPA, _attention)
    num_before = counters["stats"]["unique_graphs"]
    for block in blocks:
        _compile(block)
    try:
        difference, num_late = _measure(boundaries, packs, expected)
    except Exception as error:  # compilers and a model's own code may raise anything
        raise ValueError(
            f"learner.compile=true: torch.compile fails for {packing.model_type} models here: "
            f"{one_line(error, with_type=True)[:400]} (on a CPU it needs a C++ compiler); leave it "
            "false"
        ) from error
    finally:
        settle(boundaries.model)
    if counters["stats"]["unique_graphs"] == num_before:
        raise ValueError(
            "learner.compile=true: torch.compile left the blocks as they are, as it does if "
            "TORCHDYNAMO_DISABLE is set or if a debugger or coverage traces this process"
        )
    if not difference.within_bounds(dtype):
        raise ValueError(
            f"learner.compile=true: {packing.model_type}: compiled blocks give other results "
            f"({difference}); leave it false"
        )
    if num_late:
        raise ValueError(
            f"learner.compile=true: {packing.model_type}: new packs would be compiled again "
            f"({num_late:.0f} graphs for one of them); leave it false"
        )
    return Compiled(len(blocks), time.monotonic() - started, difference)


def _excluded(boundaries: Boundaries, packing: Packing) -> str:
    attention = boundaries.model.config._attn_implementation
    if packing.split_kinds:
        return f"its {', '.join(packing.split_kinds)} layers take one sequence at a time"
    if packing.one_per_pack:
        return "every response has a micro-batch to itself"
    if attention != PACKED_SDPA:
        return (
            f"needs the attention of model.attention=sdpa in every layer, and this model has "
            f"{attention} with masks, or model.attention says so"
        )
    return ""


def _compile(block: torch.nn.Module) -> None:
    """Inside FSDP's hooks, and inside the recomputation of activations."""
    forward: Any = block.forward
    if isinstance(forward, functools.partial):  # `learner.fsdp` recomputes its activations
        (whole,) = forward.args
        block.forward = functools.partial(forward.func, _Untold(whole), **forward.keywords)
    else:
        block.forward = _Untold(forward)


class _Untold:
    """A compiled forward pass, which is not told the layout of its pack: `_attention` is."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._compiled = torch.compile(forward, dynamic=True, backend=BACKEND)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _told.update({name: kwargs.pop(name) for name in OURS if name in kwargs})
        try:
            return self._compiled(*args, **kwargs)
        finally:
            _told.clear()


@torch.compiler.disable
def _attention(*args: Any, **options: Any) -> Any:
    return packed_sdpa(*args, **(_told | options))


def _measure(
    boundaries: Boundaries, packs: list[Pack], expected: tuple[torch.Tensor, dict[str, Any]]
) -> tuple[Difference, float]:
    """How far the compiled results are from `expected`, and the graphs made for the last pack."""
    expected_logprobs, expected_gradients = expected
    for pack in packs[:-1]:
        run(boundaries, [pack])
        with torch.no_grad():  # as for the probe of each published version
            logprobs_of(boundaries, pack)
        settle(boundaries.model)
    before = counters["stats"]["unique_graphs"]
    logprobs, gradients = run(boundaries, packs)
    late = counters["stats"]["unique_graphs"] - before
    logprob = (logprobs - expected_logprobs).abs().max().item()
    gradient = gradient_difference(gradients, expected_gradients)
    logprob, gradient, num_late = largest_of_ranks([logprob, gradient, float(late)])
    return Difference(logprob, gradient, 0.0), num_late


def _packs(boundaries: Boundaries, shares_prompts: bool) -> list[Pack]:
    """Packs of random tokens, with a trunk each if prompts are shared."""
    device = device_of(boundaries.model)
    generator = torch.Generator().manual_seed(0)
    ids = ordinary_ids(boundaries.model)

    def draw(num_tokens: int) -> torch.Tensor:
        return ids[torch.randint(len(ids), (num_tokens,), generator=generator)]

    packs: list[Pack] = []
    for lengths in PACKS:
        prompt = draw(SHARED + 1)
        sequences = [
            plain_pack(
                torch.cat((prompt, draw(length))),
                torch.randn(length, generator=generator),
                num_given=len(prompt),
            )
            for length in lengths
        ]
        packs.append(tree(sequences, SHARED) if shares_prompts else concatenate(sequences))
    return [pack.to(device) for pack in packs]
