"""Finds the layout of packs under which a model computes each sequence as if it were alone.

Owns the probe: three short sequences of random tokens, run through the model that is about to be
trained, on its device and in its type. It compares log-probabilities and gradients, and decides by
these measurements, never by a list of models. It leaves the model without gradients and unchanged,
except for its attention and the layers that `Boundaries` splits. Driven by `learner.train` before
the first step, and by a check before a run. A collective if there are several ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from configs.errors import one_line
from learner.packs.attention import PACKED_SDPA
from learner.packs.batch import Pack, concatenate, plain_pack
from learner.packs.boundaries import Boundaries
from learner.probes.differences import (
    BOUNDS,
    LEAK_BOUNDS,
    Difference,
    device_of,
    gradient_difference,
    largest_of_ranks,
    logprobs_of,
    ordinary_ids,
    run,
    settle,
)

LENGTHS = (23, 17, 29)  # unequal, odd, and longer than any convolution's kernel


@dataclass(frozen=True, slots=True)
class Packing:
    """The layout of a run's packs, and the measurements that led to it."""

    model_type: str
    unaided: Difference  # packed, with sequences kept apart by positions alone
    difference: Difference  # of the layout that is used
    split_kinds: tuple[str, ...] = ()  # classes of layers that take one sequence at a time
    one_per_pack: bool = False

    def capacity(self, max_tokens: int) -> int:
        """Largest pack, in tokens. A longer sequence always has a pack to itself."""
        return 1 if self.one_per_pack else max_tokens

    def __str__(self) -> str:
        """The verdict and its cost, on one line."""
        if not (self.split_kinds or self.one_per_pack):
            return f"{self.model_type}: packed sequences equal single ones ({self.difference})"
        remedy = (
            f"{', '.join(self.split_kinds)} layers take one sequence at a time, which costs a call "
            "per response in each of them"
            if self.split_kinds
            else "every response has a micro-batch to itself, which costs a forward and a backward "
            "pass per response"
        )
        return (
            f"{self.model_type}: packed sequences differ from single ones ({self.unaided}), so "
            f"{remedy} (then: {self.difference})"
        )


def probe_packing(boundaries: Boundaries, dtype: torch.dtype = torch.float32) -> Packing:
    """The cheapest layout of packs under which every sequence is computed as if it were alone.

    It tries packed sequences first, then packed ones except in the layers through which they leak,
    and at last one sequence per pack. Each layout is tried with our attention before transformers'
    own. `dtype` is the type of computation. Raises `ValueError`, with the model's type and the
    difference, if no layout is correct.
    """
    model, probe = boundaries.model, _Probe(boundaries)
    boundaries.fused = boundaries.fused and probe.head_difference() <= BOUNDS[dtype]
    given = str(model.config._attn_implementation)
    attentions = [PACKED_SDPA, "sdpa"] if given == PACKED_SDPA else [given]
    tried: list[Difference] = []
    for attention in attentions:
        model.set_attn_implementation(attention)
        while True:
            tried.append(probe.packed())
            if tried[-1].within_bounds(dtype):
                return _packing(boundaries, tried)
            leaks = not tried[-1].error and tried[-1].leak > LEAK_BOUNDS[dtype]
            kinds = probe.leaking_kinds() if leaks else []
            if not kinds:
                break
            boundaries.split(kinds[0])
        boundaries.undo()
    for attention in attentions:
        model.set_attn_implementation(attention)
        tried.append(probe.one_per_pack())
        if tried[-1].within_bounds(dtype):
            return _packing(boundaries, tried, one_per_pack=True)
    raise ValueError(
        f"{model.config.model_type} models cannot be trained: even one sequence per pack differs "
        f"from a plain call, {tried[-1]} (allowed: {BOUNDS[dtype]:g}), so the policy gradient "
        "would be wrong"
    )


def _packing(
    boundaries: Boundaries, tried: list[Difference], one_per_pack: bool = False
) -> Packing:
    unaided = next((difference for difference in tried if not difference.error), tried[0])
    return Packing(
        model_type=boundaries.model.config.model_type,
        unaided=unaided,
        difference=tried[-1],
        split_kinds=boundaries.kinds,
        one_per_pack=one_per_pack,
    )


