"""Removes the shared memory that killed processes leave in `/dev/shm`.

Examples are vLLM's message queues and the semaphores of multiprocessing. A name there does not
identify its owner, so the owner of each new file is looked up while it lives. Never touches a name
that no process of this run was seen with, or that any process still holds. Driven by the janitor.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from buffer.processes.descendants import all_pids, processes_of

FOLDER = Path("/dev/shm")
LOOKS = 8  # looks at a new name before it counts as another program's


class SharedMemory:
    """The names in `/dev/shm` of the processes of `folder`, from now on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._foreign = _names()
        self._unclaimed: dict[str, int] = {}  # name -> looks at it so far
        self._holders: dict[str, set[int]] = {}  # name of this run -> processes seen with it

    def look(self) -> None:
        """Find the holders of new names, and remove the names whose holders have all died.

        Call it often.
        """
        names = _names()
        self._foreign &= names
        if new := names - self._foreign - self._holders.keys():
            self._claim(new)
        dead = [name for name, pids in self._holders.items() if not any(map(_lives, pids))]
        if dead:
            self._remove(dead)

    def _claim(self, new: set[str]) -> None:
        for pid in processes_of(self._folder):
            for name in _held(pid) & new:
                self._holders.setdefault(name, set()).add(pid)
        self._unclaimed = {n: self._unclaimed.get(n, 0) + 1 for n in new - self._holders.keys()}
        self._foreign |= {name for name, looks in self._unclaimed.items() if looks == LOOKS}

    def _remove(self, names: list[str]) -> None:
        held = {pid: _held(pid) for pid in all_pids()}
        for name in names:
            holders = {pid for pid in held if name in held[pid]}
            if holders:
                self._holders[name] = holders
            else:
                del self._holders[name]
                (FOLDER / name).unlink(missing_ok=True)


def _names() -> set[str]:
    """The files there that belong to this user."""
    found: set[str] = set()
    for name in os.listdir(FOLDER) if FOLDER.is_dir() else ():
        try:
            if (FOLDER / name).lstat().st_uid == os.getuid():
                found.add(name)
        except FileNotFoundError:
            continue  # it was removed just now
    return found


def _held(pid: int) -> set[str]:
    """The names that a process maps."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return set()  # it has ended, or belongs to another user
    return set(re.findall(rf" {FOLDER}/([^/\n]+)$", maps, re.MULTILINE))


def _lives(pid: int) -> bool:
    """Whether it still runs: a dead process maps nothing."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as maps:
            return bool(maps.read(1))
    except OSError:
        return False
