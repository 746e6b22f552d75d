"""Removes the shared memory that killed processes leave in `/dev/shm`.

Examples are vLLM's message queues and the semaphores of multiprocessing. A name there does not
identify its owner, so the owner of each new file is looked up while it lives, by the file's inode:
a semaphore is opened under another name than the one it keeps. Never touches a name that no process
of this run was seen with, or that any process still holds. Driven by the janitor, which writes the
names to the run's private folder, in case it is killed as well.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from buffer.processes.descendants import all_pids, processes_of

FOLDER = Path("/dev/shm")
RECORD = "shared-memory"  # the file in the private folder, with one name per line
LOOKS = 8  # looks at a new name before it counts as another program's


class SharedMemory:
    """The names in `/dev/shm` of the processes of `folder`.

    Names that are there already may belong to them, too, since they may have started earlier.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._foreign: set[str] = set()
        self._unclaimed: dict[str, int] = {}  # name -> looks at it so far
        self._holders: dict[str, set[int]] = {}  # name of this run -> processes seen with it

    def look(self) -> None:
        """Find the holders of new names, and remove the names whose holders have all died.

        Call it often.
        """
        inodes = _inodes()
        self._foreign &= inodes.keys()
        if new := inodes.keys() - self._foreign - self._holders.keys():
            self._claim({name: inodes[name] for name in new})
        dead = [name for name, pids in self._holders.items() if not any(map(_lives, pids))]
        if dead:
            self._remove(dead)

    def _claim(self, new: dict[str, int]) -> None:
        for pid in processes_of(self._folder):
            held = _held(pid)
            for name in [name for name, inode in new.items() if inode in held]:
                self._holders.setdefault(name, set()).add(pid)
        self._record(new.keys() & self._holders.keys())
        unclaimed = new.keys() - self._holders.keys()
        self._unclaimed = {name: self._unclaimed.get(name, 0) + 1 for name in unclaimed}
        self._foreign |= {name for name, looks in self._unclaimed.items() if looks == LOOKS}

    def _record(self, names: set[str]) -> None:
        # On a full disk they are lost, which matters only if the janitor is killed.
        with suppress(OSError), (self._folder / RECORD).open("a") as file:
            file.writelines(f"{name}\n" for name in sorted(names))

    def _remove(self, names: list[str]) -> None:
        held, inodes = {pid: _held(pid) for pid in all_pids()}, _inodes()
        for name in names:
            holders = {pid for pid in held if inodes.get(name) in held[pid]}
            if holders:
                self._holders[name] = holders
            else:
                del self._holders[name]
                (FOLDER / name).unlink(missing_ok=True)


def remove_recorded(folder: Path) -> None:
    """Remove the names that a janitor recorded in `folder`, unless a process holds them."""
    record = folder / RECORD
    inodes, names = _inodes(), set(record.read_text().split()) if record.exists() else set[str]()
    left = names & inodes.keys()
    held = set[int]().union(*map(_held, all_pids())) if left else set[int]()
    for name in left:
        if inodes[name] not in held:
            (FOLDER / name).unlink(missing_ok=True)


def _inodes() -> dict[str, int]:
    """The files there that belong to this user, by name."""
    found: dict[str, int] = {}
    for name in os.listdir(FOLDER) if FOLDER.is_dir() else ():
        try:
            status = (FOLDER / name).lstat()
            if status.st_uid == os.getuid():
                found[name] = status.st_ino
        except FileNotFoundError:
            continue  # it was removed just now
    return found


def _held(pid: int) -> set[int]:
    """The inodes there that a process maps."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return set()  # it has ended, or belongs to another user
    return {int(inode) for inode in re.findall(rf" (\d+) +{FOLDER}/", maps)}


def _lives(pid: int) -> bool:
    """Whether it still runs: a dead process maps nothing."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as maps:
            return bool(maps.read(1))
    except OSError:
        return False
