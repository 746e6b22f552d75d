"""The objectives: what each token adds to the loss, as pure functions of tensors.

Owns the table of objectives: the level of the ratio (`RATIOS`), its use (`CORRECTIONS`), the
weights of tokens (`AGGREGATIONS`) and the estimators of the KL penalty (`KL_ESTIMATORS`). Never
reads a message and reduces nothing: sums and denominators belong to `learner.train`, its only
driver. docs/objectives.md has the formulas.

Shapes: S positions of a pack that predict a trained token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from buffer.wire.messages import Minibatch
from configs.objectives import objective
from configs.schema import LossConfig
from learner.packs.batch import Pack

MAX_LOG_RATIO = 20.0  # keeps the mean ratio finite; every rule below acts far earlier


class Surrogate(NamedTuple):
    """Per token [S]: the loss, the ratio learner/actor, and the rule that acted on it."""

    loss_S: torch.Tensor
    ratio_S: torch.Tensor
    clipped_S: torch.Tensor  # bool: no gradient, since the policy has moved far enough
    capped_S: torch.Tensor  # bool: ratio above tis_cap


class Terms(NamedTuple):
    """Per token [S], without a gradient. Ratios and log-probabilities are of the chosen level."""

    ratio_S: torch.Tensor  # learner/actor
    to_proximal_S: torch.Tensor  # learner/proximal policy
    proximal_S: torch.Tensor  # proximal policy/actor
    logprobs_S: torch.Tensor
    advantages_S: torch.Tensor


class Weights(NamedTuple):
    """Per token [S]: the loss is -A x value, its gradient -A x gradient x grad(logprob)."""

    value_S: torch.Tensor
    gradient_S: torch.Tensor
    clipped_S: torch.Tensor


def surrogate(logprobs_S: torch.Tensor, pack: Pack, loss: LossConfig) -> Surrogate:
    """The loss of each token of `pack`, with a gradient through `logprobs_S`.

    The actor is the policy that sampled a token. The proximal policy is the learner's at the start
    of the step, hence the present one in a step of one update.
    """
    rules = objective(loss)
    level = RATIOS[rules.ratio]
    levelled_S, actor_S = level(logprobs_S, pack), level(pack.actor_logprobs_S, pack)
    now_S = levelled_S.detach()
    start_S = now_S if pack.start_logprobs_S is None else level(pack.start_logprobs_S, pack)
    terms = Terms(
        ratio_S=_ratio(now_S - actor_S),
        to_proximal_S=_ratio(now_S - start_S),
        proximal_S=_ratio(start_S - actor_S),
        logprobs_S=now_S,
        advantages_S=pack.advantages_S,
    )
    weights = CORRECTIONS[rules.correction](terms, loss)
    # The difference of log-probabilities is zero: it adds the gradient, not a value.
    loss_S = -pack.advantages_S * (weights.value_S + weights.gradient_S * (levelled_S - now_S))
    return Surrogate(loss_S, terms.ratio_S, weights.clipped_S, terms.ratio_S > loss.tis_cap)


def _ratio(log_ratio_S: torch.Tensor) -> torch.Tensor:
    return log_ratio_S.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


# Level of the ratio -------------------------------------------------------------------------------


def _token(values_S: torch.Tensor, pack: Pack) -> torch.Tensor:
    return values_S


def _sequence(values_S: torch.Tensor, pack: Pack) -> torch.Tensor:
    """The mean over the response of each token. Source: GSPO (arXiv 2507.18071), equation 7."""
    zeros = values_S.new_zeros(len(pack.lengths))
    sums = zeros.index_add(0, pack.response_S, values_S)
    counts = zeros.index_add(0, pack.response_S, torch.ones_like(values_S)).clamp(min=1)
    return (sums / counts)[pack.response_S]


RATIOS: dict[str, Callable[[torch.Tensor, Pack], torch.Tensor]] = {
    "token": _token,
    "sequence": _sequence,
}


# Use of the ratio ---------------------------------------------------------------------------------


def _clip(terms: Terms, loss: LossConfig) -> Weights:
    """PPO's min(rA, clip(r)A), with r = learner/actor.

    ==========  ====================  ==============  ===========================
    A           r                     loss            gradient
    ==========  ====================  ==============  ===========================
    positive    above 1 + clip_high   -(1+clip_high)A  none
    negative    below 1 - clip_low    -(1-clip_low)A   none
    any         otherwise             -min(r, cap)A    -min(r, cap) A grad(logprob)
    ==========  ====================  ==============  ===========================

    That min leaves r unbounded if A is negative, so a token that a stale or mismatched actor found
    improbable would outweigh the whole batch. The importance weight is therefore truncated at
    `tis_cap` and taken as a constant: such a token still contributes, with a bounded weight. (If A
    is positive, the cap acts only if it is below 1 + clip_high.)

    Source: PPO (arXiv 1707.06347), DAPO (arXiv 2503.14476) for `clip_high` above `clip_low`, and
    IMPALA (arXiv 1802.01561) for truncated importance sampling.
    """
    return _clipped(terms.ratio_S, terms.advantages_S, loss, cap=loss.tis_cap)


def _clipped(
    ratio_S: torch.Tensor, advantages_S: torch.Tensor, loss: LossConfig, cap: float
) -> Weights:
    rules = objective(loss)
    high_S = (advantages_S > 0) & (ratio_S > 1 + rules.clip_high)
    low_S = (advantages_S < 0) & (ratio_S < 1 - rules.clip_low)
    clipped_S = high_S | low_S
    weight_S = ratio_S.clamp(max=cap)
    value_S = torch.where(
        clipped_S, ratio_S.clamp(1 - rules.clip_low, 1 + rules.clip_high), weight_S
    )
    return Weights(value_S, torch.where(clipped_S, 0.0, weight_S), clipped_S)


def _truncated(terms: Terms, loss: LossConfig) -> Weights:
    """A weight of min(r, tis_cap), and no clip. Source: IMPALA (arXiv 1802.01561)."""
    weight_S = terms.ratio_S.clamp(max=loss.tis_cap)
    return Weights(weight_S, weight_S, torch.zeros_like(weight_S, dtype=torch.bool))


def _mask(terms: Terms, loss: LossConfig) -> Weights:
    """A weight of r inside mask_low..mask_high, and nothing outside.

    Source: IcePop, in Ring-1T (arXiv 2510.18855).
    """
    outside_S = (terms.ratio_S < loss.mask_low) | (terms.ratio_S > loss.mask_high)
    weight_S = torch.where(outside_S, 0.0, terms.ratio_S)
    return Weights(weight_S, weight_S, outside_S)


def _cispo(terms: Terms, loss: LossConfig) -> Weights:
    """The loss -min(r, 1 + clip_high) A logprob, with the weight as a constant.

    Every token keeps a gradient. Source: MiniMax-M1 (arXiv 2506.13585), equation 4, without a
    lower bound, as in its experiments.
    """
    highest = 1 + objective(loss).clip_high
    weight_S = terms.ratio_S.clamp(max=highest)
    return Weights(weight_S * terms.logprobs_S, weight_S, terms.ratio_S > highest)


def _decoupled(terms: Terms, loss: LossConfig) -> Weights:
    """Clip against the proximal policy, with a weight of min(proximal/actor, tis_cap).

    Source: Hilton et al. (arXiv 2110.00641), and AReaL (arXiv 2505.24298). Differs: the weight is
    truncated, where AReaL's implementation leaves a token out.
    """
    behaviour_S = terms.proximal_S.clamp(max=loss.tis_cap)
    clip = _clipped(terms.to_proximal_S, terms.advantages_S, loss, cap=loss.tis_cap)
    return Weights(behaviour_S * clip.value_S, behaviour_S * clip.gradient_S, clip.clipped_S)


CORRECTIONS: dict[str, Callable[[Terms, LossConfig], Weights]] = {
    "clip": _clip,
    "truncated": _truncated,
    "mask": _mask,
    "cispo": _cispo,
    "decoupled": _decoupled,
}


# Weights of tokens --------------------------------------------------------------------------------


class Aggregation(NamedTuple):
    """The weight of a token in an update's loss is `weight / denominator`."""

    # Of the number of sampled tokens in its response, and of `sampling.max_tokens`.
    weight: Callable[[int, int], float]
    denominator: Callable[[Minibatch], int]


