"""The processes and temporary files that a run has left behind.

Compares the folders that only this run writes to, and the descendants of this process, with those
before the run. Removes nothing. Driven by `tools.chaos`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from buffer.processes.private_folder import adopt_orphans

LOOK_S = 0.1


class Leftovers:
    """Make it before the run starts."""

    def __init__(self, folders: Sequence[Path]) -> None:
        adopt_orphans()  # so that each process of the run is a descendant, whatever ends
        self._names = {folder: set(os.listdir(folder)) for folder in folders}
        self._pids = {process.pid for process in _descendants()}

    def found(self, limit_s: float = 0.0) -> list[str]:
        """One sentence for each process and file that is left after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while (left := self._look()) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        return left

    def _look(self) -> list[str]:
        left = [
            f"process {process.pid} was left ({name})"
            for process in _descendants()
            if process.pid not in self._pids and (name := _command(process))
        ]
        for folder, names in self._names.items():
            left += [f"{folder / name} was left" for name in sorted({*os.listdir(folder)} - names)]
        return left


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _command(process: psutil.Process) -> str:
    """Its command line, or "" if it has ended."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return " ".join(process.cmdline()) or process.name()
    except psutil.NoSuchProcess:
        return ""
