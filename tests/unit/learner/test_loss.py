"""Advantages, log-probabilities and every branch of the surrogate equal numbers worked out by
hand.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from configs.schema import LossConfig
from learner.packs.batch import Pack, plain_pack
from learner.packs.logprobs import token_logprobs
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


def test_logprobs_and_entropy_by_hand() -> None:
    logits_SV = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]))
    logprobs_S, entropy_S = token_logprobs(logits_SV, torch.tensor([1, 0]), temperature=1.0)
    assert logprobs_S.tolist() == pytest.approx([math.log(0.25), math.log(0.8)])
    assert entropy_S[0].item() == pytest.approx(1.5 * math.log(2))


def test_temperature_divides_the_logits() -> None:
    # At temperature 1/2 probabilities are squared and renormalised: 4/5 and 1/5 become 16/17 and
    # 1/17.
    logits_SV = torch.log(torch.tensor([[0.8, 0.2]]))
    logprobs_S, _ = token_logprobs(logits_SV, torch.tensor([1]), temperature=0.5)
    assert logprobs_S.item() == pytest.approx(math.log(1 / 17))


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
def test_chunking_changes_neither_values_nor_gradients(chunk_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_SV = torch.randn(7, 11, generator=generator, requires_grad=True)
    targets_S = torch.randint(0, 11, (7,), generator=generator)
    weights_S = torch.randn(7, generator=generator)
    logprobs_S, entropy_S = token_logprobs(logits_SV, targets_S, 0.7, chunk_rows)
    (gradient_SV,) = torch.autograd.grad((logprobs_S * weights_S).sum(), logits_SV)
    expected_SV = torch.log_softmax(logits_SV / 0.7, -1)
    expected_S = expected_SV.gather(1, targets_S[:, None])[:, 0]
    (expected_gradient_SV,) = torch.autograd.grad((expected_S * weights_S).sum(), logits_SV)
    torch.testing.assert_close(logprobs_S, expected_S)
    torch.testing.assert_close(
        entropy_S, torch.distributions.Categorical(logits=logits_SV.detach() / 0.7).entropy()
    )
    torch.testing.assert_close(gradient_SV, expected_gradient_SV)


def test_no_tokens_give_no_loss_and_a_zero_gradient() -> None:
    logits_SV = torch.zeros(0, 5, requires_grad=True)
    logprobs_S, _ = token_logprobs(logits_SV, torch.zeros(0, dtype=torch.int64), 1.0)
    logprobs_S.sum().backward()
    assert logits_SV.grad is not None and logits_SV.grad.shape == (0, 5)
