"""Supervises the processes of one run: detects failures, restarts processes, ends all of them.

Owns this life cycle on any host. Communicates with processes only through signals, and decides
nothing about training. Driven by `tools.launch`, in one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from buffer.processes.child import given_reason, may_succeed_again
from buffer.processes.restarts import Restarts
from buffer.processes.stop_request import StopRequest
from buffer.wire.client import MonitorLink
from buffer.wire.messages import LiveState
from configs.schema import Config
from tools.launching.processes import Command, Process, Role
from tools.launching.progress import View, stopping

POLL_S = 0.1
MEASURE_S = 1.0
LEAVE_S = 20.0  # for the other processes to end by themselves once the buffer has ended the run
SETTLE_S = 20.0  # for the buffer, which may be stopped, to end the run once others have ended well


class Host(Protocol):
    """Starts processes: `LocalHost`, or `tools.launching.ray_cluster.RayCluster`."""

    def start(self, command: Command) -> Process: ...


@dataclass(frozen=True)
class RestartRule:
    """Whether a process that was killed is restarted, and with which overrides."""

    allowed: bool
    overrides: tuple[str, ...] = ()


RESTART_RULES: dict[Role, RestartRule] = {
    # It continues from its logs; the engines and the learner join it again.
    "buffer": RestartRule(True, ("run.resume=true",)),
    "learner": RestartRule(True, ("run.resume=true",)),
    # This is the pool's own process, which restarts its engines itself.
    "actors": RestartRule(True),
    "tracker": RestartRule(True),  # it continues where it was, and the run does not need it
}


@dataclass
class Member:
    """A command of the run, and the process that currently executes it."""

    command: Command
    process: Process
    restarts: Restarts
    status: int | None = None
    ended_s: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.process.name} ({self.process.where})"

    def how_it_failed(self) -> str:
        reason = given_reason(self.process.last_lines)
        end = f"{self.name} {self.process.how_it_ended()}" + (f": {reason}" if reason else "")
        if may_succeed_again(self.status) and self.restarts.exhausted():
            limits = f"launch.max_restarts={self.restarts.most}"
            end += f"; it was restarted {limits} times within {self.restarts.window_s:g} s"
        return end


class Run:
    """The processes of one run. Call `start` and `watch`, and always `stop` at the end."""

    def __init__(self, config: Config, view: View, link: MonitorLink) -> None:
        self.members: list[Member] = []
        self.error = ""  # one line, set once the run cannot continue
        self.request = StopRequest(self._answer)  # to be entered before `start`
        self._config, self._view, self._link = config, view, link
        self._host: Host | None = None
        self._snapshot: LiveState | None = None
        self._measured_s = 0.0
        self._told_tracker = False

    @property
    def over(self) -> bool:
        """Whether the buffer has ended the run well."""
        return any(m.command.role == "buffer" and m.status == 0 for m in self.members)

    def start(self, host: Host, commands: Sequence[Command]) -> None:
        self._host = host
        self.request.take_signals()  # Ray may have installed its own handlers
        launch = self._config.launch
        for command in commands:
            if not self.request.requested:
                restarts = Restarts(launch.max_restarts, launch.restart_window_s)
                self.members.append(Member(command, host.start(command), restarts))

    def watch(self, verdict: Callable[[], str] = lambda: "") -> None:
        """Return once the run has ended, has failed (`error` is set), or a signal has arrived.

        In each turn `verdict` returns the reason why the run cannot continue, or "".
        """
        while not self.request.requested and not self.error:
            if snapshot := self._link.receive(POLL_S):
                self._snapshot = snapshot
                self._view.show(snapshot)
            self._listen()
            self._restart()
            self._end_tracker()
            self.error = self._verdict() or verdict()
            if not self._running() or self._ended_long_ago("buffer", LEAVE_S):
                return

    def stop(self) -> None:
        """End every process that still runs, within `run.stop_s`.

        The buffer is told first, because it lets the learner finish its step and tells the other
        processes. After a failure, or once the buffer has ended, all processes are told to end.
        At a second signal all of them are killed.
        """
        deadline = time.monotonic() + self._config.run.stop_s

        def wait(condition: Callable[[], bool]) -> None:
            while condition() and time.monotonic() < deadline and not self.request.repeated:
                self._listen()
                self._end_tracker()
                time.sleep(POLL_S)

        if not self.error:
            self._tell("buffer")
            wait(lambda: any(m.command.role == "buffer" for m in self._running()))
        self._tell("buffer", "actors", "learner")
        wait(lambda: bool(self._running()))
        if killed := self._running():
            for member in killed:
                member.process.kill()
            limit = f"after run.stop_s={self._config.run.stop_s:g} s"
            why = "as asked" if self.request.repeated else limit
            self._view.say(f"killed {', '.join(m.process.name for m in killed)} {why}")
        self._listen()

    def peaks(self) -> dict[str, int]:
        return {k: peak for member in self.members for k, peak in member.process.peaks().items()}

    def _answer(self) -> None:
        self._view.say(stopping(self._snapshot, self._config.run.stop_s))

    def _running(self) -> list[Member]:
        return [member for member in self.members if member.status is None]

    def _tell(self, *roles: Role) -> None:
        for member in self._running():
            if member.command.role in roles:
                member.process.terminate()

    def _end_tracker(self) -> None:
        """Have the tracker log the rest, once the buffer has ended. A failed one is only named."""
        if not self._told_tracker and not any(m.command.role == "buffer" for m in self._running()):
            self._told_tracker = True
            self._tell("tracker")

    def _listen(self) -> None:
        """Collect new output, exit statuses and peak memory."""
        now = time.monotonic()
        measure = now - self._measured_s >= MEASURE_S
        for member in self.members:
            if member.status is None:
                member.status = member.process.status()
                member.ended_s = now
            said = f"{member.command.role}: "
            for line in member.process.lines():
                if line.startswith(said):  # other lines are shown only if the process fails
                    self._view.say(f"{member.process.name} | {line.removeprefix(said)}")
            if measure:
                member.process.peaks()
        if measure:
            self._measured_s = now

    def _restart(self) -> None:
        """Restart the processes that were killed, as far as the rules allow."""
        assert self._host is not None
        for member in self.members:
            command = member.command
            allowed = RESTART_RULES[command.role].allowed
            if self.over or not (allowed and may_succeed_again(member.status)):
                continue
            if not (number := member.restarts.take()):
                continue
            overrides = self._overrides(command.role)
            with_overrides = f" with {' '.join(overrides)}" if overrides else ""
            self._view.say(
                f"{member.how_it_failed()}; restart {number} of {member.restarts.most}"
                + with_overrides
            )
            again = replace(command, arguments=(*command.arguments, *overrides))
            member.process, member.status = self._host.start(again), None

    def _overrides(self, role: Role) -> tuple[str, ...]:
        """A buffer resumes its run unless it was killed before it had made the run's folder."""
        run = self._config.run
        if role == "buffer" and not (Path(run.dir) / run.name / "config.yaml").exists():
            return ()
        return RESTART_RULES[role].overrides

    def _verdict(self) -> str:
        """The reason why the run cannot continue, or ""."""
        pools = [member for member in self.members if member.command.role == "actors"]
        culprits = [m for m in self.members if m.status and m.command.role in ("buffer", "learner")]
        if not self.over and all(pool.status is not None for pool in pools):
            culprits += [pool for pool in pools if pool.status]
        if culprits:
            culprit = min(culprits, key=lambda member: member.ended_s)
            lines = culprit.process.last_lines
            for line in lines if len(lines) > 1 else ():
                self._view.say(f"  {culprit.process.name} | {line}")
            return culprit.how_it_failed()
        if not self.over and (
            self._ended_long_ago("learner", SETTLE_S)
            or (all(p.status == 0 for p in pools) and self._ended_long_ago("actors", SETTLE_S))
        ):
            early = next(member for member in self.members if member.status == 0)
            return f"{early.name} ended before the run was over"
        return ""

    def _ended_long_ago(self, role: Role, grace_s: float) -> bool:
        """Whether a process of this role ended well more than `grace_s` ago."""
        return any(
            m.command.role == role and m.status == 0 and time.monotonic() - m.ended_s > grace_s
            for m in self.members
        )
