"""One child process from its start to its end, with everything that it starts in turn.

Owns its output, its exit status and its temporary folder, and leaves nothing of it behind. Never
decides when it ends. Driven by `tools.launch`, by actor pools and by the learner's supervisor, from
the thread that started it.

The child leads a session of its own, so that Ctrl-C in the terminal reaches only its supervisor.
The kernel signals the child when its supervisor dies.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from buffer.processes.descendants import kill_processes_of, let_close, marks
from configs.errors import ExitStatus

ROOT = Path(__file__).resolve().parents[2]
LIBC = ctypes.CDLL(None)  # loaded before any fork
PR_SET_PDEATHSIG = 1
POLL_S = 0.05
NUM_LAST_LINES = 20
MAX_LINE_CHARS = 2000
REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # for an orderly stop
ERROR = "error: "  # starts the line in which a process of ours says why it failed


class Child:
    """A command that runs or has ended. Every method returns at once."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        death_signal: int = signal.SIGTERM,
    ) -> None:
        """Start the command. The kernel sends it `death_signal` when the calling thread ends.

        Call this from a thread that lives as long as the supervisor.
        """
        self.name = name
        self.last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._status: int | None = None
        self._incomplete = b""
        self._oom_kills = _oom_kills()
        self._folder = Path(tempfile.mkdtemp(prefix="darts-"))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **python_path(), **(environment or {}), **marks(self._folder)},
            preexec_fn=_signalled_with_parent(os.getpid(), death_signal),
        )
        self.pid = self._process.pid
        self.where = f"pid {self.pid}"
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def status(self) -> int | None:
        """None while it runs, then its exit status, which is negative for a signal.

        By then, nothing that it started is left.
        """
        if self._status is None and self._has_ended():
            self._clear()
        return self._status

    def lines(self) -> list[str]:
        """Its output since the last call. Once the pipe is full, the child waits for this call."""
        closed = self.status() is not None
        *complete, self._incomplete = (self._incomplete + self._read()).split(b"\n")
        if closed:
            complete, self._incomplete = [*complete, self._incomplete], b""
        # A progress bar redraws itself with carriage returns, so only its last state counts.
        texts = (line.decode(errors="replace").rstrip().rpartition("\r")[2] for line in complete)
        lines = [text[:MAX_LINE_CHARS] for text in texts if text]
        self.last_lines += lines
        return lines

    def how_it_ended(self) -> str:
        """A phrase such as "was killed by SIGKILL". Call it only after the end."""
        assert self._status is not None
        short_of_memory = self._status == -signal.SIGKILL and _oom_kills() > self._oom_kills
        hint = ", after the kernel killed a process for lack of memory (see `dmesg`)"
        return in_words(self._status) + (hint if short_of_memory else "")

    def terminate(self) -> None:
        """Ask it to end, with everything that it started."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now, with everything that it started."""
        if self._status is None:
            self._signal(signal.SIGKILL)
            self._clear()

    def _signal(self, number: int) -> None:
        """Send a signal unless its end is known. `Popen` would reap a child that has just ended."""
        if self._status is None:
            os.kill(self.pid, number)

    def _has_ended(self) -> bool:
        """Whether it ended. It stays a zombie, so that its process group can still be killed."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, options) is not None

    def _clear(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # the group held nothing but the child
        let_close(self._folder)
        kill_processes_of(self._folder)
        self._status = self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)  # the janitor tries again

    def _read(self) -> bytes:
        assert self._process.stdout is not None
        chunks: list[bytes] = []
        try:
            while chunk := os.read(self._process.stdout.fileno(), 1 << 16):
                chunks.append(chunk)
        except BlockingIOError:
            pass  # it is still open, but empty for now
        return b"".join(chunks)


def stop(
    children: Sequence[Child], limit_s: float, hurry: Callable[[], bool] = lambda: False
) -> list[Child]:
    """End all children that still run: ask, wait up to `limit_s` or until `hurry()`, then kill.

    Returns those that had to be killed.
    """
    for child in children:
        child.terminate()
    deadline = time.monotonic() + limit_s
    while (
        any(child.status() is None for child in children)
        and time.monotonic() < deadline
        and not hurry()
    ):
        for child in children:
            forward(child)
        time.sleep(POLL_S)
    killed = [child for child in children if child.status() is None]
    for child in killed:
        child.kill()
    for child in children:
        forward(child)
    return killed


def forward(child: Child) -> None:
    """Print its new output as ours, except for the line that says why it failed.

    Its supervisor reports that line.
    """
    show(child.lines())


def show(lines: Iterable[str]) -> None:
    """Print the output of a child, as `forward` does."""
    for line in lines:
        if not line.startswith(ERROR):
            print(line, file=sys.stderr, flush=True)


def given_reason(last_lines: Iterable[str]) -> str:
    """The reason for its failure that a process of ours gave in its last output, or ""."""
    reasons = [line.removeprefix(ERROR) for line in last_lines if line.startswith(ERROR)]
    return reasons[-1] if reasons else ""


def was_killed(status: int | None) -> bool:
    """Whether a signal ended it, other than a request to stop."""
    return status is not None and status < 0 and -status not in REQUESTS


def may_succeed_again(status: int | None) -> bool:
    """Whether a restart may help: it was killed, or it asks to be started again."""
    return status == ExitStatus.TRY_AGAIN or was_killed(status)


def in_words(status: int) -> str:
    """An exit status as the rest of a sentence about a process."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    if status == ExitStatus.INTERRUPTED:
        return f"was asked to stop from outside (exit status {status})"
    return f"ended with exit status {status}"


def python_path() -> dict[str, str]:
    """The environment of a Python process of this repository, started in any folder."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _signalled_with_parent(parent: int, number: int) -> Callable[[], None]:
    """A function to call in a new child, which asks the kernel for signal `number`.

    The kernel sends it when the thread that started the child ends.
    """

    def arm() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        LIBC.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # the parent ended before we could ask
            os._exit(1)

    return arm


def _oom_kills() -> int:
    """Number of processes that the kernel has killed for lack of memory; 0 if unknown."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
