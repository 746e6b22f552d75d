"""The learner's half of the probe: log-probabilities of the fixed sequences.

They are those of the next version's weights. Changes no weight, except in `disturb`, with which a
check before a run makes different weights to load. Driven by `learner.train` at each publication
and by `tools.check`.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from buffer.wire.probe import probe_sequences
from learner import fsdp
from learner.packs.batch import plain_pack
from learner.packs.boundaries import Boundaries

# Share of its neighbour that is added to a weight. It is far above rounding, and harmless.
DISTURBANCE = 0.05


@torch.no_grad()
def probe_logprobs(boundaries: Boundaries, device: torch.device) -> bytes:
    """Log-probabilities of the probe's tokens at temperature 1, each sequence alone, as float32.

    A collective.
    """
    vocab_size = boundaries.model.config.get_text_config().vocab_size
    logprobs = [
        boundaries.logprobs(pack, temperature=1.0)[0]
        for sequence in probe_sequences(vocab_size)
        for pack in [plain_pack(torch.tensor(sequence)).to(device)]
    ]
    # A forward pass without a backward pass leaves the root's parameters gathered.
    fsdp.reshard(boundaries.model)
    return torch.cat(logprobs).float().cpu().numpy().astype("<f4").tobytes()


@torch.no_grad()
def disturb(model: PreTrainedModel) -> None:
    """Change every trained weight a little, in the same way each time. For a single rank."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        neighbours = local.flatten().roll(1).view_as(local)
        if not local.any():  # an adapter's upper matrix, which begins at zero
            neighbours = torch.arange(local.numel(), device=local.device).cos().view_as(local)
        local.add_(neighbours, alpha=DISTURBANCE)
