"""Attention of the responses of a group, whose prompt is in the pack once.

A prompt is a trunk and each response a branch: its queries see all keys of the trunk, and those of
the branch up to their own position. Owns that attention, for each device. On a CPU, memory grows
with the number of tokens: there is neither a mask nor a copy of the trunk for each branch. On a
GPU, half precision takes one varlen kernel per layer, over keys that are gathered for each branch,
and float32 takes one call per sequence. `learner.probes.sharing` measures all of it before a run.
Driven by `learner.packs.attention`.

Shapes: T tokens in a pack, K of them in a trunk, B in all its branches together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

HALVES = (torch.bfloat16, torch.float16)  # the only types that varlen kernels take
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Query, key and value, each [1, heads, T, dim], to [1, heads, T, dim]; there may be fewer heads of
# keys and values. The other arguments are `Pack.lengths`, `Pack.parents` and the scale of scores.
Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...], tuple[int, ...], float | None],
    torch.Tensor,
]


def attention_for(query: torch.Tensor) -> Attention:
    """The fastest of the functions below on the device of `query`, in its type."""
    if not query.is_cuda:
        return on_cpu
    return varlen if has_varlen(query) else by_sequence


def has_varlen(query: torch.Tensor) -> bool:
    """Whether one kernel can take all sequences of a pack: FlashAttention's, of sm80 or newer."""
    return (
        query.is_cuda
        and query.dtype in HALVES
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def by_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    scaling: float | None,
) -> torch.Tensor:
    """One call for each sequence. A CPU builds a mask for each branch."""
    queries, keys, values = (tensor.split(lengths, 2) for tensor in (query, key, value))
    outputs = []
    for number, parent in enumerate(parents):
        q, k, v = queries[number], keys[number], values[number]
        mask: Any = None
        if parent >= 0:
            k, v = torch.cat((keys[parent], k), 2), torch.cat((values[parent], v), 2)
            mask = causal_lower_right(q.shape[2], k.shape[2])
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, 2)


# On a GPU in half precision --------------------------------------------------------------------


class Gathered(NamedTuple):
    """The keys of every sequence in a row, of its trunk and its own, and where each begins."""

    rows: torch.Tensor | None  # of T; None: all of them, as they are
    starts_of_queries: torch.Tensor  # int32
    starts_of_keys: torch.Tensor  # int32
    longest_query: int
    longest_key: int


@lru_cache(maxsize=4)  # all layers of a pack share it, also if they run again for the gradient
def gathered(lengths: tuple[int, ...], parents: tuple[int, ...], device: torch.device) -> Gathered:
    """Built on the CPU, and copied to `device` once per pack."""
    rows = torch.arange(sum(lengths)).split(lengths)
    keys = [
        torch.cat((rows[parent], own)) if parent >= 0 else own
        for parent, own in zip(parents, rows, strict=True)
    ]
    num_keys = [len(row) for row in keys]
    return Gathered(
        rows=torch.cat(keys).to(device) if max(parents) >= 0 else None,
        starts_of_queries=_starts(lengths).to(device),
        starts_of_keys=_starts(num_keys).to(device),
        longest_query=max(lengths),
        longest_key=max(num_keys),
    )


def _starts(lengths: tuple[int, ...] | list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    scaling: float | None,
) -> torch.Tensor:
    """One call for the whole pack. The last query of a sequence sees its last key."""
    keys = gathered(lengths, parents, query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = varlen_attn(
        q,
        k if keys.rows is None else k[keys.rows],
        v if keys.rows is None else v[keys.rows],
        keys.starts_of_queries,
        keys.starts_of_keys,
        keys.longest_query,
        keys.longest_key,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=True,
    )
    assert isinstance(output, torch.Tensor)
    return output.transpose(0, 1)[None]


# On a CPU --------------------------------------------------------------------------------------


def on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    scaling: float | None,
) -> torch.Tensor:
    """One call for each sequence, and one for the branches of each trunk. Memory grows with T.

    Raises `NotImplementedError` for keys and values of different sizes.
    """
    if query.shape[-1] != value.shape[-1]:
        raise NotImplementedError("its keys and values are of different sizes")
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    output: torch.Tensor = _Attention.apply(query, key, value, lengths, parents, scaling)
    return output


class _Trunk(NamedTuple):
    """The rows of a trunk that has branches, and those of all its branches, which follow it."""

    own: slice
    branches: slice


def _trunks(lengths: tuple[int, ...], parents: tuple[int, ...]) -> Iterator[_Trunk]:
    starts = [0, *accumulate(lengths)]
    roots = [number for number, parent in enumerate(parents) if parent < 0]
    for root, end in zip(roots, [*roots[1:], len(parents)], strict=True):
        if end > root + 1:
            first = starts[root + 1]
            yield _Trunk(slice(starts[root], first), slice(first, starts[end]))


class _Attention(torch.autograd.Function):
    """Each sequence's attention to itself, and that of all branches of a trunk to it in one call.

    The outputs of the two parts are joined by the sums of their exponentials. The gradient of
    either part is that of the same kernel, given the joint output and the joint sum.
    Source: FlashAttention-2 (arXiv 2307.08691), and Hydragen (arXiv 2402.05099) for the split.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: tuple[int, ...],
        parents: tuple[int, ...],
        scaling: float | None,
    ) -> torch.Tensor:
        parts = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True)
        own = [_flash(q, k, v, 0.0, True, scale=scaling) for q, k, v in parts]
        output, sums = torch.cat([one[0] for one in own], 2), torch.cat([one[1] for one in own], 2)
        trunks = list(_trunks(lengths, parents))
        for trunk, branches in trunks:
            to_trunk, trunk_sums = _flash(
                query[:, :, branches], key[:, :, trunk], value[:, :, trunk], 0.0, scale=scaling
            )
            joint = torch.logaddexp(trunk_sums, sums[:, :, branches])
            of_own = output[:, :, branches] * (sums[:, :, branches] - joint).exp()[..., None]
            output[:, :, branches] = of_own + to_trunk * (trunk_sums - joint).exp()[..., None]
            sums[:, :, branches] = joint
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.lengths, ctx.trunks, ctx.scaling = lengths, trunks, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, output, sums = ctx.saved_tensors
        rows = (grads[0].contiguous(), query, key, value, output, sums)
        own = [
            _flash_backward(*part, 0.0, True, scale=ctx.scaling)
            for part in zip(*(tensor.split(ctx.lengths, 2) for tensor in rows), strict=True)
        ]
        grad_query, grad_key, grad_value = (torch.cat([one[i] for one in own], 2) for i in range(3))
        grad, query, key, value, output, sums = rows
        for trunk, branches in ctx.trunks:
            to_query, to_key, to_value = _flash_backward(
                grad[:, :, branches],
                query[:, :, branches],
                key[:, :, trunk],
                value[:, :, trunk],
                output[:, :, branches],
                sums[:, :, branches],
                0.0,
                False,
                scale=ctx.scaling,
            )
            grad_query[:, :, branches] += to_query
            grad_key[:, :, trunk] += to_key
            grad_value[:, :, trunk] += to_value
        return grad_query, grad_key, grad_value, None, None, None
