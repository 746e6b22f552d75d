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
    """Two calls for each sequence, at the most. Memory grows with T.

    Raises `NotImplementedError` for keys and values of different sizes.
    """
    if query.shape[-1] != value.shape[-1]:
        raise NotImplementedError("its keys and values are of different sizes")
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    trees = list(_trees(lengths, parents))
    sizes = [sum(tree) for tree in trees]
    columns = (tensor.split(sizes, 2) for tensor in (query, key, value))
    return torch.cat(
        [_tree(q, k, v, tree, scaling) for tree, q, k, v in zip(trees, *columns, strict=True)], 2
    )


def _trees(lengths: tuple[int, ...], parents: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The lengths of each trunk and its branches, which follow it."""
    roots = [number for number, parent in enumerate(parents) if parent < 0]
    for root, end in zip(roots, [*roots[1:], len(parents)], strict=True):
        yield lengths[root:end]


def _tree(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
) -> torch.Tensor:
    trunk = lengths[0]
    q, k, v = (tensor[:, :, :trunk] for tensor in (query, key, value))
    of_trunk = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    if len(lengths) == 1:
        return of_trunk
    of_branches = _Branches.apply(query[:, :, trunk:], key, value, lengths, scaling)
    return torch.cat((of_trunk, of_branches), 2)


class _Branches(torch.autograd.Function):
    """Attention of the branches, with that to the trunk in one call for all of them.

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
        scaling: float | None,
    ) -> torch.Tensor:
        trunk, *branches = lengths
        (trunk_key, *keys), (trunk_value, *values) = key.split(lengths, 2), value.split(lengths, 2)
        to_trunk, sums = _flash(query, trunk_key, trunk_value, 0.0, False, scale=scaling)
        own = [
            _flash(q, k, v, 0.0, True, scale=scaling)
            for q, k, v in zip(query.split(branches, 2), keys, values, strict=True)
        ]
        own_sums = torch.cat([part[1] for part in own], 2)
        joint = torch.logaddexp(sums, own_sums)
        output = to_trunk * (sums - joint).exp()[..., None]
        output += torch.cat([part[0] for part in own], 2) * (own_sums - joint).exp()[..., None]
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, joint)
        ctx.lengths, ctx.scaling = lengths, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, output, joint = ctx.saved_tensors
        trunk, *branches = ctx.lengths
        key_parts, value_parts = key.split(ctx.lengths, 2), value.split(ctx.lengths, 2)
        grad = grads[0].contiguous()

        def part(*tensors: torch.Tensor, causal: bool) -> Any:
            return _flash_backward(*tensors, 0.0, causal, scale=ctx.scaling)

        grad_query, *trunk_grads = part(
            grad, query, key_parts[0], value_parts[0], output, joint, causal=False
        )
        rows = [tensor.split(branches, 2) for tensor in (grad, query, output, joint)]
        own = [
            part(g, q, k, v, o, j, causal=True)
            for g, q, k, v, o, j in zip(
                rows[0], rows[1], key_parts[1:], value_parts[1:], rows[2], rows[3], strict=True
            )
        ]
        grad_query = grad_query + torch.cat([each[0] for each in own], 2)
        grad_key = torch.cat([trunk_grads[0], *(each[1] for each in own)], 2)
        grad_value = torch.cat([trunk_grads[1], *(each[2] for each in own)], 2)
        return grad_query, grad_key, grad_value, None, None
