"""AdamW, with its two moments in float32 or in bfloat16 (`optimizer.moments`).

Owns the optimizer's class and how moments are rounded. Weights and arithmetic are float32 in any
case. Never decides when to step. Driven by `learner.train`; `learner.checkpoint` saves its state.

Left out: moments of 8 bits. Those of torchao are subclasses of tensors with codes and scales, which
checkpoints of plain safetensors cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from configs.schema import OptimizerConfig

CHUNK = 2**22  # elements whose moments are in float32 at once, 16 MiB of each
LOW_BITS = 16  # of a float32, which a bfloat16 lacks


def make_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer of all weights that are trained, without a state yet."""
    beta1, beta2 = config.betas
    kind = CompactAdamW if config.moments == "bfloat16" else torch.optim.AdamW
    return kind(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.lr,
        betas=(beta1, beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


class CompactAdamW(torch.optim.AdamW):
    """AdamW that holds its moments in bfloat16, rounded up or down at random.

    Rounding to the nearest number would lose every change below 0.2 %, so that a second moment with
    a beta of 0.999 would hardly decline (measured: a third too large). At random, with the chances
    that keep the expected value, it moves as in float32 on average. What remains is noise: it was
    0.8 % of the second moment with a beta of 0.95, and 4 % with 0.999 (standard deviations). The
    random numbers depend on the step, the parameter and the shard alone, so that a resumed run
    repeats them, and copies of a shard stay equal.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, group, number)

    def _update(self, parameter: torch.nn.Parameter, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state.update(first_state(parameter, torch.bfloat16))
        seed = crc32(f"{int(state['step'])} {number} {_shard_number(parameter)}".encode())
        assert parameter.grad is not None
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        chunks = [_local(tensor).view(-1).split(CHUNK) for tensor in tensors]
        generator = torch.Generator(chunks[0][0].device).manual_seed(seed)
        for weights, gradients, *moments in zip(*chunks, strict=True):
            exact = [moment.float() for moment in moments]
            adamw(
                [weights], [gradients], [exact[0]], [exact[1]], [], [state["step"].clone()],
                fused=True, amsgrad=False, maximize=False,
                beta1=group["betas"][0], beta2=group["betas"][1],
                lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip
            for moment, value in zip(moments, exact, strict=True):
                moment.copy_(rounded_at_random(value, generator))
        state["step"] += 1


def first_state(parameter: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state of a parameter before its first step, with moments in `dtype`."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
    }


def rounded_at_random(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 numbers as bfloat16, each one of the two nearest, so that the expected value is
    exact. A bfloat16 stays itself.
    """
    noise = torch.randint(
        1 << LOW_BITS, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    bits = noise.add_(values.view(torch.int32)).bitwise_and_(-(1 << LOW_BITS))
    return bits.view(torch.float32).bfloat16()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_number(parameter: torch.Tensor) -> int:
    """The number of this rank's shard, which other ranks may hold as well."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh = parameter.device_mesh
    return mesh.get_local_rank(mesh.ndim - 1)
