"""What learner and engines exchange if a model is trained through adapters: these alone, or whole
weights.
"""

from __future__ import annotations

from configs.schema import Config


def swaps_adapters(config: Config) -> bool:
    """Whether engines keep the model's own weights and load new adapters."""
    return config.model.lora.rank > 0 and not config.model.lora.merge
