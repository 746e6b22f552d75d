"""The probe: fixed sequences that engines and learner score at every policy version.

Owns the tokens, the comparison and its default bounds. Scored by `actors.worker` and
`learner.train`, compared by the buffer in a run and by `tools.check` before one.
"""

from __future__ import annotations

from random import Random

import numpy as np

from configs.schema import Config

NUM_SEQUENCES, NUM_TOKENS = 2, 48
# Mean nats per token. Rounding alone was 9e-6 in float32 and 0.09 in bfloat16 with SmolLM2-135M,
# because improbable tokens are rounded more than those of a response.
DEFAULT_BOUNDS = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.3}

OTHER_NUMBERS = (
    "vLLM computes this model differently from transformers on this device, so that every gradient "
    "would be wrong; take another model, dtype or version of vLLM, or raise "
    "learner.max_logprob_diff if this is rounding"
)
BROKEN_SWAP = (
    "vLLM cannot take new weights of this model while it runs, so that responses would come from a "
    "broken model; take another model or another version of vLLM"
)


def probe_sequences(vocab_size: int) -> list[list[int]]:
    """The token ids, from the middle of the vocabulary: no tokenizer has special tokens there."""
    random = Random(0)
    first, last = vocab_size // 4, max(vocab_size // 2 - 1, vocab_size // 4)
    return [[random.randint(first, last) for _ in range(NUM_TOKENS)] for _ in range(NUM_SEQUENCES)]


def allowed_difference(config: Config) -> float:
    """Largest difference of two sides, in nats per token: `learner.max_logprob_diff` or the
    default.
    """
    return config.learner.max_logprob_diff or DEFAULT_BOUNDS[config.model.dtype]


def difference(these: bytes, those: bytes) -> float:
    """Mean absolute difference of two sides' log-probabilities (float32), in nats per token.

    Infinite if they are not of the same tokens, or not finite.
    """
    return float(_differences(these, those).mean())


def largest(these: bytes, those: bytes) -> float:
    """The largest difference of any token."""
    return float(_differences(these, those).max())


def _differences(these: bytes, those: bytes) -> np.ndarray:
    if len(these) != len(those) or not these or len(these) % 4:
        return np.array([np.inf])
    left, right = np.frombuffer(these, "<f4"), np.frombuffer(those, "<f4")
    return np.nan_to_num(np.abs(left - right), nan=np.inf, posinf=np.inf)
