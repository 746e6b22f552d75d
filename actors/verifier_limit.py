"""The time limit of one call of a verifier or an environment, which a cancel shortens.

A call whose rollout was cancelled may end by itself for a moment, since most do, and is then
stopped. Used from the event loop's thread and from the thread of the call.
"""

from __future__ import annotations

import time
from math import inf

CANCELLED_S = 1.0


class Limit:
    """`timeout_s` counts from `start`."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._started_s = inf
        self._cancelled_s = inf

    def start(self) -> None:
        self._started_s = time.monotonic()

    def cancel(self) -> None:
        self._cancelled_s = time.monotonic()

    @property
    def cancelled(self) -> bool:
        return self._cancelled_s < inf

    @property
    def left_s(self) -> float:
        """Seconds left, 0 or less if it is over."""
        end_s = min(self._started_s + self.timeout_s, self._cancelled_s + CANCELLED_S)
        return end_s - time.monotonic()
