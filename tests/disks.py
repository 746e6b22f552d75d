"""A disk in memory that can lose power. After a power cut it has everything that was synced, and
any part of the rest.

Names and contents are separate, as on a real disk: a synced file whose name was not synced may be
missing, and the bytes appended to a file since its last sync may be gone, cut anywhere, or zeroed
in any place.
"""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field
from pathlib import Path

from buffer.records.files import Disk


class PowerCutError(BaseException):
    """The machine stops here."""


@dataclass
class Inode:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


class MemoryDisk(Disk):
    """`fuse`: operations until the power is cut. `free_bytes`: room for appended bytes."""

    def __init__(self) -> None:
        self.files: dict[Path, Inode] = {}
        self.fuse: int | None = None
        self.free_bytes = 1 << 40
        self.num_syncs = 0
        self._durable_files: dict[Path, Inode] = {}
        self._pending: list[tuple[Path, Path | None]] = []  # renames and removals, not yet synced
        self._open: dict[int, Inode] = {}
        self._next_handle = 3

    def after_power_cut(self, rng: random.Random) -> MemoryDisk:
        """The disk as the next start finds it."""
        names = dict(self._durable_files)
        for path, inode in self.files.items():
            if path not in names and rng.random() < 0.5:
                names[path] = inode
        for source, target in self._pending:
            if rng.random() < 0.5:
                inode = names.pop(source, None)
                if target is not None and (inode := inode or self.files.get(target)) is not None:
                    names[target] = inode
        after = MemoryDisk()
        for path, inode in names.items():
            content = _surviving(inode, rng)
            after.files[path] = after._durable_files[path] = Inode(bytearray(content), content)
        return after

    def after_kill(self) -> MemoryDisk:
        """The disk as the next start finds it if only the process died."""
        after = MemoryDisk()
        after.files = {
            path: Inode(inode.data[:], inode.durable) for path, inode in self.files.items()
        }
        after._durable_files = {
            path: after.files[path] for path in self._durable_files if path in after.files
        }
        return after

    def names(self, folder: Path) -> list[str]:
        return [path.name for path in self.files if path.parent == folder]

    def read(self, path: Path) -> bytes:
        return bytes(self.files[path].data)

    def size(self, path: Path) -> int:
        return len(self.files[path].data)

    def make_folder(self, folder: Path) -> None:
        self._step()

    def create(self, path: Path, mode: int) -> int:
        self._step()
        assert path not in self.files
        self.files[path] = Inode()
        return self.open(path)

    def open(self, path: Path) -> int:
        self._next_handle += 1
        self._open[self._next_handle] = self.files[path]
        return self._next_handle

    def write(self, handle: int, data: bytes | memoryview) -> int:
        inode, size = self._open[handle], min(len(data), self.free_bytes)
        if self.fuse == 0:
            inode.data += bytes(data)[: len(data) // 2]
        self._step()
        if not size:
            raise OSError(errno.ENOSPC, "No space left on device")
        inode.data += bytes(data)[:size]
        self.free_bytes -= size
        return size

    def truncate(self, handle: int, size: int) -> None:
        self._step()
        inode = self._open[handle]
        self.free_bytes += len(inode.data) - size
        del inode.data[size:]

    def sync(self, handle: int) -> None:
        self._step()
        self.num_syncs += 1
        inode = self._open[handle]
        inode.durable = bytes(inode.data)

    def close(self, handle: int) -> None:
        del self._open[handle]

    def replace(self, source: Path, target: Path) -> None:
        self._step()
        self.files[target] = self.files.pop(source)
        self._pending.append((source, target))

    def remove(self, path: Path) -> None:
        self._step()
        inode = self.files.pop(path, None)
        if inode is not None:
            self.free_bytes += len(inode.data)
            self._pending.append((path, None))

    def sync_folder(self, folder: Path) -> None:
        self._step()
        self._pending.clear()
        self._durable_files = dict(self.files)

    def _step(self) -> None:
        if self.fuse is not None:
            if self.fuse == 0:
                raise PowerCutError
            self.fuse -= 1


def _surviving(inode: Inode, rng: random.Random) -> bytes:
    """All synced bytes, followed by a part, with holes, of those written later."""
    durable, data = inode.durable, bytes(inode.data)
    if len(data) <= len(durable):
        return rng.choice([durable, data])
    tail = bytearray(data[len(durable) : rng.randint(len(durable), len(data))])
    for _ in range(rng.choice([0, 0, 1, 2])):
        start = rng.randint(0, len(tail))
        end = rng.randint(start, len(tail))
        tail[start:end] = bytes(end - start)
    return durable + bytes(tail)
