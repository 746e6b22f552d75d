"""The processes of one run on one machine: started, listened to, measured, and ended for certain.

Owns the life and death of child processes, `guarded` that of the launcher itself. Knows nothing of what they do, and never decides when
they end. Driven by `tools.launch`, and on each node of a Ray cluster by `tools.launching.ray_cluster`.

No orphan survives, whoever is killed by whatever: each child is told when the launcher dies (PR_SET_PDEATHSIG); the guard adopts what its
descendants leave behind (PR_SET_CHILD_SUBREAPER) and ends it.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import psutil

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "{config}"  # in a command: the file that holds the run's configuration
MAX_LINE_CHARS = 2000
LAST_LINES_S = 0.5  # for the output of a process that has ended to arrive
ADOPTED_GRACE_S = 10.0  # for what a killed launcher left behind, which was told to end
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None)  # loaded before any fork

SMALL_BYTES = 30 << 20  # helpers of the Python runtime, which nobody asks for


@dataclass(frozen=True)
class Command:
    """A process to start: `arguments` follow the interpreter, and may hold `CONFIG`."""

    name: str
    arguments: tuple[str, ...]
    num_gpus: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)


class Process(Protocol):
    """A started command, wherever it runs. None of these waits for it."""

    name: str
    where: str  # "pid 4711", for the user

    def lines(self) -> list[str]:
        """What it printed since the last call."""
        ...

    def status(self) -> int | None:
        """None while it runs, then its exit status, negative for a signal."""
        ...

    def peaks(self) -> dict[str, int]:
        """Peak resident bytes of it and each of its descendants so far, by what they are."""
        ...

    def terminate(self) -> None: ...
    def kill(self) -> None:
        """It, and everything that it started."""
        ...


class LocalHost:
    """Starts processes on this machine. They share one configuration file, outside the run's directory, gone after `close`."""

    def __init__(self, config_yaml: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="launch-")
        self._config = Path(self._folder.name) / "config.yaml"
        self._config.write_text(config_yaml)

    def start(self, command: Command) -> LocalProcess:
        """Call it from a thread that lives as long as the run: the kernel ends the child with the thread that started it."""
        return LocalProcess(
            command, [argument.replace(CONFIG, str(self._config)) for argument in command.arguments]
        )

    def close(self) -> None:
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class LocalProcess:
    """A child in its own session, so that a Ctrl-C of the terminal reaches the launcher alone."""

    def __init__(self, command: Command, arguments: list[str]) -> None:
        self.name = command.name
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._popen = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **command.environment},
            preexec_fn=die_with(os.getpid(), signal.SIGTERM),
        )
        self.where = f"pid {self._popen.pid}"
        self._psutil = psutil.Process(self._popen.pid)
        self._lines: deque[str] = deque()
        self._peaks: dict[tuple[int, str], int] = {}
        self._reader = threading.Thread(
            target=self._read, name=f"output of {command.name}", daemon=True
        )
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            # A progress bar redraws itself with carriage returns: its last state is what counts.
            text = line.decode(errors="replace").rstrip().rpartition("\r")[2]
            if text:
                self._lines.append(text[:MAX_LINE_CHARS])

    def lines(self) -> list[str]:
        if self._popen.poll() is not None:
            self._reader.join(LAST_LINES_S)  # longer only while a descendant holds the pipe
        return [self._lines.popleft() for _ in range(len(self._lines))]

    def status(self) -> int | None:
        return self._popen.poll()

    def peaks(self) -> dict[str, int]:
        if self._popen.poll() is None:
            for process in self._tree():
                self._note_peak(process)
        peaks: dict[str, int] = {}
        for (
            _,
            label,
        ), peak in self._peaks.items():  # of several alike, a restarted engine say, the largest
            peaks[label] = max(peak, peaks.get(label, 0))
        return peaks

    def _note_peak(self, process: psutil.Process) -> None:
        try:
            high_water = re.search(
                r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text()
            )
            label = (
                self.name
                if process == self._psutil
                else what_is(process.name(), process.cmdline(), self.name)
            )
        except (OSError, psutil.Error):
            return  # it ended just now
        if high_water and int(high_water[1]) * 1024 > SMALL_BYTES:
            self._peaks[process.pid, label] = int(high_water[1]) * 1024

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._psutil, *self._psutil.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def terminate(self) -> None:
        self._popen.terminate()

    def kill(self) -> None:
        for process in self._tree():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


def what_is(title: str, arguments: list[str], root: str) -> str:
    """A descendant in the user's words."""
    line = " ".join([title, *arguments])
    parts = {
        "VLLM::EngineCore": "engine core",
        "VLLM::Worker": "engine worker",
        "actors.": "engine front end",
        "learner": "rank",
    }
    return f"{root} {next((part for sign, part in parts.items() if sign in line), 'helper')}"


# Nothing outlives the launcher ---------------------------------------------------------------------------------------


def die_with(parent: int, number: int) -> Callable[[], None]:
    """To be called in a new child: the kernel sends it signal `number` when the thread that started it ends."""

    def arm() -> None:
        signal.pthread_sigmask(
            signal.SIG_SETMASK, ()
        )  # whoever started it may have blocked signals
        LIBC.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it ended before we could ask
            os._exit(1)

    return arm


def guarded(run: Callable[[], int]) -> int:
    """`run()` in a child; afterwards, however that ended, nothing that it started is left. Returns its exit status.

    The child is in a session of its own and gets the signals that arrive here. Killing the guard ends the child in good order; killing the
    child lets the guard clean up. Call it before any thread is started.
    """
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    signal.pthread_sigmask(
        signal.SIG_BLOCK, numbers
    )  # what arrives before both sides are ready must not be lost
    child = os.fork()
    if child == 0:
        os.setsid()
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != guard:
            os._exit(1)
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)  # for the case that the guard is the one killed
        try:
            sys.exit(run())  # `run` unblocks the signals once it handles them
        finally:
            _end_adopted()
    for number in numbers:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)  # nobody is left to be told
    _end_adopted()
    if status < 0:
        print(
            f"error: the launcher was killed by {signal.Signals(-status).name}; everything that it started has ended",
            file=sys.stderr,
        )
        return 128 - status
    return status


def _end_adopted() -> None:
    """Wait for what was left behind, which knows that it must end; kill what does not."""
    deadline = time.monotonic() + ADOPTED_GRACE_S
    while left := psutil.Process().children(recursive=True):
        if time.monotonic() >= deadline:
            for process in left:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        time.sleep(0.05)
