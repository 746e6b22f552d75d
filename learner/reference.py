"""The frozen model from which the KL penalty is measured.

Owns its loading: sharded like the trained model, in the type of computation, and with the same
layout of packs, so that equal weights give equal log-probabilities. Driven by `learner.train`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from configs.schema import Config, LoraConfig
from learner import fsdp
from learner.packs.boundaries import Boundaries


def load_reference(config: Config, device: torch.device, policy: Boundaries) -> Boundaries:
    """The model of `loss.reference`, laid out like `policy`. A collective.

    Raises `ValueError` if it cannot be loaded, or if its tokens are not those of the policy.
    """
    path = config.loss.reference or config.model.path
    model_config = replace(config.model, path=path, lora=LoraConfig())
    of_reference = replace(config, model=model_config)
    try:
        model = fsdp.load_sharded(of_reference, device, fsdp.COMPUTE_DTYPE[config.model.dtype])
    except ValueError as error:
        raise ValueError(f"loss.reference={path}: {error}") from error
    model.requires_grad_(False)
    sizes = [m.config.get_text_config().vocab_size for m in (model, policy.model)]
    if sizes[0] != sizes[1] or model.config.model_type != policy.model.config.model_type:
        raise ValueError(
            f"loss.reference={path}: is a {model.config.model_type} model with {sizes[0]} tokens, "
            f"and must be a {policy.model.config.model_type} model with {sizes[1]} like "
            f"model.path={config.model.path}; otherwise their log-probabilities cannot be compared"
        )
    model.set_attn_implementation(str(policy.model.config._attn_implementation))
    boundaries = Boundaries(model, config.model.head_dtype)
    boundaries.fused = policy.fused
    for kind in policy.kinds:
        boundaries.split(kind)
    return boundaries
