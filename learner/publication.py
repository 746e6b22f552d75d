"""Publishes versions beside training, which waits only until the weights are copied.

A version is hashed and offered to the engines on a thread. At most one is under way, so that its
memory is bounded and engines get versions in order: a slow publication delays the next one. Owns
the measurements of publications. Driven by `learner.train`.

    the learner    copy ── train ────────────────── copy ── train ──
                     │                                │
    the thread       └── hash, write ── Published     └── ...
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from transformers import PreTrainedModel

from learner.background import Background
from learner.session import BufferSession
from learner.snapshots.publish import Finish, WeightPublisher


class Publication:
    """A context manager that drops a publication under way, as for a run that is stopped."""

    def __init__(self, publisher: WeightPublisher, session: BufferSession) -> None:
        self._publisher, self._session = publisher, session
        self._background = Background("publication")
        self._newest: dict[str, float] = {}  # measurements of the newest version that was offered
        self._waited_s, self._probe_s, self._since_s = 0.0, 0.0, time.monotonic()
        session.watch(self._background.check)

    def publish(self, model: PreTrainedModel, version: int, probe: Callable[[], bytes]) -> None:
        """Publish the weights as `version`. A collective, after which the weights may change.

        `probe` gives the probe's log-probabilities under them. Raises the error of an earlier
        publication that failed; `session` raises it as well.
        """
        started = time.monotonic()
        self._background.wait()
        finish = self._publisher.copy(model, version)
        copied = time.monotonic()
        logprobs = probe()
        if finish is not None:
            self._session.count(version)
            self._background.start(lambda: self._offer(finish, logprobs, started))
        self._waited_s += copied - started
        self._probe_s += time.monotonic() - copied

    def wait(self) -> None:
        """Wait until the newest version is offered, for the end of a run."""
        started = time.monotonic()
        self._background.wait()
        self._waited_s += time.monotonic() - started

    def take_metrics(self) -> dict[str, float]:
        """Seconds that training waited, for publications and for the probe, and bytes that engines
        got since the last call, and the newest offer.
        """
        now = time.monotonic()
        waited_s, probe_s, passed_s = self._waited_s, self._probe_s, now - self._since_s
        self._waited_s, self._probe_s, self._since_s = 0.0, 0.0, now
        return (
            {
                "publish/wait_s": waited_s,
                "publish/wait_frac": waited_s / max(1e-9, passed_s),
                "probe/wait_s": probe_s,
            }
            | self._publisher.take_metrics()
            | self._newest
        )

    def _offer(self, finish: Finish, logprobs: bytes, started: float) -> None:
        snapshot = finish(self._background.go_on)
        seconds = time.monotonic() - started
        self._newest = {"publish/seconds": seconds, "publish/bytes": float(snapshot.num_bytes)}
        if snapshot.delta_bytes:
            self._newest["publish/delta_bytes"] = float(snapshot.delta_bytes)
        self._session.announce(snapshot, seconds, logprobs)

    def __enter__(self) -> Self:
        self._background.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._background.__exit__(*error)
