"""The processes of one run on this machine, under the launcher's supervision and under faults.

Owns a buffer, a learner and fake engines, with each peer behind its own proxy, the disk of the
run's folder, and the time of each fault. `tools.launching.supervision` restarts the processes, as
in any run. A run that a full disk has ended is resumed once there is room. Driven by `tools.chaos`.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buffer.processes.private_folder import private_folder
from buffer.wire.client import MonitorLink
from buffer.wire.messages import LiveState
from buffer.wire.transport import next_port
from configs import cli
from configs.schema import Config
from tools.faults.proxy import Proxy
from tools.faults.recount import read_history
from tools.faults.schedule import BYTES_PER_S, DELAY_S, DISK, Fault
from tools.faults.small_disk import SmallDisk
from tools.launching.processes import CONFIG, Command, LocalProcess, Role
from tools.launching.supervision import Run

BUFFER, LEARNER = "buffer", "learner"
Action = Callable[[], Any]


class LoggedProcess(LocalProcess):
    """A child process whose entire output is kept."""

    log: Path

    def lines(self) -> list[str]:
        lines = super().lines()
        if lines:
            with self.log.open("a") as file:
                file.write("".join(f"{time.monotonic():.2f} {line}\n" for line in lines))
        return lines


@dataclass
class Host:
    """Gives each process the address of its own proxy, and a log in `folder`."""

    config: Config
    folder: Path
    ports: Mapping[str, int]

    def start(self, command: Command) -> LoggedProcess:
        name = command.name.replace("/", "-")
        config = deepcopy(self.config)
        config.buffer.address = f"tcp://127.0.0.1:{self.ports[command.name]}"
        file = self.folder / f"{name}.yaml"
        file.write_text(cli.to_yaml(config))
        arguments = [argument.replace(CONFIG, str(file)) for argument in command.arguments]
        process = LoggedProcess(command.name, [sys.executable, *arguments], command.environment)
        process.log = self.folder / f"{name}.log"
        return process


class View:
    """Records the launcher's lines and the number of steps taken."""

    def __init__(self, log: Path) -> None:
        self._log, self.step = log, 0

    def show(self, snapshot: LiveState) -> None:
        self.step = max(self.step, snapshot.step)

    def say(self, text: str) -> None:
        with self._log.open("a") as file:
            file.write(f"{time.monotonic():.2f} {text}\n")

    def close(self) -> None:
        """Does nothing, because nothing is shown."""


@dataclass
class Cluster:
    """`folder` holds logs and configuration files, and `run.dir` is the disk that can be full."""

    config: Config
    folder: Path
    num_engines: int
    learner: str = "tools.faults.standin_learner"  # its module
    engine: str = "tools.faults.fake_engine"  # its module
    proxies: dict[str, Proxy] = field(default_factory=dict)
    port: int = field(default_factory=lambda: free_port())  # the buffer's

    @property
    def run_folder(self) -> Path:
        return Path(self.config.run.dir) / self.config.run.name

    @property
    def record(self) -> Path:
        """The shards that the learner trained on."""
        return self.folder / "trained.jsonl"

    def commands(self) -> list[Command]:
        learner = ("-m", self.learner, str(self.record), "--config", CONFIG)
        one_thread = {"OMP_NUM_THREADS": "1"}
        return [
            Command("buffer", BUFFER, ("-m", "buffer", "--config", CONFIG)),
            Command("learner", LEARNER, learner, environment=one_thread),
            *(self._engine(index) for index in range(self.num_engines)),
        ]

    def targets(self) -> dict[str, Role]:
        return {command.name: command.role for command in self.commands()}

    def _engine(self, index: int) -> Command:
        command = ("-m", self.engine, str(index), CONFIG)
        return Command("actors", f"{self.config.actors.name}/{index}", command)

    def run(
        self,
        faults: Sequence[Fault],
        deadline_s: float,
        each_turn: Callable[[Run], str] = lambda _: "",
    ) -> str:
        """Run from start to end. Returns the reason why the run failed, or "".

        `each_turn` of the launcher's loop is given its run, and may return why that cannot go on.
        """
        with ExitStack() as stack:
            ports = {BUFFER: self.port}
            for name in list(self.targets())[1:]:
                self.proxies[name] = stack.enter_context(Proxy(free_port(), self.port))
                ports[name] = self.proxies[name].port
            disk = None
            if any(fault.target == DISK for fault in faults):
                disk = stack.enter_context(SmallDisk(Path(self.config.run.dir)))
            view = View(self.folder / "launcher.log")
            storm = Storm(view, self.proxies, disk, faults, time.monotonic() + deadline_s)
            while True:
                error = self._conduct(view, ports, storm, each_turn)
                if not error or disk is None or not disk.was_full:
                    return error
                view.say(f"the run ended while the disk was full: {error}")
                disk.reset()
                if found := self._resumable(error):
                    return found

    def _conduct(
        self, view: View, ports: Mapping[str, int], storm: Storm, each_turn: Callable[[Run], str]
    ) -> str:
        """Run until the run ends, once. Returns the reason why it failed, or ""."""
        with (
            MonitorLink(next_port(f"tcp://127.0.0.1:{self.port}")) as link,
            (run := Run(self.config, view, link)).request,
            private_folder(self.config.run.stop_s),
        ):
            try:
                run.start(Host(self.config, self.folder, ports), self.commands())
                run.watch(lambda: each_turn(run) or storm.turn(run))
            finally:
                storm.end(run)
                run.stop()
        if run.request.requested:
            raise KeyboardInterrupt
        return run.error

    def _resumable(self, error: str) -> str:
        """Have the next start resume a run that a full disk has ended.

        Returns the promise that its end has broken, or "".
        """
        if os.strerror(errno.ENOSPC) not in error or "\n" in error:
            return f"the disk was full, and the run ended without a line that says so: {error}"
        if differences := read_history(self.run_folder / "events").differences:
            return "after the disk was full, " + "; ".join(differences)
        self.config.run.resume = (self.run_folder / "config.yaml").exists()
        return ""


