"""The sizes of a model that decide memory, and the list of parts that a memory is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal language model. Parameters are numbers, not bytes; tied ones count
    once.
    """

    parameters: int
    block_parameters: int  # of the largest layer, which the learner gathers whole
    outer_parameters: int  # outside the layers: embeddings, head, last norm
    num_layers: int
    hidden: int
    intermediate: int  # width of the feed-forward part that one token passes through
    query_width: int  # heads x head size
    kv_width: int  # key-value heads x head size
    vocabulary: int
    has_experts: bool = False

    def kv_bytes(self, dtype: str) -> int:
        """Bytes of an engine's key-value cache per token.

        An upper bound: layers with a window or a state of fixed size need less.
        """
        return 2 * self.num_layers * self.kv_width * DTYPE_BYTES[dtype]


def widths(entry: Callable[[str], Any]) -> dict[str, Any]:
    """The fields of `ModelShape` that a Hugging Face configuration states directly.

    `entry` returns one of its entries, or None. A model without attention has no such widths.
    """
    heads, hidden = entry("num_attention_heads") or 0, entry("hidden_size") or 0
    head_size = entry("head_dim") or (hidden // heads if heads else 0)
    dense = entry("intermediate_size") or 4 * hidden
    experts = entry("num_experts_per_tok") or 0
    per_token = experts * (entry("moe_intermediate_size") or dense)
    return {
        "num_layers": entry("num_hidden_layers") or 0,
        "hidden": hidden,
        "intermediate": per_token + (entry("shared_expert_intermediate_size") or 0) or dense,
        "query_width": heads * head_size,
        "kv_width": (entry("num_key_value_heads") or heads) * head_size,
        "vocabulary": entry("vocab_size") or 0,
        "has_experts": bool(experts),
    }


@dataclass(frozen=True)
class Part:
    """One part of a process's memory, and the product that gives it."""

    name: str
    num_bytes: int
    arithmetic: str


@dataclass(frozen=True)
class Memory:
    """The peak memory of one process in one place (a GPU, or the machine's memory)."""

    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def __str__(self) -> str:
        """The arithmetic on one line, largest part first."""
        parts = sorted(self.parts, key=lambda part: -part.num_bytes)
        shown = [f"{gib(part.num_bytes)} {part.name} ({part.arithmetic})" for part in parts]
        return f"{gib(self.total)} = {' + '.join(shown)}"


def gib(num_bytes: float) -> str:
    """Such as 12.3 GiB, or 40 MiB below a tenth of a GiB."""
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes < 0.1 * GIB else f"{num_bytes / GIB:.1f} GiB"


def billions(number: float) -> str:
    """Such as 1.54e9."""
    exponent = len(str(int(number))) - 1
    return f"{number / 10**exponent:.3g}e{exponent}"
