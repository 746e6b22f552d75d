"""A limit on restarts within a time window, so that a long run survives rare deaths."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class Restarts:
    """The restarts of one process. `most` of them are allowed within any `window_s` seconds."""

    def __init__(
        self, most: int, window_s: float, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self.most, self.window_s = most, window_s
        self._clock_s = clock_s
        self._taken_s: deque[float] = deque()

    def exhausted(self) -> bool:
        """Whether no restart is allowed now."""
        now = self._clock_s()
        while self._taken_s and now - self._taken_s[0] > self.window_s:
            self._taken_s.popleft()
        return len(self._taken_s) >= self.most

    def take(self) -> int:
        """The number of this restart within the window, from 1; 0 if none is allowed."""
        if self.exhausted():
            return 0
        self._taken_s.append(self._clock_s())
        return len(self._taken_s)
