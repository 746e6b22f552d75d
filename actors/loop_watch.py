"""Ends an engine's process whose event loop hangs, so that its pool restarts it.

A link answers the buffer from a thread of its own, so a process can look alive while its loop is
blocked, and cannot obey when the buffer asks it to restart. Owns the beat of the loop and the
thread that watches it. Driven by `actors.process`.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import threading
from types import TracebackType
from typing import Self

LOOKS = 50  # within the limit
# A thread that holds Python's lock stops the watching thread too. faulthandler needs no lock, but
# it also counts the time for which the whole process was stopped, so it waits longer.
LAST_RESORT = 3.0


class LoopWatch:
    """A context inside a running event loop, which may be blocked for at most `limit_s`.

    Beyond it, all stacks and one line are printed, and the process ends with `status`. Time in
    which the whole process was stopped does not count.
    """

    def __init__(self, limit_s: float, status: int, reason: str) -> None:
        self._limit_s, self._status, self._reason = limit_s, status, reason
        self._missed = 0  # looks without a beat
        self._ended = threading.Event()
        self._beating: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._beat()
        threading.Thread(target=self._watch, name="loop watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        if self._beating is not None:
            self._beating.cancel()

    def _beat(self) -> None:
        self._missed = 0
        faulthandler.dump_traceback_later(LAST_RESORT * self._limit_s, exit=True)
        interval_s = self._limit_s / LOOKS
        self._beating = asyncio.get_running_loop().call_later(interval_s, self._beat)

    def _watch(self) -> None:
        while not self._ended.wait(self._limit_s / LOOKS):
            self._missed += 1
            if self._missed > LOOKS:
                faulthandler.dump_traceback()
                print(self._reason, file=sys.stderr, flush=True)
                os._exit(self._status)
