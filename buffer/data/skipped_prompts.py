"""Prompts that a run goes on without: how many, why, and whether they are too many.

A prompt is skipped if one of its rollouts failed for good and `data.on_error=skip` allows that, or
if it does not fit the context. Owns the counts and the reasons. Driven by `buffer.run_state`.
"""

from __future__ import annotations

import re
from collections import Counter

from buffer.wire.messages import PromptPayload

NUM_ALWAYS_ALLOWED = 8  # so that a few failures at the start of a run do not end it
MAX_REASONS = 100  # that are told apart
SHOWN_REASONS = 3


class SkippedPrompts:
    """`num_skipped` includes those of earlier lives of the buffer, whose reasons are not kept."""

    def __init__(self, max_frac: float, num_skipped: int = 0) -> None:
        self.max_frac, self.num_skipped = max_frac, num_skipped
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}  # reason, without names and numbers -> the first such

    def add(self, prompt: PromptPayload, reason: str) -> None:
        self.num_skipped += 1
        kind = re.sub(r"\d+", "0", reason.replace(prompt.name, ""))
        if kind not in self._examples and len(self._examples) == MAX_REASONS:
            kind = min(self._examples)  # as good as any: the most frequent ones are shown
        self._examples.setdefault(kind, reason)
        self._reasons[kind] += 1

    def too_many(self, num_drawn: int) -> bool:
        """Whether the run has to end. `num_drawn`: prompts that it has begun, these included."""
        return self.num_skipped > max(NUM_ALWAYS_ALLOWED, self.max_frac * num_drawn)

    def refusal(self, num_drawn: int) -> str:
        return (
            f"{self.summary(num_drawn)}. data.max_skipped_frac={self.max_frac:g} allows no more; "
            "fix the cause, or raise it"
        )

    def summary(self, num_drawn: int) -> str:
        """Such as "9 of 200 prompts were skipped: 7 times, for instance: verifier ..."."""
        counted = f"{self.num_skipped} of {num_drawn} prompts were skipped"
        shown = self._reasons.most_common(SHOWN_REASONS)
        reasons = [f"{count} like this: {self._examples[kind]}" for kind, count in shown]
        return ": ".join([counted, *(["; ".join(reasons)] if reasons else [])])
