"""How prompts are told apart, in every run and on every machine alike.

A prompt's *id* covers everything that reaches its verifier. Its *text* alone decides on which side
of the held-out line it falls, so that training never sees a held-out prompt, whatever its answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from buffer.wire.messages import PromptPayload

HELD_OUT_FRAC = 0.05  # of a table or of all tagged sums; more if eval.num_prompts needs more


def identity(*parts: Any) -> str:
    """An id of everything that a prompt consists of. Raises `UnicodeEncodeError` for text that is
    no text: half of a surrogate pair.
    """
    return _digest(json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str))


def text_of(payload: PromptPayload) -> str:
    return payload.text or json.dumps(payload.messages)


def hash_frac(text: str) -> float:
    """The place of `text` in [0, 1), the same for every run, machine and seed."""
    return int(_digest(text), 16) / 2**64


def digest(names: Iterable[str]) -> str:
    """Of names in order, none of which has a line end."""
    return _digest("\n".join(names))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
