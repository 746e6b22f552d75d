"""One rank's conversation with the buffer, over any number of connections.

Owns the link and the messages that are repeated after it broke. A step is requested, and reported
as trained, until the buffer has answered. The newest publication is repeated if the buffer missed
it. The learner's incarnation tells the buffer that it is the same process as before. Never trains.
Driven by `learner.train`.

    consumes       Shard, Acknowledged, Shutdown
    waits for      the buffer, as long as its heartbeat lasts; then `buffer.rejoin_timeout_s`
    unblocked by   enough finished groups, or a `Shutdown`
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self, TypeVar

from buffer.wire.client import LearnerLink, Refused
from buffer.wire.messages import (
    Acknowledged,
    LearnerHello,
    LearnerMessage,
    Leaving,
    Published,
    Pull,
    Shard,
    Shutdown,
    SnapshotRef,
    Trained,
    Work,
)
from buffer.wire.transport import TransportError
from configs.schema import Config
from learner import BufferLost, RunStopped

POLL_S = 1.0
RETRY_S = 0.5
BY_TOKENS = Work()
AnswerT = TypeVar("AnswerT", bound=Shard | Acknowledged)


class RunEnded(Exception):
    """The buffer says that the run ended well."""


class BufferSession:
    """A rank's session with the buffer, as a context manager.

    `incarnation` is shared by the ranks of one learner and unique to it. A single rank that waits
    raises `RunStopped` once `stop_requested()` is true. Several ranks are stopped by the process
    that started them.
    """

    def __init__(
        self,
        config: Config,
        rank: int,
        num_ranks: int,
        incarnation: str,
        vocab_size: int,
        stop_requested: Callable[[], bool] = lambda: False,
        work: Work = BY_TOKENS,
    ) -> None:
        self._stop_requested = stop_requested
        self._config, self._rank, self._num_ranks = config, rank, num_ranks
        self._incarnation, self._vocab_size = incarnation, vocab_size
        self._work = work
        self._step = 0
        self._published: Published | None = None
        self.link = LearnerLink(
            config.buffer.address,
            f"learner/{rank}",
            config.buffer.keys,
            config.buffer.peer_timeout_s,
        )

    def join(self, step: int) -> int:
        """Greet the buffer. Returns its policy version, -1 before any publication."""
        self._step = step
        return self._connect(self._config.buffer.connect_timeout_s)

    def pull(self, step: int) -> tuple[Shard, float]:
        """This rank's shard of `step`, and the seconds until it came."""
        started = time.monotonic()
        self._step = step
        shard = self._ask(Pull(rank=self._rank, step=step), Shard, step)
        return shard, time.monotonic() - started

    def announce(self, policy: SnapshotRef, seconds: float, probe: bytes) -> None:
        """Tell the buffer of a publication, with the probe's log-probabilities under it."""
        self._published = Published(policy=policy, seconds=seconds, probe=probe)
        try:
            self.link.send(self._published)
        except TransportError as error:
            self._reconnect(error)

    def trained(self, step: int, num_tokens: int, metrics: dict[str, float]) -> None:
        """Report a step trained on `num_tokens` tokens. Returns once the buffer has recorded it.

        A metric that is not finite, such as a ratio that overflowed, is left out of the records.
        """
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        report = Trained(step=step, num_tokens=num_tokens, metrics=finite)
        self._ask(report, Acknowledged, step)

    def wait_for_the_end(self) -> None:
        """Serve the last snapshot until the buffer ends the run.

        Raises `RunEnded` or `RunStopped`.
        """
        while True:
            try:
                self._receive(Shard, -1)
            except TransportError as error:
                self._reconnect(error)

    def leave(self) -> None:
        """Tell the buffer that this rank ends, so that it does not wait for its heartbeat."""
        with suppress(TransportError):  # then the buffer knows already, or is gone itself
            self.link.send(Leaving())

    def _ask(self, request: LearnerMessage, answer: type[AnswerT], step: int) -> AnswerT:
        """Send `request` until it is answered, however often the connection breaks."""
        while True:
            try:
                self.link.send(request)
                return self._receive(answer, step)
            except TransportError as error:
                self._reconnect(error)

    def _receive(self, answer: type[AnswerT], step: int) -> AnswerT:
        """The answer about `step`. Repeated answers about earlier steps are skipped."""
        while True:
            if self._num_ranks == 1 and self._stop_requested():
                raise RunStopped("the learner was asked to stop")
            message: Any = self.link.receive(POLL_S)
            if isinstance(message, Shutdown):
                if message.error:
                    raise RunStopped(f"the buffer stopped the run: {message.error}")
                raise RunEnded
            if isinstance(message, answer) and message.step == step:
                return message

    def _reconnect(self, lost: TransportError) -> None:
        """Wait for the buffer to come back, because the trained weights would be lost otherwise."""
        if isinstance(lost, Refused):
            raise lost
        limit_s = self._config.buffer.rejoin_timeout_s
        print(
            f"learner: {lost}; rank {self._rank} tries to join again for up to {limit_s:g} s",
            file=sys.stderr,
            flush=True,
        )
        deadline = time.monotonic() + limit_s
        while True:
            try:
                version = self._connect(max(1.0, min(10.0, deadline - time.monotonic())))
            except Refused:
                raise
            except TransportError as error:
                if time.monotonic() >= deadline or self._stop_requested():
                    raise BufferLost(str(error)) from error
                time.sleep(RETRY_S)
                continue
            if self._published is not None and version < self._published.policy.version:
                self.link.send(self._published)
            return

    def _connect(self, timeout_s: float) -> int:
        hello = LearnerHello(
            rank=self._rank,
            num_ranks=self._num_ranks,
            step=self._step,
            pid=os.getpid(),
            vocab_size=self._vocab_size,
            incarnation=self._incarnation,
            resumed=self._config.run.resume,
            take_over=self._config.learner.take_over,
            work=self._work,
        )
        return self.link.connect(hello, timeout_s).policy_version

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()
