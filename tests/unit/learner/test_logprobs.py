"""Log-probabilities and entropies of tokens equal those of whole logits, with a head and without,
and no tensor is larger than a chunk of logits or the head's weight.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learner.packs.logprobs import Head, token_logprobs

S, H, V = 7, 5, 11


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


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and bias of a head, and targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden_SH, weight_VH, bias_V = (
        torch.randn(*shape, generator=generator, requires_grad=True)
        for shape in ((S, H), (V, H), (V,))
    )
    return hidden_SH, weight_VH, bias_V, torch.randint(0, V, (S,), generator=generator)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
def test_a_head_in_chunks_equals_whole_logits(chunk_rows: int, softcap: float) -> None:
    hidden_SH, weight_VH, bias_V, targets_S = drawn()
    weights_S = torch.linspace(-1, 2, S)
    inputs = (hidden_SH, weight_VH, bias_V)

    logits_SV = hidden_SH @ weight_VH.T + bias_V
    if softcap:
        logits_SV = softcap * torch.tanh(logits_SV / softcap)
    expected = torch.distributions.Categorical(logits=logits_SV / 0.7)
    expected_S = expected.log_prob(targets_S)
    expected_grads = torch.autograd.grad((expected_S * weights_S).sum(), inputs)

    head = Head(weight_VH, bias_V, softcap)
    logprobs_S, entropy_S = token_logprobs(hidden_SH, targets_S, 0.7, head, chunk_rows)
    grads = torch.autograd.grad((logprobs_S * weights_S).sum(), inputs)

    torch.testing.assert_close(logprobs_S, expected_S)
    torch.testing.assert_close(entropy_S, expected.entropy().detach())
    assert not entropy_S.requires_grad
    for gradient, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_logits_without_a_head_keep_their_values_and_get_a_gradient(chunk_rows: int) -> None:
    logits_SV = torch.randn(S, V, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = logits_SV.detach().clone()
    targets_S = torch.arange(S)
    logprobs_S, _ = token_logprobs(logits_SV, targets_S, 0.7, chunk_rows=chunk_rows)
    (gradient_SV,) = torch.autograd.grad(logprobs_S.sum(), logits_SV)
    expected_S = torch.log_softmax(logits_SV / 0.7, -1).gather(1, targets_S[:, None])[:, 0]
    torch.testing.assert_close(logprobs_S, expected_S)
    torch.testing.assert_close(gradient_SV, torch.autograd.grad(expected_S.sum(), logits_SV)[0])
    assert torch.equal(logits_SV, before)


@pytest.mark.parametrize("head", [Head(), Head(torch.ones(V, V, requires_grad=True))])
def test_no_tokens_give_no_loss_and_a_zero_gradient(head: Head) -> None:
    """Every rank needs a gradient of the head, or the others would wait for it forever."""
    given_SV = torch.zeros(0, V, requires_grad=True)
    logprobs_S, _ = token_logprobs(given_SV, torch.zeros(0, dtype=torch.int64), 1.0, head)
    logprobs_S.sum().backward()
    assert given_SV.grad is not None and given_SV.grad.shape == (0, V)
    if head.weight_VH is not None:
        assert torch.equal(head.weight_VH.grad, torch.zeros(V, V))  # type: ignore[arg-type]


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden_SH, weight_VH, bias_V, targets_S = drawn()
    head = Head(weight_VH.detach(), bias_V.detach())
    token_logprobs(hidden_SH, targets_S, 1.0, head)[0].sum().backward()
    expected_SH = hidden_SH.detach().requires_grad_()
    logits_SV = expected_SH @ weight_VH.detach().T + bias_V.detach()
    torch.log_softmax(logits_SV, -1).gather(1, targets_S[:, None]).sum().backward()
    torch.testing.assert_close(hidden_SH.grad, expected_SH.grad)


def test_a_float32_head_does_not_round_logits_and_keeps_the_type_of_gradients() -> None:
    hidden_SH, weight_VH = (tensor.detach().bfloat16().requires_grad_() for tensor in drawn()[:2])
    targets_S = drawn()[3]
    exact_SV = hidden_SH.detach().double() @ weight_VH.detach().double().T
    exact_S = torch.log_softmax(exact_SV, -1).gather(1, targets_S[:, None])[:, 0].float()
    errors = {}
    for float32 in (False, True):
        logprobs_S, _ = token_logprobs(
            hidden_SH, targets_S, 1.0, Head(weight_VH, float32=float32), chunk_rows=3
        )
        errors[float32] = (logprobs_S - exact_S).abs().max().item()
        grads = torch.autograd.grad(logprobs_S.sum(), (hidden_SH, weight_VH))
        assert [gradient.dtype for gradient in grads] == [torch.bfloat16, torch.bfloat16]
    assert errors[True] < 1e-5 < 1e-4 < errors[False]


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return made


def test_no_tensor_is_larger_than_a_chunk_of_logits_or_the_weight() -> None:
    num_tokens, hidden, vocabulary, chunk_rows = 400, 8, 64, 16
    weight_VH = torch.randn(vocabulary, hidden, requires_grad=True)
    hidden_SH = torch.randn(num_tokens, hidden, requires_grad=True)
    targets_S = torch.zeros(num_tokens, dtype=torch.int64)
    with Largest() as largest:
        logprobs_S, _ = token_logprobs(hidden_SH, targets_S, 0.9, Head(weight_VH), chunk_rows)
        logprobs_S.sum().backward()
    allowed = max(chunk_rows * vocabulary, vocabulary * hidden, num_tokens * hidden)
    assert chunk_rows * vocabulary <= largest.num_elements <= allowed < num_tokens * vocabulary
