"""The probe: fixed sequences that engines and learner score at every policy version.

Owns the tokens, the comparison and its default bounds. Scored by `actors.worker` and `learner.train`,
compared by the buffer in a run and by `tools.check` before one.
"""

from __future__ import annotations

from random import Random

import numpy as np

NUM_SEQUENCES, NUM_TOKENS = 2, 48
# Mean nats per token. Rounding alone is 1e-5 at most in float32.
DEFAULT_BOUNDS = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.1}


def probe_sequences(vocab_size: int) -> list[list[int]]:
    """The token ids: from the middle of the vocabulary, where no tokenizer has special tokens."""
    random = Random(0)
    first, last = vocab_size // 4, max(vocab_size // 2 - 1, vocab_size // 4)
    return [[random.randint(first, last) for _ in range(NUM_TOKENS)] for _ in range(NUM_SEQUENCES)]


def difference(these: bytes, those: bytes) -> float:
    """Mean absolute difference of two sides' log-probabilities (float32), in nats per token.

    Infinite if they are not of the same tokens or not finite.
    """
    left, right = np.frombuffer(these, "<f4"), np.frombuffer(those, "<f4")
    if len(left) != len(right) or not len(left):
        return float("inf")
    mean = float(np.abs(left - right).mean())
    return mean if np.isfinite(mean) else float("inf")
