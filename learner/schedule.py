"""The learning rate of a step: transformers' schedules, as a function of the step alone.

Owns no state, so a resumed run continues at the rate that it would have had. Driven by
`learner.train`.
"""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from configs.schema import Config

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step `step`, for steps 0 to `run.steps` - 1.

    transformers' schedules are 0 at position 0 and at the last one. A run takes the positions
    between them, so no update is wasted: the warm-up ends with step `optimizer.warmup_steps` - 1,
    and a decline would reach 0 one step after the last.
    """
    optimizer = torch.optim.SGD([torch.zeros(())], lr=config.optimizer.lr)
    scheduler = get_scheduler(
        NAMES[config.optimizer.schedule],
        optimizer,
        num_warmup_steps=max(1, config.optimizer.warmup_steps),
        num_training_steps=config.run.steps + 1,
    )
    assert isinstance(scheduler, LambdaLR)
    return config.optimizer.lr * scheduler.lr_lambdas[0](step + 1)
