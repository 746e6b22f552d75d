"""The load of one engine's verifier, for the engine's report: times, failures and the queue.

Counts the verifications that ended since the last report, and keeps the longest one that succeeded,
from which the deadline follows. Safe to use from the verifying threads.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from buffer.wire.messages import VerifierReport

PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Step:
    """The answer to one response.

    observation: text before the next response, None if the rollout has ended.
    state: the environment after it, for the next step; only its own process reads it.
    """

    reward: float
    observation: str | None = None
    state: str = ""


class VerifierFailure(Exception):
    """A verifier gave no reward. Cause and remedy, as the rest of a sentence about it."""


class VerifierTimeout(VerifierFailure):
    """A verification exceeded its deadline (`VerifierLoad.deadline_s`)."""


class VerifierLoad:
    """`num_workers`: how many responses are verified at the same time."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._lock = threading.Lock()
        self._longest_rewarded_s = 0.0
        self._clear()

    def deadline_s(self, least_s: float) -> float:
        """`least_s`, or `PATIENCE` times the longest verification that gave a reward if longer."""
        with self._lock:
            return max(least_s, PATIENCE * self._longest_rewarded_s)

    def rewarded(self, time_s: float) -> None:
        """A verification that took `time_s` gave a reward."""
        with self._lock:
            self._longest_rewarded_s = max(self._longest_rewarded_s, time_s)

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
