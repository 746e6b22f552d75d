"""The commands of one run and the processes that execute them, on this machine or another host.

Owns how the launcher names processes, and measures their peak memory. Starting and ending them is
left to `buffer.processes`; this module never decides when they end. Driven by `tools.launch`, and
by `tools.launching.ray_cluster` on each node of a Ray cluster.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, Self

import psutil

from buffer.processes.child import Child
from buffer.processes.private_folder import private_folder
from buffer.wire.messages import Role as KeyRole
from configs.schema import Place

Role = Literal["buffer", "actors", "learner", "tracker"]
# The keys that a process holds. A tracker needs none, since it only reads files.
KEY_ROLES: dict[Role, KeyRole] = {"buffer": "buffer", "actors": "engine", "learner": "learner"}
CONFIG = "{config}"  # in a command: the file that holds the run's configuration
SMALL_BYTES = 30 << 20  # helpers of the Python runtime, which are not worth a line


@dataclass(frozen=True)
class Command:
    """A process to start. `arguments` follow the interpreter and may contain `CONFIG`."""

    role: Role
    name: str
    arguments: tuple[str, ...]
    num_gpus: float = 0
    place: Place = field(default_factory=Place)  # on a cluster
    environment: Mapping[str, str] = field(default_factory=dict)


class Process(Protocol):
    """A started command on any host. None of these methods waits for it to end."""

    name: str
    last_lines: deque[str]

    @property
    def where(self) -> str:
        """For the user, such as "pid 4711"."""
        ...

    def lines(self) -> list[str]:
        """The lines that it has printed since the last call."""
        ...

    def status(self) -> int | None:
        """None while it runs, then its exit status, which is negative after a signal."""
        ...

    def how_it_ended(self) -> str:
        """Completes a sentence about the process. Call it only after the process has ended."""
        ...

    def peaks(self) -> dict[str, int]:
        """Peak resident bytes so far of the process and its descendants, by label."""
        ...

    def terminate(self) -> None: ...
    def kill(self) -> None:
        """Kill the process and all of its descendants at once."""
        ...


class LocalHost:
    """Starts processes on this machine. They share one configuration file, removed at the end."""

    def __init__(self, config_yaml: str, grace_s: float) -> None:
        """`grace_s` has the meaning that it has for `private_folder`."""
        self._config_yaml, self._grace_s = config_yaml, grace_s
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        folder = self._exit.enter_context(private_folder(self._grace_s))
        self._config = Path(tempfile.mkdtemp(dir=folder)) / "config.yaml"
        self._config.write_text(self._config_yaml)
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def start(self, command: Command) -> LocalProcess:
        """Call this from a thread that lives as long as the run, as `Child` requires."""
        filled = [argument.replace(CONFIG, str(self._config)) for argument in command.arguments]
        return LocalProcess(command.name, [sys.executable, *filled], command.environment)


class LocalProcess(Child):
    """A child process whose memory is measured."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        super().__init__(name, command, environment)
        self._peaks: dict[tuple[int, str], int] = {}

    def peaks(self) -> dict[str, int]:
        if self.status() is None:
            self._measure()
        peaks: dict[str, int] = {}
        for (_, label), peak in self._peaks.items():
            # Of several with one label, such as a restarted engine, the largest counts.
            peaks[label] = max(peak, peaks.get(label, 0))
        return peaks

    def _measure(self) -> None:
        try:
            own = psutil.Process(self.pid)
            tree = [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in tree:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                label = self.name if process == own else self._label(process)
            except (OSError, psutil.Error):
                continue  # the process has just ended
            high_water = re.search(r"VmHWM:\s+(\d+) kB", status)
            if high_water and int(high_water[1]) * 1024 > SMALL_BYTES:
                self._peaks[process.pid, label] = int(high_water[1]) * 1024

    def _label(self, descendant: psutil.Process) -> str:
        """A name for a descendant that a user understands."""
        line = " ".join([descendant.name(), *descendant.cmdline()])
        parts = {
            "VLLM::EngineCore": "engine core",
            "VLLM::Worker": "engine worker",
            "actors.": "engine front end",
            "learner": "rank",
        }
        part = next((part for sign, part in parts.items() if sign in line), "helper")
        return f"{self.name} {part}"
