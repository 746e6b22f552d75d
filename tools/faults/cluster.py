"""The processes of one run on this machine, under the launcher's supervision and under faults.

Owns a buffer, a learner and fake engines, with each peer behind its own proxy, the disk of the
run's folder, and the time of each fault. `tools.launching.supervision` restarts the processes, as
in any run: inside this process, or in a launcher of its own, which can be a victim too and is
started again after a kill. A run that a full disk has ended is resumed once there is room. Driven
by `tools.chaos`.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from buffer.processes.child import given_reason, in_words
from buffer.processes.descendants import OWNER
from buffer.wire.client import MonitorLink
from buffer.wire.messages import LiveState
from buffer.wire.transport import next_port
from configs import cli
from configs.schema import Config
from tools.faults.host import Host
from tools.faults.launcher import Launch
from tools.faults.leftovers import Leftovers
from tools.faults.proxy import Proxy
from tools.faults.recount import read_history
from tools.faults.schedule import DISK, Fault
from tools.faults.small_disk import SmallDisk
from tools.faults.storm import Storm
from tools.faults.victims import LAUNCHER, LAUNCHER_MODULE, RANK, find
from tools.launching.processes import CONFIG, Command
from tools.launching.supervision import Run

BUFFER, LEARNER = "buffer", "learner"
POLL_S = 0.1
CLEAN_S = 20.0  # more than `run.stop_s`, for all that a killed launcher has started


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
    num_engines: int  # of each pool, if there are pools
    learner: str = "tools.faults.standin_learner"  # its module
    engine: str = "tools.faults.fake_engine"  # its module
    pool: str = "tools.faults.fake_pool"  # its module
    num_pools: int = 0  # 0: engines without a pool
    leftovers: Leftovers | None = None  # if there, the launcher is a process and a victim
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
            *(self._pool(index) for index in range(self.num_pools)),
            *(self._engine(index) for index in range(self.num_engines) if not self.num_pools),
        ]

    def targets(self) -> dict[str, str]:
        """Everything that a fault can hit, with its role."""
        targets: dict[str, str] = {command.name: command.role for command in self.commands()}
        if (num_ranks := self.config.learner.num_ranks) > 1:
            targets |= {f"{RANK} {rank}": RANK for rank in range(num_ranks)}
        for pool in range(self.num_pools):
            engines = range(self.num_engines)
            targets |= {f"{self._name(pool)}/{index}": "engine" for index in engines}
        return targets if self.leftovers is None else {**targets, LAUNCHER: LAUNCHER}

    def _engine(self, index: int) -> Command:
        return Command("actors", self._name(index), ("-m", self.engine, str(index), CONFIG))

    def _pool(self, index: int) -> Command:
        keys = f"actors.name={self._name(index)}", f"actors.num_engines={self.num_engines}"
        return Command("actors", self._name(index), ("-m", self.pool, "--config", CONFIG, *keys))

    def _name(self, index: int) -> str:
        actors = self.config.actors.name
        return f"{actors}-{index}" if self.num_pools else f"{actors}/{index}"

    def run(
        self,
        faults: Sequence[Fault],
        deadline_s: float,
        each_turn: Callable[[Run], str] = lambda _: "",
    ) -> str:
        """Run from start to end. Returns the reason why the run failed, or "".

        `each_turn` of the launcher's loop is given its run, and may return why that cannot go on.
        """
        deadline = time.monotonic() + deadline_s
        with ExitStack() as stack:
            ports = {BUFFER: self.port}
            for command in self.commands()[1:]:
                proxy = stack.enter_context(Proxy(free_port(), self.port))
                self.proxies[command.name], ports[command.name] = proxy, proxy.port
            disk = None
            if any(fault.target == DISK for fault in faults):
                disk = stack.enter_context(SmallDisk(Path(self.config.run.dir)))
            view = View(self.folder / "launcher.log")
            storm = Storm(faults, self.proxies, disk, partial(find, self.folder), view.say)
            while True:
                if self.leftovers is None:
                    error = self._conduct(view, ports, storm, deadline, each_turn)
                else:
                    error = self._launch(self.leftovers, view, ports, storm, deadline)
                if not error or disk is None or not disk.was_full:
                    return error
                view.say(f"the run ended while the disk was full: {error}")
                disk.reset()
                if found := self._resumable(error):
                    return found

    def _conduct(
        self,
        view: View,
        ports: Mapping[str, int],
        storm: Storm,
        deadline: float,
        each_turn: Callable[[Run], str],
    ) -> str:
        """Run until the run ends, once. Returns the reason why it failed, or ""."""

        def turn() -> str:
            storm.turn(view.step)
            return each_turn(run) or (states(run, view) if time.monotonic() > deadline else "")

        with (
            self._monitor() as link,
            (run := Run(self.config, view, link)).request,
            Host(self.config, self.folder, ports) as host,
        ):
            try:
                run.start(host, self.commands())
                run.watch(turn)
            finally:
                storm.end()
                run.stop()
        if run.request.requested:
            raise KeyboardInterrupt
        return run.error

    def _launch(
        self,
        leftovers: Leftovers,
        view: View,
        ports: Mapping[str, int],
        storm: Storm,
        deadline: float,
    ) -> str:
        """Run in a launcher's process, and in the next one after a kill, until the run ends.

        Returns the reason why it failed, or "".
        """
        while True:
            launcher = self._start_launcher(ports)
            try:
                with self._monitor() as link:
                    while launcher.poll() is None:
                        if time.monotonic() > deadline:
                            return f"{view.step} steps were taken when the deadline passed"
                        if snapshot := link.receive(POLL_S):
                            view.show(snapshot)
                        storm.turn(view.step)
            finally:
                if launcher.poll() is None:  # after a deadline or Ctrl-C
                    storm.end()
                    launcher.terminate()
                status = launcher.wait()
            if status == 0:
                storm.end()
                return ""
            if status != -signal.SIGKILL:
                storm.end()
                return self._why(status)
            view.say("the launcher was killed")
            if left := leftovers.found(CLEAN_S):
                return "after the launcher was killed, " + "; ".join(left)
            self.config.run.resume = (self.run_folder / "config.yaml").exists()

    def _monitor(self) -> MonitorLink:
        return MonitorLink(next_port(f"tcp://127.0.0.1:{self.port}"), self.config.buffer.keys)

    def _start_launcher(self, ports: Mapping[str, int]) -> subprocess.Popen[bytes]:
        """In no private folder, like a user's launcher."""
        file = self.folder / "launch.json"
        launch = Launch(cli.to_yaml(self.config), str(self.folder), dict(ports), self.commands())
        file.write_bytes(msgspec.json.encode(launch))
        environment = {name: text for name, text in os.environ.items() if name != OWNER}
        with (self.folder / "launcher.out").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", LAUNCHER_MODULE, str(file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )

    def _why(self, status: int) -> str:
        lines = (self.folder / "launcher.out").read_text(errors="replace").splitlines()
        return given_reason(lines) or f"the launcher {in_words(status)}"

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


def states(run: Run, view: View) -> str:
    """The state of each process at the deadline."""
    told = [f"{view.step} steps were taken when the deadline passed"]
    for member in run.members:
        state = "runs" if member.status is None else member.process.how_it_ended()
        last = member.process.last_lines[-1] if member.process.last_lines else "no output"
        told.append(f"{member.name} {state} ({last})")
    return "; ".join(told)


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
