"""Log-probabilities and the clipped surrogate, as pure functions of tensors.

Never reads a message, owns no parameter and reduces nothing: sums and denominators belong to
`learner.train`, its only driver.

Shapes: S positions of a pack that predict a trained token, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from configs.schema import LossConfig

CHUNK_ELEMENTS = 2**24  # float32 elements of logits held at once: 64 MiB
MAX_LOG_RATIO = 20.0  # keeps the mean ratio finite; every rule below acts far earlier


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


class Surrogate(NamedTuple):
    """Per token [S]: the loss, the ratio learner/actor, and the rule that acted on it."""

    loss_S: torch.Tensor
    ratio_S: torch.Tensor
    clipped_S: torch.Tensor  # bool: no gradient, since the policy has moved far enough
    capped_S: torch.Tensor  # bool: weight cut at tis_cap


def clipped_surrogate(
    learner_logprobs_S: torch.Tensor,
    actor_logprobs_S: torch.Tensor,
    advantages_S: torch.Tensor,
    config: LossConfig,
) -> Surrogate:
    """The token-level surrogate of a single update: r = learner/actor, A = advantage.

    ==========  ====================  ==============  ===========================
    A           r                     loss            gradient
    ==========  ====================  ==============  ===========================
    positive    above 1 + clip_high   -(1+clip_high)A  none
    negative    below 1 - clip_low    -(1-clip_low)A   none
    any         otherwise             -min(r, cap)A    -min(r, cap) A grad(logprob)
    ==========  ====================  ==============  ===========================

    The clip is PPO's min(rA, clip(r)A), with `clip_high` above `clip_low` (clip-higher). That min
    leaves r unbounded if A is negative, so a token that a stale or mismatched actor found
    improbable would outweigh the whole batch. The importance weight is therefore truncated at
    `tis_cap` and taken as a constant: such a token still contributes, with a bounded weight. (If A
    is positive, the cap acts only if it is below 1 + clip_high.) The old policy is the actor's own
    distribution. With one update per shard, the learner's policy at the start of the step equals
    the current one, and a ratio to it would always be 1.

    Source: PPO (arXiv 1707.06347), DAPO (arXiv 2503.14476) for clip-higher and the token-level
    mean, and IMPALA (arXiv 1802.01561) for truncated importance sampling.
    """
    log_ratio_S = (learner_logprobs_S.detach() - actor_logprobs_S).clamp(
        -MAX_LOG_RATIO, MAX_LOG_RATIO
    )
    ratio_S = log_ratio_S.exp()
    high_S = (advantages_S > 0) & (ratio_S > 1 + config.clip_high)
    low_S = (advantages_S < 0) & (ratio_S < 1 - config.clip_low)
    clipped_S = high_S | low_S
    weight_S = ratio_S.clamp(max=config.tis_cap)
    value_S = torch.where(
        clipped_S, ratio_S.clamp(1 - config.clip_low, 1 + config.clip_high), weight_S
    )
    gradient_weight_S = torch.where(clipped_S, 0.0, weight_S)
    # The difference of log-probabilities is zero: it adds the gradient, not a value.
    loss_S = -advantages_S * (
        value_S + gradient_weight_S * (learner_logprobs_S - learner_logprobs_S.detach())
    )
    return Surrogate(loss_S, ratio_S, clipped_S, ratio_S > config.tis_cap)
