"""Finds the living processes that belong to a supervisor, at any depth and in any session.

Each child is started with a folder of its own in its environment, which all of its descendants
inherit. The children of a descendant that supervises others get folders below it. Uses nothing but
`/proc`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

OWNER = "DARTS_PROCESS_FOLDER"
# Limit for a process that is stuck in the kernel, for instance because it writes to a dead disk.
KILL_S = 5.0
OPEN = "open-environments"  # name of the folders whose processes may still close what is in there
CLOSE_S = 5.0  # for that


def marks(folder: Path) -> dict[str, str]:
    """The environment by which a process and its descendants belong to `folder`."""
    # setproctitle, which vLLM and Ray use, would otherwise overwrite the environment that /proc
    # shows.
    return {OWNER: str(folder), "TMPDIR": str(folder), "SPT_NOENV": "1"}


def processes_of(folder: Path) -> list[int]:
    """Pids of the living processes of `folder` or of one below it, without the caller."""
    own = f"{OWNER}={folder}".encode()
    found: list[int] = []
    for pid in all_pids():
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended, or belongs to another user
        if pid != os.getpid() and any(v == own or v.startswith(own + b"/") for v in variables):
            found.append(pid)
    return found


def kill_processes_of(folder: Path) -> None:
    """Kill them all, including those that they start in the meantime."""
    deadline = time.monotonic() + KILL_S
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)


def let_close(folder: Path) -> None:
    """Wait for the processes of `folder` that close environments because their engine has ended."""
    deadline = time.monotonic() + CLOSE_S
    while time.monotonic() < deadline and _holds_open(folder) and processes_of(folder):
        time.sleep(0.02)


def _holds_open(folder: Path) -> bool:
    return any(files for path, _, files in os.walk(folder) if path.endswith(f"/{OPEN}"))


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
