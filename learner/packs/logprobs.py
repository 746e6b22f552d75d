"""Log-probabilities and entropies of tokens, from logits, in chunks.

Owns no parameter. Driven by `learner.train` and by the probes.

Shapes: S positions of a pack that predict a trained token, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_ELEMENTS = 2**24  # float32 elements of logits held at once: 64 MiB


class _ChunkedLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies, computed a chunk of rows at a time.

    Forward and backward convert only one chunk to float32, so that logits never exist twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_SV: torch.Tensor,
        targets_S: torch.Tensor,
        temperature: float,
        chunk_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_S = torch.empty(len(targets_S), dtype=torch.float32, device=logits_SV.device)
        entropy_S = torch.empty_like(logprobs_S)
        for start in range(0, len(targets_S), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logprobs_CV = torch.log_softmax(logits_SV[rows].float() / temperature, dim=-1)
            logprobs_S[rows] = logprobs_CV.gather(1, targets_S[rows, None])[:, 0]
            entropy_S[rows] = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
        ctx.save_for_backward(logits_SV, targets_S)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        ctx.mark_non_differentiable(entropy_S)
        return logprobs_S, entropy_S

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits_SV, targets_S = ctx.saved_tensors
        grad_logits_SV = torch.empty_like(logits_SV)
        for start in range(0, len(targets_S), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            grad_CV = torch.softmax(logits_SV[rows].float() / ctx.temperature, dim=-1).neg_()
            grad_CV.scatter_add_(1, targets_S[rows, None], torch.ones_like(grad_CV[:, :1]))
            grad_logits_SV[rows] = grad_CV.mul_(grads[0][rows, None] / ctx.temperature).to(
                logits_SV.dtype
            )
        return grad_logits_SV, None, None, None


def token_logprobs(
    logits_SV: torch.Tensor, targets_S: torch.Tensor, temperature: float, chunk_rows: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target [S] and entropy of its distribution [S], both float32 in nats.

    `temperature` divides the logits, as in the engine, so the results are comparable with
    `actor_logprobs`. Gradients flow through the log-probabilities only. `chunk_rows` is the number
    of rows per chunk; 0 derives it from `CHUNK_ELEMENTS`.
    """
    rows = chunk_rows or max(1, CHUNK_ELEMENTS // logits_SV.shape[1])
    return _ChunkedLogprobs.apply(logits_SV, targets_S, temperature, rows)  # type: ignore[no-any-return]
