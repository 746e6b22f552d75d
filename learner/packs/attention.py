"""Causal attention over packed sequences: one at a time, a group at a time, or all in one kernel.

The cost grows with each sequence's length, not with the pack's. Owns one attention function,
registered with transformers as `PACKED_SDPA`, which `model.attention=sdpa` tries first. It computes
plain causal attention only. A layer that asks for a window, a bias or sinks is refused, and
`learner.probes.capability` then falls back to transformers' own sdpa. That one builds a mask of
pack x pack: on one core with the embedded default model, a whole step takes 1.4 times as long at
512 tokens per pack, and several times as long at 4,096. Driven by the model's layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from learner.packs.branches import attention_for, has_varlen

PACKED_SDPA = "packed_sdpa"
# Options that transformers' models pass to their attention, and that would be ignored here.
REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias", "indices")


def packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lengths: tuple[int, ...] = (),
    parents: tuple[int, ...] = (),
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Plain causal attention within each sequence.

    `query` is [1, heads, T, dim], `key` and `value` are [1, kv heads, T, dim], and `lengths` sum to
    T. Without `lengths`, all tokens are one sequence. A sequence also sees the whole sequence that
    `parents` gives it, unless that is -1. Returns [1, T, heads, dim]. Raises
    `NotImplementedError` if the layer asks for any other attention.
    """
    asked = [name for name in REFUSED if options.get(name) is not None]
    if asked or attention_mask is not None or options.get("is_causal") is False:
        wants = ", ".join(asked) or "a mask of its own"
        raise NotImplementedError(f"{type(module).__name__} attends with {wants}")
    lengths = lengths or (query.shape[2],)
    alone = not any(parent >= 0 for parent in parents)
    # Kernels are launched once per layer then, and not once per sequence.
    in_one = len(lengths) > 1 and has_varlen(query) and query.shape[-1] == value.shape[-1]
    if in_one or not alone:
        parents = parents or (-1,) * len(lengths)
        output = attention_for(query)(query, key, value, lengths, parents, scaling)
        return output.transpose(1, 2).contiguous(), None
    parts = zip(
        query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
    )
    outputs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in parts
    ]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, local_size: int | None = None, **__: Any) -> None:
    if local_size is not None:
        raise NotImplementedError(f"its layers attend to a window of {local_size} tokens")


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, _no_mask)
