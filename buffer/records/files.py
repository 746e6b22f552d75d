"""Files that are whole or absent, however the process dies.

Owns atomic writes, the lock on a run's folder, and the few disk operations on which durability
depends (`Disk`), so that a test can stop between any two of them. Never decides the content of a
file. Used by every process of a run, so it imports nothing heavy.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Self

UNFINISHED = ".unfinished"  # suffix of files and folders that are still being written


class Disk:
    """The disk of this machine. Each method is a system call or a read, and may raise `OSError`."""

    def names(self, folder: Path) -> list[str]:
        return os.listdir(folder)

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.sync_folder(folder.parent)

    def create(self, path: Path, mode: int) -> int:
        """Create a file and open it for appending."""
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, mode)

    def open(self, path: Path) -> int:
        """Open an existing file for appending."""
        return os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, handle: int, data: bytes | memoryview) -> int:
        """Append as much of `data` as fits, and return its number of bytes."""
        return os.write(handle, data)

    def truncate(self, handle: int, size: int) -> None:
        os.ftruncate(handle, size)

    def sync(self, handle: int) -> None:
        """Make the file's content and size durable, so that they survive a power cut."""
        os.fdatasync(handle)

    def close(self, handle: int) -> None:
        os.close(handle)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        """Make the names in `folder` durable: created, renamed and removed files."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


DISK = Disk()


def write_all(disk: Disk, handle: int, data: bytes | bytearray) -> None:
    """Append all of `data`. If that fails (full disk), a part of it may have been written."""
    rest = memoryview(data)
    while rest:
        rest = rest[disk.write(handle, rest) :]


def atomic_write(
    path: Path,
    data: bytes | str,
    *,
    durable: bool = True,
    mode: int = 0o666,
    disk: Disk = DISK,
) -> None:
    """Write the file `path` so that a reader sees the old content or the new one, never a part.

    With `durable`, the new content also survives a power cut once this returns. `mode` is that of a
    new file before the umask, such as 0o600 for a secret. If it fails, the old content stays.
    """
    data = data.encode() if isinstance(data, str) else data
    unfinished = _unfinished(path)
    handle = disk.create(unfinished, mode)
    try:
        try:
            write_all(disk, handle, data)
            if durable:
                disk.sync(handle)
        finally:
            disk.close(handle)
        disk.replace(unfinished, path)
    except BaseException:
        disk.remove(unfinished)
        raise
    if durable:
        disk.sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """A folder to fill, which gets the name `path` if the block succeeds, and is removed if not."""
    unfinished = _unfinished(path)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        replace_folder(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`, durably and with its whole content.

    A folder that was there before is removed.
    """
    sync_tree(source)
    replaced = _unfinished(target)
    if target.exists():
        target.rename(replaced)
    source.rename(target)
    DISK.sync_folder(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def sync_tree(folder: Path) -> None:
    """Make everything below `folder` durable."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(place, name))
        DISK.sync_folder(Path(place))


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    handle = DISK.open(path)
    try:
        DISK.sync(handle)
    finally:
        DISK.close(handle)


def make_run_folder(folder: Path) -> None:
    """Make the folder of a run if it is not there. Raises `ValueError` if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "it may not be written"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise ValueError(
            f"run.dir={folder.parent}: the run's folder {folder} cannot be made there or written "
            f"({reason}); set run.dir to a folder on a disk with room that this user may write"
        )


class RunLock:
    """A lock that lets only one process at a time write a run's folder.

    It is held until `release`, or until the process ends in any way. Raises `ValueError`, which
    names the holder, if another process holds it. The file stays, since removing it would let two
    processes lock two files of one name.
    """

    def __init__(self, folder: Path, role: str = "buffer") -> None:
        self.path = folder / f"{role}.lock"
        make_run_folder(folder)
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._handle, 1000, 0).decode(errors="replace").strip()
            os.close(self._handle)
            raise ValueError(
                f"run directory {folder} is in use by another {role}: "
                f"{holder or 'it has just started'}. "
                "Two of them would corrupt its records; stop that process, or choose another "
                "run.name"
            ) from error
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        os.ftruncate(self._handle, 0)
        os.pwrite(
            self._handle,
            f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(),
            0,
        )

    def release(self) -> None:
        """Release the lock. May be called twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _unfinished(path: Path) -> Path:
    """A name beside `path` that no other writer of it uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
