"""One rank's conversation with the buffer, over any number of connections.

Owns the link and the messages that are repeated after it broke. A step is requested, and reported
as trained, until the buffer has answered. The newest policy and its publication are repeated if the
buffer missed them. The learner's incarnation tells the buffer that it is the same process as
before. Never trains. Driven by `learner.train` and, beside it, by `learner.publication`.

    consumes       Shard, Acknowledged, Evaluated, Shutdown
    waits for      the buffer, as long as its heartbeat lasts; then `buffer.rejoin_timeout_s`
    unblocked by   enough finished groups, or a `Shutdown`
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import IntEnum
from typing import NoReturn, Self, TypeVar

from buffer.wire.client import LearnerLink, Refused
from buffer.wire.messages import (
    Acknowledged,
    Evaluated,
    LearnerCommand,
    LearnerHello,
    LearnerMessage,
    LearnerWelcome,
    Leaving,
    NewPolicy,
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
from learner import AskedToStop, BufferLost, RunStopped

POLL_S = 1.0
RETRY_S = 0.5
SHUTDOWN_S = 5.0  # for the `Shutdown` of this rank, once another one has had its own
BY_TOKENS = Work()
AnswerT = TypeVar("AnswerT", bound=Shard | Acknowledged)


class RunEnded(Exception):
    """The buffer says that the run ended well."""


class Standing(IntEnum):
    """How a rank stands while it pulls a step. The highest of any rank decides for all of them."""

    READY = 0  # it has its shard
    WAITING = 1
    ASKED_TO_STOP = 2
    SHUT_DOWN = 3  # the buffer has ended the run


class BufferSession:
    """A rank's session with the buffer, as a context manager.

    `incarnation` is shared by the ranks of one learner and unique to it. A run ends only in `pull`
    and in `wait_for_the_end`, because all ranks must end after the same step: `agree` returns the
    highest value that any rank gives it, and is a collective.
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
        agree: Callable[[int], int] = int,
    ) -> None:
        self._stop_requested, self._agree = stop_requested, agree
        self._config, self._rank, self._num_ranks = config, rank, num_ranks
        self._incarnation, self._vocab_size = incarnation, vocab_size
        self._work = work
        self._step = 0
        self._policy: NewPolicy | None = None
        self._published: Published | None = None
        self._checks: list[Callable[[], None]] = []
        self._evaluations: list[Evaluated] = []
        self._shutdown: Shutdown | None = None
        self.link = LearnerLink(
            config.buffer.address,
            f"learner/{rank}",
            config.buffer.keys,
            config.buffer.peer_timeout_s,
        )

    def join(self, step: int) -> int:
        """Greet the buffer. Returns its policy version, -1 before any publication.

        Raises `AskedToStop` if no buffer answers until a stop is requested.
        """
        self._step = step
        try:
            return self._connect(self._config.buffer.connect_timeout_s).policy_version
        except TransportError as error:
            if self._stop_requested() and not isinstance(error, Refused):
                self._end(Standing.ASKED_TO_STOP)
            raise

    def watch(self, check: Callable[[], None]) -> None:
        """Call `check` whenever this rank waits for the buffer. The session raises its errors."""
        self._checks.append(check)

    def portions(self, step: int) -> Iterator[tuple[Shard, float]]:
        """Pull every portion of `step`, each when the next one is taken. The last one says so."""
        portion, last = 0, False
        while not last:
            shard, waited_s = self.pull(step, portion)
            portion, last = portion + 1, shard.last
            yield shard, waited_s

    def pull(self, step: int, portion: int = 0) -> tuple[Shard, float]:
        """This rank's shard of a portion of `step`, and the seconds until every rank had its own.

        Raises `RunEnded` or `RunStopped` on every rank, once one of them is told to end.
        """
        started = time.monotonic()
        self._step = step
        request = Pull(rank=self._rank, step=step, portion=portion)
        self._go_on_together(ready=False)
        self._send(request)
        shard: Shard | None = None
        while not self._go_on_together(ready=shard is not None) or shard is None:
            # A rank that has its shard still notices that the buffer is lost, and joins it again.
            shard = self._answer(request, Shard, POLL_S if shard is None else 0.0) or shard
        return shard, time.monotonic() - started

    def count(self, version: int) -> None:
        """Tell the buffer that the weights are `version` from now on. `announce` follows."""
        self._policy = NewPolicy(version=version)
        try:
            self.link.send(self._policy)
        except TransportError as error:
            self._reconnect(error)  # this repeats it

    def announce(self, policy: SnapshotRef, seconds: float, probe: bytes) -> None:
        """Tell the buffer of a snapshot, with the probe's log-probabilities under its weights.

        May be called by any thread. If the connection is broken, the main thread repeats it.
        """
        self._published = Published(policy=policy, seconds=seconds, probe=probe)
        with suppress(TransportError):  # the main thread gets it as well, whenever it waits
            self.link.send(self._published)

    def trained(self, step: int, num_tokens: int, metrics: dict[str, float]) -> None:
        """Report a step trained on `num_tokens` tokens.

        Returns once the buffer has recorded it, or once this rank is told to end. A metric that is
        not finite, such as a ratio that overflowed, is left out of the records.
        """
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        report = Trained(step=step, num_tokens=num_tokens, metrics=finite)
        self._send(report)
        while self._standing(False) == Standing.WAITING:
            if self._answer(report, Acknowledged, POLL_S):
                return

    def take_evaluations(self) -> list[Evaluated]:
        """The results that came since the last call. Rank 0 gets them; some may come twice."""
        taken, self._evaluations = self._evaluations, []
        return taken

    def wait_for_the_end(self) -> None:
        """Serve the last snapshot until the buffer ends the run.

        Raises `RunEnded` or `RunStopped`.
        """
        while (standing := self._standing(False)) == Standing.WAITING:
            try:
                self._receive(POLL_S)
            except TransportError as error:
                self._reconnect(error)
        self._end(standing)

    def leave(self) -> None:
        """Tell the buffer that this rank ends, so that it does not wait for its heartbeat."""
        with suppress(TransportError):  # then the buffer knows already, or is gone itself
            self.link.send(Leaving())

    def _standing(self, ready: bool) -> Standing:
        for check in self._checks:
            check()
        if self._shutdown is not None:
            return Standing.SHUT_DOWN
        if self._stop_requested():
            return Standing.ASKED_TO_STOP
        return Standing.READY if ready else Standing.WAITING

    def _go_on_together(self, ready: bool) -> bool:
        """Whether every rank is ready. Raises on every rank if one of them is told to end."""
        standing = self._agree(self._standing(ready))
        if standing > Standing.WAITING:
            self._end(standing)
        return standing == Standing.READY

    def _end(self, standing: int) -> NoReturn:
        """Raise the exception for an end that some rank was told of."""
        if standing == Standing.ASKED_TO_STOP:
            raise AskedToStop("the learner was asked to stop")
        deadline = time.monotonic() + SHUTDOWN_S
        with suppress(TransportError):
            while self._shutdown is None and time.monotonic() < deadline:
                self._receive(POLL_S)
        if self._shutdown is None:
            raise RunStopped("the buffer stopped the run, as another rank was told")
        if self._shutdown.error:
            raise RunStopped(f"the buffer stopped the run: {self._shutdown.error}")
        raise RunEnded

    def _send(self, message: LearnerMessage) -> None:
        """Send `message`, again if the connection breaks."""
        while True:
            try:
                return self.link.send(message)
            except TransportError as error:
                self._reconnect(error)

    def _answer(
        self, request: Pull | Trained, answer: type[AnswerT], timeout_s: float
    ) -> AnswerT | None:
        """The answer to `request` if it comes in time. Other messages are skipped.

        The request is repeated after the connection has broken.
        """
        try:
            message = self._receive(timeout_s)
        except TransportError as error:
            self._reconnect(error)
            self._send(request)
            return None
        if not isinstance(message, answer) or message.step != request.step:
            return None
        if isinstance(message, Shard) and isinstance(request, Pull):
            return message if message.portion == request.portion else None
        return message

    def _receive(self, timeout_s: float) -> LearnerCommand | None:
        message = self.link.receive(timeout_s)
        if isinstance(message, Shutdown):
            self._shutdown = message
        elif isinstance(message, Evaluated):
            self._evaluations.append(message)
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
                welcome = self._connect(max(1.0, min(10.0, deadline - time.monotonic())))
            except Refused:
                raise
            except TransportError as error:
                if time.monotonic() >= deadline or self._stop_requested():
                    raise BufferLost(str(error)) from error
                time.sleep(RETRY_S)
                continue
            policy, published = self._policy, self._published
            if policy is not None and welcome.policy_version < policy.version:
                self.link.send(policy)
            if (
                published is not None
                and policy is not None
                and welcome.offered_version < published.policy.version == policy.version
            ):
                self.link.send(published)  # an older one gives way to the one that follows
            return

    def _connect(self, timeout_s: float) -> LearnerWelcome:
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
        welcome = self.link.connect(hello, timeout_s, self._stop_requested)
        if welcome.evaluated is not None:
            self._evaluations.append(welcome.evaluated)
        return welcome

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()
