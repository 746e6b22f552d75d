"""`python -m tools.launch [key=value ...]`: every process of one run, on this machine or on a Ray cluster.

    launcher ──starts──> buffer, actors (one or more pools), learner
             <──output, exit status── each          <──LiveState── buffer

    waits for      snapshots, output and ends, at most `POLL_S`
    unblocked by   the buffer's end (the run is over), a process that cannot go on, a signal

Owns the life cycle: checks before the start, one view while it goes, who is to blame, an end that leaves nothing behind, and the report.
Never speaks to a process but through signals, and decides nothing about training. Imports no torch, vLLM or Ray of its own.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

from buffer.wire.client import MonitorLink
from buffer.wire.transport import TransportError, next_port
from configs import cli
from configs.command import run_command
from configs.extras import import_extra
from configs.schema import Config
from tools.launching.processes import Command, LocalHost, Process, guarded
from tools.launching.progress import View, make_view
from tools.launching.run_plan import commands_of, prepare, share_gpus, visible_gpus
from tools.launching.summary import print_summary, resume_hint

POLL_S = 0.1
MEASURE_S = 1.0
FAREWELL_S = (
    20.0  # for the learner to end its step and save, once the buffer has been told to end the run
)
STOP_S = 12.0  # a pool gives its engines 8 seconds
LEAVE_S = 20.0  # for the others to end by themselves once the buffer has ended the run
SETTLE_S = 5.0  # for the buffer to end the run once the learner, or the last pool, has ended well
LAST_LINES = 20
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Host(Protocol):
    """Where processes are started: `LocalHost`, or `tools.launching.ray_cluster.RayCluster`."""

    def start(self, command: Command) -> Process: ...


@dataclass
class Child:
    """A process of the run, and what is remembered of it."""

    process: Process
    role: str  # buffer, learner or actors
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    status: int | None = None
    ended_s: float = 0.0

    @property
    def failed(self) -> bool:
        return bool(self.status)

    def end(self) -> str:
        """Who ended, and how."""
        assert self.status is not None
        if self.status < 0:
            how = f"was killed by {signal.Signals(-self.status).name}"
        elif self.status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            how = f"was stopped by a signal from outside (exit status {self.status})"
        else:
            how = f"ended with exit status {self.status}"
        return f"{self.process.name} ({self.process.where}) {how}"


class Run:
    """The processes of one run, from start to end. `watch`, then always `stop`."""

    def __init__(self, view: View, link: MonitorLink) -> None:
        self.children: list[Child] = []
        self.error = ""  # one line, once the run cannot go on
        self.signals: list[int] = []
        self._view, self._link = view, link
        self._measured_s = 0.0
        self._started_s = time.monotonic()
        self._take_signals()

    def _take_signals(self) -> None:
        for number in SIGNALS:
            signal.signal(number, lambda number, _: self.signals.append(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def start(self, host: Host, commands: Sequence[tuple[str, Command]]) -> None:
        self._take_signals()  # again: Ray takes them for itself
        for role, command in commands:
            if not self.signals:
                self.children.append(Child(host.start(command), role))

    def watch(self) -> None:
        """Until the run has ended, well or not (`error`), or a signal came (`signals`)."""
        while not self.signals and not self.error:
            if snapshot := self._link.receive(POLL_S):
                self._view.show(snapshot)
            self._listen()
            self.error = self._verdict()
            if all(child.status is not None for child in self.children) or self._overdue(
                LEAVE_S, "buffer"
            ):
                return

    def _verdict(self) -> str:
        """Why the run cannot go on, or ""."""
        pools = [child for child in self.children if child.role == "actors"]
        vital = [child for child in self.children if child.role != "actors"]
        over = any(child.role == "buffer" and child.status == 0 for child in self.children)
        culprits = [child for child in vital if child.failed]
        if not over and all(child.status is not None for child in pools):
            culprits += [child for child in pools if child.failed]
        if culprits:
            culprit = min(culprits, key=lambda child: child.ended_s)
            for line in culprit.last_lines if len(culprit.last_lines) > 1 else ():
                self._view.say(f"  {culprit.process.name} | {line}")
            said = next(
                (line for line in reversed(culprit.last_lines) if line.startswith("error: ")), ""
            )
            return culprit.end() + (f": {said.removeprefix('error: ')}" if said else "")
        if not over and (
            self._overdue(SETTLE_S, "learner")
            or (all(c.status == 0 for c in pools) and self._overdue(SETTLE_S, "actors"))
        ):
            who = next(child for child in self.children if child.status == 0)
            return f"{who.process.name} ({who.process.where}) ended before the run was over"
        return ""

    def _overdue(self, grace_s: float, role: str) -> bool:
        """Whether a process of that role ended well so long ago."""
        return any(
            c.role == role and c.status == 0 and time.monotonic() - c.ended_s > grace_s
            for c in self.children
        )

    def _listen(self) -> None:
        """Take in what the processes printed, how they ended and what they hold."""
        now = time.monotonic()
        measure = now - self._measured_s >= MEASURE_S
        for child in self.children:
            if child.status is None:
                child.status = child.process.status()
                child.ended_s = now
            for line in child.process.lines():
                child.last_lines.append(line)
                if line.startswith(
                    f"{child.role}: "
                ):  # what libraries print is shown only if the process fails
                    self._view.say(f"{child.process.name} | {line.removeprefix(f'{child.role}: ')}")
            if measure:
                child.process.peaks()
        if measure:
            self._measured_s = now

    def stop(self) -> None:
        """End what still runs. The buffer is told first: it ends the run, and the learner saves what it has learned. Who has not left
        after `FAREWELL_S` is told by signal, after `STOP_S` more, or at a second signal, killed."""
        num_signals = len(self.signals)
        if not self.error:
            self._end(
                [child for child in self.children if child.role == "buffer"],
                FAREWELL_S,
                num_signals,
            )
        self._end(self.children, STOP_S, num_signals)
        killed = [child for child in self.children if child.status is None]
        for child in killed:
            child.process.kill()
        self._listen()
        if killed:
            why = (
                "at once, as asked"
                if len(self.signals) > num_signals
                else f"still running after {STOP_S:g} s"
            )
            self._view.say(f"killed {', '.join(child.process.name for child in killed)}: {why}")

    def _end(self, told: Sequence[Child], limit_s: float, num_signals: int) -> None:
        """Tells `told` to end, and waits until nobody runs, `limit_s` have passed, or one more signal comes."""
        told = [child for child in told if child.status is None]
        for child in told:
            child.process.terminate()
        deadline = time.monotonic() + (limit_s if told else 0.0)
        while (
            any(child.status is None for child in self.children)
            and time.monotonic() < deadline
            and len(self.signals) == num_signals
        ):
            self._listen()
            time.sleep(POLL_S)

    def peaks(self) -> dict[str, int]:
        return {
            label: peak for child in self.children for label, peak in child.process.peaks().items()
        }


# The run -------------------------------------------------------------------------------------------------------------


def run_all(config: Config) -> int:
    """Start everything, watch it, end it, and tell how it went. Returns the exit status."""
    config = prepare(config)
    commands = commands_of(config)
    host: AbstractContextManager[Host]
    if config.launch.launcher == "ray":
        import_extra("ray", "launch.launcher=ray", "ray")
        from tools.launching.ray_cluster import RayCluster  # here: it takes seconds to import

        host = RayCluster(config, commands)
    else:
        host, commands = LocalHost(cli.to_yaml(config)), share_gpus(commands, visible_gpus())
    return conduct(config, host, commands)


def conduct(
    config: Config, host: AbstractContextManager[Host], commands: Sequence[tuple[str, Command]]
) -> int:
    """One run of `commands` from start to report."""
    started_s = time.monotonic()
    run_dir = Path(config.run.dir) / config.run.name
    view = make_view(config.launch.progress)
    with MonitorLink(next_port(config.buffer.address), config.buffer.keys) as link:
        run = Run(view, link)
        try:
            view.say(
                f"starting {', '.join(command.name for _, command in commands)}; the run's directory will be {run_dir}"
            )
            with host as entered:
                try:
                    run.start(entered, commands)
                    run.watch()
                finally:
                    run.stop()
        finally:
            view.close()
    if run.signals:
        print(f"interrupted: everything has ended. {resume_hint(run_dir)}")
        return 128 + run.signals[0]
    if run.error:
        print(
            f"error: {run.error}\nThe run stopped; everything has ended. {resume_hint(run_dir)}",
            file=sys.stderr,
        )
        return 1
    print_summary(run_dir, run.peaks(), time.monotonic() - started_s)
    return 0


def main() -> NoReturn:
    run_command(
        "Start a whole run (buffer, actors and learner), show its progress, end it cleanly and "
        "write its report.",
        lambda config: guarded(lambda: run_all(config)),
        schema=Config,
        errors=(TransportError,),
    )


if __name__ == "__main__":
    main()
