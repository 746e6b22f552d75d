"""Requests to stop: the first Ctrl-C is answered at once, and the second one kills.

SIGTERM and SIGHUP count as Ctrl-C. A thread answers, because the main thread may be in a call that
takes seconds, such as a backward pass. Never ends anything but its own process: a supervisor checks
`repeated` and kills its children.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from buffer.processes.child import REQUESTS
from configs.errors import ExitStatus

AGAIN = "Ctrl-C again to kill"


class StopRequest:
    """A context for the main thread, around everything that a signal may interrupt."""

    def __init__(self, answer: Callable[[], None], limit_s: float | None = None) -> None:
        """`answer` runs in another thread, and tells the user how long the stop may take.

        With `limit_s`, this process ends with status 130 that long after the first signal, or at
        the second one. Without it, the main thread has to end the process, and only a third signal
        ends it here.
        """
        self.num_signals = 0
        self._answer, self._limit_s = answer, limit_s
        self._handlers: dict[int, Any] = {}
        self._wakeup_fd = -1
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    @property
    def requested(self) -> bool:
        return self.num_signals > 0

    @property
    def repeated(self) -> bool:
        return self.num_signals > 1

    def __enter__(self) -> Self:
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        self._handlers = {number: signal.getsignal(number) for number in REQUESTS}
        self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self.take_signals()
        return self

    def take_signals(self) -> None:
        """Install our handlers. Call it again after a library may have replaced them."""
        for number in REQUESTS:
            signal.signal(number, _ignore)  # the interpreter writes them to the socket

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._wakeup_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._writer.close()  # this ends the thread

    def _listen(self) -> None:
        try:
            while number := self._reader.recv(1):
                if number[0] not in REQUESTS:
                    continue
                self.num_signals += 1
                if self.num_signals == 1:
                    self._reader.settimeout(self._limit_s)
                    with contextlib.suppress(OSError):  # the terminal may be gone
                        self._answer()
                elif self._limit_s is not None or self.num_signals > 2:
                    os._exit(ExitStatus.INTERRUPTED)
        except TimeoutError:
            os._exit(ExitStatus.INTERRUPTED)
        self._reader.close()


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
