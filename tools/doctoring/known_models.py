"""The configurations of some well-known models, in case their hub cannot be reached.

Only the entries of their `config.json` that decide sizes. They stand in for a model of the same
name (with any suffix, such as -Instruct), and a finding says so.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from configs.memory.shape import ModelShape
from learner.model_shape import shape_of

COLUMNS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
KNOWN: dict[str, tuple[Any, ...]] = {
    "HuggingFaceTB/SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "Qwen/Qwen2.5-3B": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True),
    "Qwen/Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    "Qwen/Qwen2.5-14B": ("qwen2", 5120, 13824, 48, 40, 8, 128, 152064, False),
    "Qwen/Qwen2.5-32B": ("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, False),
    "Qwen/Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True),
    "Qwen/Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "Qwen/Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "meta-llama/Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "meta-llama/Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "meta-llama/Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
}


def known_name(path: str) -> str | None:
    """The known model that `path` names, such as Qwen/Qwen3-8B for qwen3-8b-base."""
    given = path.rstrip("/").rpartition("/")[2].lower()
    names = [name for name in KNOWN if _names(given, name.rpartition("/")[2].lower())]
    return max(names, key=len, default=None)


def _names(given: str, known: str) -> bool:
    return given == known or given.startswith(f"{known}-")


def known_shape(name: str) -> ModelShape:
    """The sizes of a model of `KNOWN`."""
    entries = dict(zip(COLUMNS, KNOWN[name], strict=True))
    config: PreTrainedConfig = CONFIG_MAPPING[entries.pop("model_type")](**entries)
    return shape_of(config)
