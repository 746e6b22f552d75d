"""A command of the run inside Ray actors, from the wait for its place to its end.

Owns the conversation with these actors, and writes all of their output to a file. A call to an
actor never blocks the launcher. Never chooses a place. Driven by `tools.launching.ray_cluster`.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, RayActorError

from buffer.processes.child import ERROR, NUM_LAST_LINES, in_words, may_succeed_again
from configs.errors import ExitStatus, one_line
from tools.launching.placement import group_variables
from tools.launching.processes import Command, LocalHost

CALL_S = 15.0  # after this, an actor that does not answer counts as dead
SETTLE_S = 30.0  # for Ray to notice which node of a learner was lost
WAIT_S = 5.0  # a process that has no place yet says after this time what it waits for


@dataclass
class Poll:
    """The state of a process. `lines` is its output since the last poll."""

    status: int | None
    how_it_ended: str
    lines: list[str]
    peaks: dict[str, int]


class Runner:
    """Runs one command on its node, inside a Ray actor."""

    def __init__(self) -> None:
        # Ray sets this to 1, which would confine the learner to one core.
        os.environ.pop("OMP_NUM_THREADS", None)

    def rendezvous(self) -> tuple[str, int]:
        """This node's address, and a port of it that is free."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(
        self,
        command: Command,
        config_yaml: str,
        grace_s: float,
        keys: Mapping[str, bytes],
        node: int,
        first: tuple[str, int],
    ) -> str:
        """Start the command with the files of its keys, and return where it runs."""
        self._host = LocalHost(config_yaml, grace_s).__enter__()
        if keys:
            folder = Path(tempfile.mkdtemp())  # only this user can read it
            for name, content in keys.items():
                (folder / name).write_bytes(content)
                (folder / name).chmod(0o600)
            command = replace(command, arguments=(*command.arguments, f"buffer.keys={folder}"))
        variables = group_variables(command.place, str(node), *first)
        command = replace(command, environment={**command.environment, **variables})
        self._process = self._host.start(command)
        return f"{self._process.where} on {ray.util.get_node_ip_address()}"

    def poll(self) -> Poll:
        """The status is read first, so that the lines are complete once the process has ended."""
        status = self._process.status()
        how = "" if status is None else self._process.how_it_ended()
        return Poll(status, how, self._process.lines(), self._process.peaks())

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._host.__exit__()


class RayProcess:
    """A command in its Ray actor, as the launcher sees it."""

    def __init__(
        self, command: Command, runner: Any, started: Any, log: Path, waits_for: Callable[[], str]
    ) -> None:
        """`started` is the result of `Runner.start` to come; until then `waits_for` says why."""
        self.name, self.where = command.name, "not placed"
        self.last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._role, self._runner, self._waits_for, self._log = (
            command.role, runner, waits_for, log
        )  # fmt: skip
        self._asked, self._asked_s = started, time.monotonic()
        self._look_s, self._said = self._asked_s + WAIT_S, ""
        self._is_placed = False
        self._status: int | None = None
        self._how_it_ended = ""
        self._lines: list[str] = []
        self._peaks: dict[str, int] = {}

    def status(self) -> int | None:
        if self._status is None:
            self._hear()
        return self._status

    def lines(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def how_it_ended(self) -> str:
        return self._how_it_ended

    def peaks(self) -> dict[str, int]:
        return self._peaks

    def terminate(self) -> None:
        if self._is_placed:
            self._runner.terminate.remote()
        elif self._status is None:
            self._end(ExitStatus.INTERRUPTED)

    def kill(self) -> None:
        if self._is_placed:
            try:
                ray.get(self._runner.kill.remote(), timeout=CALL_S)
            except (RayActorError, GetTimeoutError) as error:
                self._say([f"{self._role}: {one_line(error)}"])
        if self._status is None:
            self._end(-signal.SIGKILL)

    def _hear(self) -> None:
        """Take the actor's answer if there is one, and ask again."""
        now = time.monotonic()
        if not ray.wait([self._asked], timeout=0)[0]:
            if self._is_placed and now > self._asked_s + CALL_S:
                self._lose("does not answer")
            elif not self._is_placed and now > self._look_s:
                self._look_s = now + WAIT_S
                self._say_waiting()
            return
        try:
            answer: str | Poll = ray.get(self._asked)
        except (RayActorError, ActorUnschedulableError) as error:
            # The kernel has killed its process as well.
            self._lose(f"died: {one_line(error)}")
            return
        if isinstance(answer, str):
            self.where, self._is_placed = answer, True
        else:
            self._peaks = answer.peaks
            self._say(answer.lines)
            if answer.status is not None:
                self._end(answer.status, answer.how_it_ended)
                return
        self._asked, self._asked_s = self._runner.poll.remote(), now

    def _say_waiting(self) -> None:
        line = f"{self._role}: waits for {self._waits_for()}"
        if line != self._said:
            self._said = line
            self._say([line])

    def _lose(self, what: str) -> None:
        self._say([f"{ERROR}its Ray actor {what}"])
        self._end(-signal.SIGKILL)

    def _end(self, status: int, how: str = "") -> None:
        self._status, self._how_it_ended = status, how or in_words(status)
        ray.kill(self._runner)

    def _say(self, lines: Sequence[str]) -> None:
        self._lines += lines
        self.last_lines += lines
        if lines:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a") as file:
                file.writelines(f"{line}\n" for line in lines)


class RayGroup:
    """A command on several nodes. It runs until all of them have ended, or one has failed."""

    def __init__(self, name: str, parts: Sequence[RayProcess]) -> None:
        self.name, self._parts = name, parts
        self.last_lines = parts[0].last_lines
        self._culprit = parts[0]
        self._failed_s = 0.0
        self._status: int | None = None

    @property
    def where(self) -> str:
        return ", ".join(part.where for part in self._parts)

    def lines(self) -> list[str]:
        return [line for part in self._parts for line in part.lines()]

    def status(self) -> int | None:
        """After a failure, the status of a part that was killed, if there is one: it is the cause.

        The other parts then fail as if the fault were theirs, often before Ray notices the loss.
        """
        if self._status is not None:
            return self._status
        statuses = [part.status() for part in self._parts]
        if not any(statuses):
            return None if None in statuses else 0
        self._failed_s = self._failed_s or time.monotonic()
        failed = [part for part in self._parts if part.status()]
        lost = next((part for part in failed if may_succeed_again(part.status())), None)
        settling = None in statuses and time.monotonic() < self._failed_s + SETTLE_S
        if lost is None and settling:
            return None
        self._culprit = lost or failed[0]
        self.last_lines = self._culprit.last_lines
        for part in self._parts:
            if part.status() is None:
                part.kill()
        self._status = self._culprit.status()
        return self._status

    def how_it_ended(self) -> str:
        return self._culprit.how_it_ended()

    def peaks(self) -> dict[str, int]:
        peaks: dict[str, int] = {}
        for part in self._parts:
            for label, peak in part.peaks().items():
                peaks[label] = max(peak, peaks.get(label, 0))
        return peaks

    def terminate(self) -> None:
        for part in self._parts:
            part.terminate()

    def kill(self) -> None:
        for part in self._parts:
            part.kill()
