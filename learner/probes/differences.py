"""How far the results of two layouts of packs are from each other.

Owns what probes of a model have in common: the tokens they draw, log-probabilities and gradients of
packs, the differences and their bounds. It leaves the model without gradients. Driven by
`learner.probes.capability` and `learner.probes.sharing`. A collective if there are several ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from learner.packs.batch import Pack
from learner.packs.boundaries import Boundaries

# Correct layouts were off by at most 1e-6 in float32 and, with experts, 0.07 in bfloat16. Wrong
# ones were off by at least 0.05 nats and 2 %.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.2}
# If sequences are kept apart, the tokens of the others change nothing at all, since the same
# kernels run on the same shapes.
LEAK_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-3}
# Share of the whole gradient's norm. A parameter's difference is relative to at least this much.
SMALL_FRAC = 1e-3


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the results of one layout are from those of each sequence alone."""

    # The largest of any token, in nats.
    logprob: float = float("inf")
    # The largest of any parameter's gradient, relative to its norm.
    gradient: float = float("inf")
    # The change of a sequence's log-probabilities with its neighbours' tokens, in nats.
    leak: float = float("inf")
    error: str = ""  # why this layout cannot be run at all

    def within_bounds(self, dtype: torch.dtype) -> bool:
        return max(self.logprob, self.gradient) <= BOUNDS[dtype] and self.leak <= LEAK_BOUNDS[dtype]

    def __str__(self) -> str:
        measured = (
            f"log-probabilities off by {self.logprob:.2g} nats, gradients by {self.gradient:.2g}"
        )
        return self.error or measured


def run(
    boundaries: Boundaries, packs: list[Pack], plainly: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities of all targets, and this rank's part of the gradients.

    The gradients are those of a randomly weighted sum of the log-probabilities.
    """
    logprobs = []
    for pack in packs:
        logprobs_S = logprobs_of(boundaries, pack, plainly)
        (logprobs_S * pack.advantages_S).sum().backward()
        logprobs.append(logprobs_S.detach())
    gradients = {
        name: _local(parameter.grad)
        for name, parameter in boundaries.model.named_parameters()
        if parameter.grad is not None
    }
    settle(boundaries.model)
    return torch.cat(logprobs), gradients


def logprobs_of(boundaries: Boundaries, pack: Pack, plainly: bool = False) -> torch.Tensor:
    """Log-probabilities at temperature 1; `plainly`: by a call with nothing but the tokens."""
    if plainly:
        return boundaries.plain_logprobs(pack)
    return boundaries.logprobs(pack, temperature=1.0)[0]


def ordinary_ids(model: PreTrainedModel) -> torch.Tensor:
    """Tokens to draw from: all but those that the configuration names.

    These may stand for an image or for padding.
    """
    config = model.config.get_text_config()
    named = {value for name, value in config.to_dict().items() if name.endswith("token_id")}
    named |= {value for name, value in model.config.to_dict().items() if name.endswith("token_id")}
    size = min(config.vocab_size, 50_000)
    return torch.tensor([token for token in range(size) if token not in named])


def settle(model: PreTrainedModel) -> None:
    """Clear the gradients and reshard the model, as before a first step.

    A forward pass without a backward pass leaves parameters gathered.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    model.zero_grad()


def device_of(model: torch.nn.Module) -> torch.device:
    """The device that computes, which is not the one that holds offloaded parameters."""
    parameter = next(model.parameters())
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != "cpu":
        return torch.device(parameter.device_mesh.device_type, torch.cuda.current_device())
    return parameter.device


def _local(gradient: torch.Tensor) -> torch.Tensor:
    return (gradient.to_local() if isinstance(gradient, DTensor) else gradient).detach()


def gradient_difference(
    gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> float:
    """The largest norm of a parameter's difference, relative to its expected norm."""
    if gradients.keys() != expected.keys():
        return float("inf")
    squares = []
    for name, gradient in expected.items():
        squares += [
            (gradients[name] - gradient).double().pow(2).sum(),
            gradient.double().pow(2).sum(),
        ]
    of_all = torch.stack(squares)
    if dist.is_initialized():
        dist.all_reduce(of_all)
    off, norm = of_all.sqrt().view(-1, 2).unbind(1)
    whole = norm.pow(2).sum().sqrt()
    return (off / norm.clamp(min=SMALL_FRAC * whole.item())).max().item()


def largest_of_ranks(values: list[float]) -> list[float]:
    """The largest values of any rank, so that all ranks reach the same verdict."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        tensor = tensor.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()
