"""Finds the processes that a schedule of faults aims at, among the descendants of this process.

A process is known by its command line and its environment alone, so that one that the launcher or a
pool has restarted is found under the same name.
"""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from tools.faults.host import config_file

LAUNCHER, RANK = "launcher", "rank"
LAUNCHER_MODULE = "tools.faults.launcher"


def find(folder: Path, name: str) -> int | None:
    """The pid of a launcher, a rank ("rank 1"), an engine of a pool ("pool/0"), or a command.

    None if no such process runs.
    """
    found = [process for process in _processes() if _is(process, folder, name)]
    # A process that it has forked looks like itself and is younger.
    return min(found, key=lambda process: process.create_time()).pid if found else None


def _processes() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _is(process: psutil.Process, folder: Path, name: str) -> bool:
    try:
        line = process.cmdline()
        if name == LAUNCHER:
            return LAUNCHER_MODULE in line
        if rank := re.fullmatch(rf"{RANK} (\d+)", name):
            return "learner" in " ".join(line) and process.environ().get("RANK") == rank[1]
        pool, _, index = name.rpartition("/")
        if pool and not config_file(folder, name).exists():
            parent = process.parent()
            return (
                parent is not None
                and str(config_file(folder, pool)) in parent.cmdline()
                and line[-2:-1] == [index]
            )
        return str(config_file(folder, name)) in line
    except psutil.Error:
        return False  # it has ended