AGGREGATIONS = {
    # DAPO (arXiv 2503.14476): a long response weighs more than a short one.
    "token_mean": Aggregation(lambda _, __: 1.0, lambda minibatch: minibatch.loss_tokens),
    # GRPO (arXiv 2402.03300): the tokens of a long response weigh less than those of a short one.
    "sequence_mean": Aggregation(
        lambda num_sampled, _: 1 / num_sampled, lambda minibatch: minibatch.loss_responses
    ),
    # Dr. GRPO (arXiv 2503.20783): a token's weight depends on no length.
    "constant": Aggregation(
        lambda _, max_tokens: 1 / max_tokens, lambda minibatch: minibatch.loss_responses
    ),
}


# KL penalty ---------------------------------------------------------------------------------------


def kl_penalty(
    logprobs_S: torch.Tensor, reference_logprobs_S: torch.Tensor, estimator: str
) -> torch.Tensor:
    """An estimate of KL(policy, reference) for each token, with a gradient.

    Source: J. Schulman, Approximating KL Divergence (2020). GRPO (arXiv 2402.03300) uses k3. On
    tokens that the policy sampled, the gradient of k1 is zero on average, and that of k2 is the
    gradient of the divergence.
    """
    return KL_ESTIMATORS[estimator](logprobs_S - reference_logprobs_S)


def _k3(d: torch.Tensor) -> torch.Tensor:
    d = d.clamp(min=-MAX_LOG_RATIO)
    return (-d).exp() - 1 + d


KL_ESTIMATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": _k3,
}
