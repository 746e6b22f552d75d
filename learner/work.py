"""The work of training on one trajectory, from the sizes of the model.

Driven by `learner.train`, which reports it to the buffer before the first step.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from buffer.wire.messages import Work


def training_work(model: PreTrainedModel, shares_prompts: bool = False) -> Work:
    """FLOPs of the head and of attention, in units of a token's FLOPs in the layers.

    A token costs two FLOPs per weight of a matrix that it meets, experts by their share. The head
    runs for sampled tokens only. Causal attention costs 2 x heads x head size FLOPs per layer and
    pair of tokens, which is half of a full one's. Layers with a window or a state are left out. A
    backward pass costs twice a forward pass everywhere, so the proportions stay the same.
    """
    config = model.config.get_text_config()
    head, embedding = (
        module.get_parameter("weight")
        for module in (model.get_output_embeddings(), model.get_input_embeddings())
        if module is not None
    )
    outside = {id(head), id(embedding)}
    body = sum(
        parameter.numel() * (_expert_share(config) if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in outside
    )
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    attended = kinds.count("full_attention") * config.num_attention_heads * head_size
    return Work(
        per_prediction=head.numel() / body,
        per_pair=attended / body,
        shares_prompts=shares_prompts,
    )


def _expert_share(config: object) -> float:
    """The share of a layer's experts that a token meets."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if number := getattr(config, name, 0):
            return getattr(config, "num_experts_per_tok", number) / number
    return 1.0
