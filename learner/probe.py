"""The learner's half of the probe: what the weights of the next version make of the fixed sequences.

Changes no weight, except `disturb`, which a check before a run calls to have other weights to load.
Driven by `learner.train` at each publication and by `tools.check`. A collective: all ranks call.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from buffer.wire.probe import probe_sequences
from learner import fsdp
from learner.packs.batch import Pack
from learner.packs.boundaries import Boundaries
from learner.packs.loss import token_logprobs

DISTURBANCE = 0.05  # of its neighbour is added to a weight: far more than rounding, and no nonsense


@torch.no_grad()
def probe_logprobs(boundaries: Boundaries, device: torch.device) -> bytes:
    """Log-probabilities of the probe's tokens at temperature 1, each sequence alone, as float32."""
    vocab_size = boundaries.model.config.get_text_config().vocab_size
    logprobs = [
        token_logprobs(boundaries.logits(pack), pack.targets_S, temperature=1.0)[0]
        for sequence in probe_sequences(vocab_size)
        for pack in [_pack(sequence).to(device)]
    ]
    # A forward pass without a backward one leaves the root's parameters whole.
    fsdp.reshard(boundaries.model)
    return torch.cat(logprobs).float().cpu().numpy().astype("<f4").tobytes()


def _pack(sequence: list[int]) -> Pack:
    """One sequence, of which every token after the first is predicted."""
    num_predicted = len(sequence) - 1
    return Pack(
        input_ids_T=torch.tensor(sequence[:-1]),
        position_ids_T=torch.arange(num_predicted),
        predicts_S=torch.arange(num_predicted),
        targets_S=torch.tensor(sequence[1:]),
        actor_logprobs_S=torch.zeros(num_predicted),
        advantages_S=torch.zeros(num_predicted),
        current_S=torch.zeros(num_predicted, dtype=torch.bool),
        fresh_S=torch.zeros(num_predicted, dtype=torch.bool),
        lengths=(num_predicted,),
    )


@torch.no_grad()
def disturb(model: PreTrainedModel) -> None:
    """Move every weight a little, the same way each time. Of one rank only."""
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        neighbours = local.flatten().roll(1).view_as(local)
        local.add_(neighbours, alpha=DISTURBANCE)
