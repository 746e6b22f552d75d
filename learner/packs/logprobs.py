"""Log-probabilities and entropies of tokens, from hidden states and the head's weight, in chunks.

Owns the arithmetic of the head. The logits of a chunk are computed again in the backward pass, so
memory does not grow with vocabulary x length. Owns no parameter. Driven by
`learner.packs.boundaries`.

We looked for a library first: torch's `linear_cross_entropy` reduces over tokens and has no
entropy, and the kernels of Liger and cut-cross-entropy need a GPU.

Shapes: S positions of a pack that predict a trained token, C of them in a chunk, H hidden size,
V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from configs.memory.learner import CHUNK_ELEMENTS


class Head(NamedTuple):
    """A linear head, and the bound of its logits. Without a weight, its input is the logits."""

    weight_VH: torch.Tensor | None = None
    bias_V: torch.Tensor | None = None
    softcap: float = 0.0  # logits become softcap x tanh(logits / softcap); 0: they stay as they are
    float32: bool = False  # whether logits are computed in float32 from weights of another type


LOGITS = Head()  # for an input that is the logits already


def token_logprobs(
    hidden_SH: torch.Tensor,
    targets_S: torch.Tensor,
    temperature: float,
    head: Head = LOGITS,
    chunk_rows: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target [S] and entropy of its distribution [S], both float32 in nats.

    `temperature` divides the logits, as in the engine, so the results are comparable with
    `actor_logprobs`. Gradients flow through the log-probabilities only. `chunk_rows` is the number
    of rows per chunk; 0 derives it from `CHUNK_ELEMENTS`.
    """
    vocabulary = (hidden_SH if head.weight_VH is None else head.weight_VH.T).shape[1]
    rows = chunk_rows or max(1, CHUNK_ELEMENTS // vocabulary)
    return _ChunkedLogprobs.apply(  # type: ignore[no-any-return]
        hidden_SH,
        head.weight_VH,
        head.bias_V,
        targets_S,
        (head.softcap, head.float32, temperature, rows),
    )


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: torch.Tensor,
        weight_VH: torch.Tensor | None,
        bias_V: torch.Tensor | None,
        targets_S: torch.Tensor,
        rules: tuple[float, bool, float, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        softcap, float32, temperature, chunk_rows = rules
        logprobs_S = torch.empty(len(targets_S), dtype=torch.float32, device=hidden_SH.device)
        entropy_S = torch.empty_like(logprobs_S)
        for start in range(0, len(targets_S), chunk_rows):
            rows = slice(start, start + chunk_rows)
            head = Head(weight_VH, bias_V, softcap, float32)
            scaled_CV = _capped_logits(hidden_SH[rows], head).div_(temperature)
            logprobs_CV = torch.log_softmax(scaled_CV, dim=-1)
            logprobs_S[rows] = logprobs_CV.gather(1, targets_S[rows, None])[:, 0]
            entropy_S[rows] = -torch.exp(logprobs_CV, out=scaled_CV).mul_(logprobs_CV).sum(-1)
        ctx.save_for_backward(hidden_SH, weight_VH, bias_V, targets_S)
        ctx.rules = rules
        ctx.mark_non_differentiable(entropy_S)
        return logprobs_S, entropy_S

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_SH, weight_VH, bias_V, targets_S = ctx.saved_tensors
        softcap, float32, temperature, chunk_rows = ctx.rules
        head = Head(weight_VH, bias_V, softcap, float32)
        dtype = hidden_SH.dtype if weight_VH is None else weight_VH.dtype
        grad_hidden_SH = torch.empty_like(hidden_SH)
        grad_weight_VH: torch.Tensor | None = None
        grad_bias_V: torch.Tensor | None = None
        for start in range(0, max(1, len(targets_S)), chunk_rows):
            rows = slice(start, start + chunk_rows)
            scaled_CV = _capped_logits(hidden_SH[rows], head).div_(temperature)
            grad_CV = torch.softmax(scaled_CV, dim=-1).neg_()
            grad_CV.scatter_add_(1, targets_S[rows, None], torch.ones_like(grad_CV[:, :1]))
            grad_CV.mul_(grads[0][rows, None] / temperature)
            if softcap:
                grad_CV.mul_(scaled_CV.mul_(temperature / softcap).square_().neg_().add_(1))
            del scaled_CV
            grad_CV = grad_CV.to(dtype)
            grad_hidden_SH[rows] = grad_CV if weight_VH is None else grad_CV @ weight_VH
            if ctx.needs_input_grad[1]:
                grad_weight_VH = _add_product(grad_weight_VH, grad_CV.T, hidden_SH[rows].to(dtype))
            if ctx.needs_input_grad[2]:
                grad_bias_V = grad_CV.float().sum(0) + (0 if grad_bias_V is None else grad_bias_V)
        return (
            grad_hidden_SH,
            None if grad_weight_VH is None else grad_weight_VH.to(dtype),
            None if grad_bias_V is None else grad_bias_V.to(dtype),
            None,
            None,
        )


def _capped_logits(hidden_CH: torch.Tensor, head: Head) -> torch.Tensor:
    """Logits [C, V] in float32, in memory of their own."""
    weight_VH, bias_V, softcap, float32 = head
    if weight_VH is None:
        logits_CV = hidden_CH
    elif not float32:
        logits_CV = linear(hidden_CH.to(weight_VH.dtype), weight_VH, bias_V)
    elif hidden_CH.is_cuda and hidden_CH.dtype == weight_VH.dtype != torch.float32:
        # The same products and the same sums, without a float32 copy of the weight.
        logits_CV = torch.mm(hidden_CH, weight_VH.T, out_dtype=torch.float32)
        logits_CV = logits_CV if bias_V is None else logits_CV.add_(bias_V)
    else:
        bias_V = None if bias_V is None else bias_V.float()
        logits_CV = linear(hidden_CH.float(), weight_VH.float(), bias_V)
    logits_CV = logits_CV.to(torch.float32, copy=weight_VH is None)
    return logits_CV.div_(softcap).tanh_().mul_(softcap) if softcap else logits_CV


def _add_product(
    total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """`total` + `left` @ `right` in float32, in place."""
    if total is None:
        return (left @ right).float()
    return total.addmm_(left, right) if right.dtype == total.dtype else total.add_(left @ right)