class _Probe:
    """The sequences, and the model's plain results for each of them alone."""

    def __init__(self, boundaries: Boundaries) -> None:
        self._boundaries = boundaries
        model = boundaries.model
        device = device_of(model)
        generator = torch.Generator().manual_seed(0)
        ids = ordinary_ids(model)
        self._sequences = [_sequence(ids, n, generator).to(device) for n in LENGTHS]
        others = [_sequence(ids, n, generator).to(device) for n in LENGTHS]
        middle = self._sequences[1]
        self._pack = concatenate(self._sequences)
        self._neighbours_changed = concatenate([others[0], middle, others[2]])
        with _reference_attention(model):
            try:
                self._logprobs, self._gradients = run(boundaries, self._sequences, plainly=True)
            except Exception as error:  # a model's own code may raise anything
                raise ValueError(
                    f"{model.config.model_type} models cannot be trained: a plain forward and "
                    f"backward pass fails: {one_line(error, with_type=True)}"
                ) from error

    @torch.no_grad()
    def head_difference(self) -> float:
        """The largest difference of a log-probability, in nats, if the head runs in chunks."""
        with _reference_attention(self._boundaries.model):
            fused = [self._boundaries.plain_logprobs(pack, fused=True) for pack in self._sequences]
        settle(self._boundaries.model)
        difference = (torch.cat(fused) - self._logprobs).abs().max().item()
        return largest_of_ranks([difference])[0]

    def packed(self) -> Difference:
        return self._difference([self._pack])

    def one_per_pack(self) -> Difference:
        return self._difference(self._sequences)

    def _difference(self, packs: list[Pack]) -> Difference:
        try:
            logprobs, gradients = run(self._boundaries, packs)
            leak = self._leak(logprobs) if len(packs) == 1 else 0.0
        except Exception as error:  # the next layout is tried
            return Difference(error=one_line(error, with_type=True))
        finally:
            settle(self._boundaries.model)
        logprob = (logprobs - self._logprobs).abs().max().item()
        gradient = gradient_difference(gradients, self._gradients)
        logprob, gradient, leak = largest_of_ranks([logprob, gradient, leak])
        return Difference(logprob, gradient, leak)

    @torch.no_grad()
    def _leak(self, logprobs: torch.Tensor) -> float:
        start, num = LENGTHS[0] - 1, LENGTHS[1] - 1
        changed = logprobs_of(self._boundaries, self._neighbours_changed)
        return (changed - logprobs)[start : start + num].abs().max().item()

    @torch.no_grad()
    def leaking_kinds(self) -> list[str]:
        """Classes of the innermost layers through which sequences leak, in their order.

        Such a layer's output for the middle sequence changes although its input does not. Layers
        that are split already are left out.
        """
        before, now = _Watch(self._boundaries.model), _Watch(self._boundaries.model)
        for watch, pack in ((before, self._pack), (now, self._neighbours_changed)):
            with watch.watching():
                logprobs_of(self._boundaries, pack)
        settle(self._boundaries.model)
        leaking = [
            name
            for (name, given, made), (_, given_now, made_now) in zip(
                before.calls, now.calls, strict=True
            )
            if torch.equal(given, given_now) and not torch.equal(made, made_now)
        ]
        innermost = [n for n in leaking if not any(m.startswith(f"{n}.") for m in leaking)]
        modules = dict(self._boundaries.model.named_modules())
        kinds = dict.fromkeys(type(modules[name]).__name__ for name in innermost)
        return _same_on_all_ranks([kind for kind in kinds if kind not in self._boundaries.kinds])


class _Watch:
    """The middle sequence's rows before and after each layer from [1, T, ...] to [1, T, ...]."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._given: dict[str, torch.Tensor] = {}
        self.calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for name, module in self._model.named_modules():
            if not name:
                continue

            def before(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
                if (rows := _middle_rows((*args, *kwargs.values()))) is not None:
                    self._given[name] = rows

            def after(_: Any, args: Any, output: Any, name: str = name) -> None:
                made = _middle_rows(output if isinstance(output, tuple) else (output,))
                if made is not None and name in self._given:
                    self.calls.append((name, self._given[name], made))

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _middle_rows(values: tuple[Any, ...]) -> torch.Tensor | None:
    """A copy of the middle sequence's rows in the first floating-point tensor of `values`.

    None if there is none, or if it is not [1, T, ...].
    """
    lengths = [n - 1 for n in LENGTHS]
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            fits = value.ndim > 1 and value.shape[:2] == (1, sum(lengths))
            return value[0, lengths[0] : sum(lengths[:2])].clone() if fits else None
    return None


def _sequence(ids: torch.Tensor, num_tokens: int, generator: torch.Generator) -> Pack:
    """A random sequence in which every token but the first is predicted.

    Its advantages are random weights of the log-probabilities.
    """
    tokens = ids[torch.randint(len(ids), (num_tokens,), generator=generator)]
    return plain_pack(tokens, torch.randn(num_tokens - 1, generator=generator))


@contextmanager
def _reference_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use transformers' own attention, masks included, in place of ours."""
    ours = model.config._attn_implementation == PACKED_SDPA
    if ours:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if ours:
            model.set_attn_implementation(PACKED_SDPA)


def _same_on_all_ranks(names: list[str]) -> list[str]:
    held: list[Any] = [names]
    if dist.is_initialized():
        dist.broadcast_object_list(held, src=0)
    return held[0]
