"""The load of one engine's verifier, for the engine's report: times, failures and the queue.

Counts the verifications that ended since the last report. Safe to use from the verifying threads.
"""

from __future__ import annotations

import threading

from buffer.wire.messages import VerifierReport


class VerifierFailure(Exception):
    """A verifier gave no reward. Cause and remedy, as the rest of a sentence about it."""


class VerifierTimeout(VerifierFailure):
    """A verification exceeded its deadline, `data.verifier_timeout_s`."""


class VerifierLoad:
    """`num_workers`: how many responses are verified at the same time."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._lock = threading.Lock()
        self._clear()

    def ended(self, queue_s: float, time_s: float, failure: VerifierFailure | None) -> None:
        """A verification took `time_s`, after it had waited `queue_s` for a worker."""
        with self._lock:
            self._num_verified += 1
            self._num_failed += failure is not None
            self._num_timeouts += isinstance(failure, VerifierTimeout)
            self._queue_s += queue_s
            self._time_s += time_s
            self._longest_s = max(self._longest_s, time_s)

    def take(self, num_waiting: int, num_busy: int) -> VerifierReport:
        """The report, with the present numbers of responses that wait and that are verified."""
        with self._lock:
            report = VerifierReport(
                num_workers=self.num_workers,
                num_waiting=num_waiting,
                num_busy=num_busy,
                num_verified=self._num_verified,
                num_failed=self._num_failed,
                num_timeouts=self._num_timeouts,
                queue_s=self._queue_s,
                time_s=self._time_s,
                longest_s=self._longest_s,
            )
            self._clear()
        return report

    def _clear(self) -> None:
        self._num_verified = self._num_failed = self._num_timeouts = 0
        self._queue_s = self._time_s = self._longest_s = 0.0
