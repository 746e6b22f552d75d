"""Advantages and every branch of the surrogate equal numbers worked out by
hand.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from configs.schema import LossConfig
from learner.packs.batch import Pack, plain_pack
from learner.packs.loss import surrogate

LOSS = LossConfig(clip_low=0.2, clip_high=0.28, tis_cap=2.0)


def pack_of(actor_logprobs: list[float], advantages: list[float]) -> Pack:
    """One response of tokens with the given log-probabilities of the actor."""
    pack = plain_pack(torch.zeros(len(advantages) + 1, dtype=torch.int64), torch.tensor(advantages))
    return replace(pack, actor_logprobs_S=torch.tensor(actor_logprobs))


def surrogate_of(
    ratio: float, advantage: float, config: LossConfig = LOSS
) -> tuple[float, float, bool, bool]:
    """For one token: loss, gradient with respect to the learner's logprob, clipped, capped."""
    logprob = torch.tensor([-1.0], requires_grad=True)
    made = surrogate(logprob, pack_of([-1.0 - math.log(ratio)], [advantage]), config)
    made.loss_S.sum().backward()
    assert logprob.grad is not None
    return (
        made.loss_S.item(),
        logprob.grad.item(),
        bool(made.clipped_S),
        bool(made.capped_S),
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped", "capped"),
    [
        (1.0, 2.0, -2.0, -2.0, False, False),  # on policy: plain policy gradient
        # Between 1 + clip_low and 1 + clip_high: not clipped (clip-higher)
        (1.2, 2.0, -2.4, -2.4, False, False),
        (1.5, 2.0, -2.56, 0.0, True, False),  # above 1 + clip_high: -(1.28)(2), no gradient
        (3.0, 2.0, -2.56, 0.0, True, True),  # the cap lies above the clip and changes nothing
        (0.5, 2.0, -1.0, -1.0, False, False),  # a good token has become rarer: not clipped
        (1.0, -2.0, 2.0, 2.0, False, False),
        (0.9, -2.0, 1.8, 1.8, False, False),
        (0.5, -2.0, 1.6, 0.0, True, False),  # below 1 - clip_low: (0.8)(2), no gradient
        (1.5, -2.0, 3.0, 3.0, False, False),  # a bad token has become likelier: not clipped
        # Truncated importance weight: 2 instead of 5, with a gradient.
        (5.0, -2.0, 4.0, 4.0, False, True),
        (5.0, 0.0, 0.0, 0.0, False, True),
    ],
)
def test_surrogate_by_hand(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: bool, capped: bool
) -> None:
    measured = surrogate_of(ratio, advantage)
    assert measured[0] == pytest.approx(loss, abs=1e-5)
    assert measured[1] == pytest.approx(gradient, abs=1e-5)
    assert measured[2:] == (clipped, capped)


def test_a_cap_below_the_clip_also_bounds_positive_advantages() -> None:
    assert surrogate_of(1.2, 1.0, LossConfig(tis_cap=1.1))[:2] == pytest.approx(
        (-1.1, -1.1), abs=1e-5
    )


def test_an_absurd_ratio_stays_finite() -> None:
    logprob = torch.tensor([0.0, 0.0], requires_grad=True)
    made = surrogate(logprob, pack_of([-500.0, -500.0], [1.0, -1.0]), LOSS)
    made.loss_S.sum().backward()
    assert logprob.grad is not None
    assert logprob.grad.tolist() == pytest.approx([0.0, 2.0])
    assert torch.isfinite(made.ratio_S).all()


@pytest.mark.parametrize(
    ("to_start", "to_actor", "advantage", "gradient", "clipped"),
    [
        (1.5, 1.0, 1.0, 0.0, True),  # far from the start of the step, though not from the actor
        (1.0, 1.5, 1.0, -1.5, False),  # far from the actor alone: a weight of start/actor
        (1.2, 2.4, 1.0, -1.2 * 2.0, False),
        (1.1, 5.5, 1.0, -1.1 * 2.0, False),  # start/actor is 5, capped at 2
        (0.5, 1.0, -1.0, 0.0, True),
        (0.9, 1.8, -1.0, 0.9 * 2.0, False),
    ],
)
def test_decoupled_clips_against_the_start_of_the_step(
    to_start: float, to_actor: float, advantage: float, gradient: float, clipped: bool
) -> None:
    logprob = torch.tensor([-1.0], requires_grad=True)
    pack = replace(
        pack_of([-1.0 - math.log(to_actor)], [advantage]),
        start_logprobs_S=torch.tensor([-1.0 - math.log(to_start)]),
    )
    made = surrogate(logprob, pack, LossConfig(kind="decoupled_ppo", clip_high=0.28))
    made.loss_S.sum().backward()
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(gradient, abs=1e-5)
    assert bool(made.clipped_S) is clipped
