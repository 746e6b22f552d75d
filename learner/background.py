"""Work beside training: one piece at a time, on a thread.

Owns the thread and the error of a failed piece, which `check` and `wait` raise in the main thread.
A piece that is dropped must notice `dropped` itself. Never imports torch. Driven by
`learner.publication`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

DROP_S = 5.0  # time that a dropped piece has to end, before the process ends without it


class Dropped(Exception):
    """The result of this work is no longer wanted."""


class Background:
    """At most one piece of work is under way, so that its memory is bounded. A context manager."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._dropped = threading.Event()

    def start(self, work: Callable[[], None]) -> None:
        """Do `work` on the thread, after the piece that is under way."""
        self.wait()
        self._thread = threading.Thread(
            target=self._run, args=(work,), name=self._name, daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the piece under way. Raises the error of a failed one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of a failed piece. Never waits."""
        if self._error is not None:
            raise self._error

    def go_on(self) -> None:
        """For the work itself: raise `Dropped` if its result is no longer wanted."""
        if self._dropped.is_set():
            raise Dropped

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Dropped:
            return
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Drop the piece under way, and give it `DROP_S` to end."""
        self._dropped.set()
        if self._thread is not None:
            self._thread.join(DROP_S)
