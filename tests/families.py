"""Tiny random models, one per family of architectures, in folders like downloaded ones.

Owns the configuration of a tiny member of each family. `save_family` writes the configuration,
safetensors (under the names of a published checkpoint) and a byte-level tokenizer in about a
second. The same seed always gives the same files. Every test of a whole family uses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.logging import disable_progress_bar

VOCABULARY = 320
SPREAD = 0.1  # added to every weight, because initial outputs hardly depend on other tokens
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # engines on a CPU require multiples of 32
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MAMBA: dict[str, Any] = {"mamba_d_head": 32, "mamba_d_state": 32, "mamba_n_groups": 1}
CONVOLUTION: dict[str, Any] = {
    "layer_types": ["conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
    "block_dim": 64,  # engines read the sizes of a published LFM2; the model does not
    "block_ff_dim": 128,
    "conv_dim": 64,
}
WINDOW: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
FAMILIES: dict[str, dict[str, Any]] = {  # by model type: the differences from `SIZES`
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR | EXPERTS | {"shared_expert_intermediate_size": 64},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "phi3": {},
    "mistral": {"sliding_window": 16},
    "olmo2": {},
    "smollm3": {},
    "gpt_neox": {
        "num_key_value_heads": 2
    },  # engines read it, although the model has no such setting
    "lfm2": CONVOLUTION,
    "bamba": MAMBA | {"mamba_n_heads": 4, "attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_n_heads": 4, "mamba_d_ssm": 128},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4": {},
    "granite": {},
    "cohere2": WINDOW,
}


def save_family(folder: Path, family: str, *, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny `family` (a model type: `FAMILIES`, or any that takes its sizes) with drawn
    weights to `folder`, and return it.

    `changes` override the configuration, such as `tie_word_embeddings=False`.
    """
    disable_progress_bar()
    config = CONFIG_MAPPING[family](**SIZES | FAMILIES.get(family, {}) | changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(SPREAD * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte after the special ones, and reserved tokens up to `VOCABULARY`."""
    names = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<reserved_{number}>" for number in range(VOCABULARY - len(names))]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL
    )