class Storm:
    """Applies the faults that are due, in each turn of the launcher's loop."""

    def __init__(
        self,
        view: View,
        proxies: Mapping[str, Proxy],
        disk: SmallDisk | None,
        faults: Sequence[Fault],
        deadline: float,
    ) -> None:
        self._view, self._proxies, self._disk, self._deadline = view, proxies, disk, deadline
        self._waiting = list(faults)
        self._due: list[tuple[float, Action]] = []
        self._run: Run

    def turn(self, run: Run) -> str:
        self._run = run
        now = time.monotonic()
        while self._waiting and self._waiting[0].step <= self._view.step:
            self._due += self._actions(self._waiting.pop(0), now)
        self._due.sort(key=lambda due: due[0])
        while self._due and self._due[0][0] <= now:
            self._due.pop(0)[1]()
        return self._states() if now > self._deadline else ""

    def end(self, run: Run) -> None:
        """End every fault that lasts, except that of the disk."""
        self._run = run
        self._due.clear()
        for proxy in self._proxies.values():
            proxy.shape()
        for member in run.members:
            self._signal(member.command.name, signal.SIGCONT)

    def _states(self) -> str:
        told = [f"{self._view.step} steps were taken when the deadline passed"]
        for member in self._run.members:
            state = "runs" if member.status is None else member.process.how_it_ended()
            last = member.process.last_lines[-1] if member.process.last_lines else "no output"
            told.append(f"{member.name} {state} ({last})")
        return "; ".join(told)

    def _signal(self, name: str, number: signal.Signals) -> None:
        member = next(m for m in self._run.members if m.command.name == name)
        process = member.process
        assert isinstance(process, LoggedProcess)
        if process.status() is None:
            self._view.say(f"{number.name} to {name}")
            os.kill(process.pid, number)

    def _actions(self, fault: Fault, now: float) -> list[tuple[float, Action]]:
        """The start of a fault, and its end `seconds` later."""
        target, at = fault.target, now + fault.delay_s
        over = at + fault.seconds
        if fault.kind == "kill":
            return [(at, lambda: self._signal(target, signal.SIGKILL))]
        if fault.kind == "stop":
            return [
                (at, lambda: self._signal(target, signal.SIGSTOP)),
                (over, lambda: self._signal(target, signal.SIGCONT)),
            ]
        say = (at, lambda: self._view.say(f"{fault}"))
        if fault.kind == "full":
            assert self._disk is not None
            return [say, (at, self._disk.fill), (over, self._disk.free)]
        proxy = self._proxies[target]
        begin: dict[str, Action] = {
            "reset": proxy.reset,
            "cut": lambda: proxy.cut(fault.seconds),
            "delay": lambda: proxy.shape(delay_s=DELAY_S),
            "slow": lambda: proxy.shape(bytes_per_s=BYTES_PER_S),
        }
        actions: list[tuple[float, Action]] = [say, (at, begin[fault.kind])]
        return [*actions, (over, proxy.shape)] if fault.kind in ("delay", "slow") else actions


def free_port() -> int:
    """A port that is free now and whose successor is free too, because the buffer uses both."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
