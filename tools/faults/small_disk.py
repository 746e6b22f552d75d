"""A small disk for a run's folder, which can be full: real writes get ENOSPC from the kernel.

The disk is a tmpfs whose size shrinks to its content and grows again. It is mounted in a mount
namespace of this process and its children, so that no other process sees it and nothing stays
mounted. That needs root, or a kernel that lets users make namespaces. Driven by `tools.chaos`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Self

INSIDE = "CHAOS_MOUNT_NAMESPACE"  # the pid of the process that is in its own namespace
SIZE_BYTES = 1 << 30
TRIES = 20


def why_not() -> str:
    """The reason why this machine allows no small disk, or ""."""
    if _is_inside():
        return ""
    try:
        tried = subprocess.run(
            [*_unshare(), "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except FileNotFoundError:
        return "the command `unshare` of util-linux is missing"
    return tried.stderr.strip() if tried.returncode else ""


def enter_namespace(module: str, arguments: list[str]) -> None:
    """Restart this process, which runs `module`, in a mount namespace of its own. Call it early.

    Returns if it is in one already.
    """
    if not _is_inside():
        os.environ[INSIDE] = str(os.getpid())  # which stays the same
        sys.stdout.flush()
        command = [*_unshare(), sys.executable, "-m", module, *arguments]
        os.execvp(command[0], command)


def _is_inside() -> bool:
    return os.environ.get(INSIDE) == str(os.getpid())


def _unshare() -> list[str]:
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", "--mount", *as_root]


class SmallDisk:
    """A disk of its own at `folder`, whose content stays there as usual files at the end."""

    def __init__(self, folder: Path) -> None:
        self.was_full = False  # since the last `reset`
        self._folder = folder

    def fill(self) -> None:
        """Leave no room for another page."""
        self.was_full = True
        for _ in range(TRIES):
            if self._resize(self._used_bytes()):
                return  # otherwise a file has grown in the meantime
        raise AssertionError(f"{self._folder} grows faster than it can be filled")

    def free(self) -> None:
        assert self._resize(SIZE_BYTES)

    def reset(self) -> None:
        self.free()
        self.was_full = False

    def __enter__(self) -> Self:
        self._folder.mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "none", str(self._folder))
        return self

    def __exit__(self, *_: object) -> None:
        kept = self._folder.with_name(f"{self._folder.name}.kept")
        shutil.copytree(self._folder, kept)
        _run("umount", "--lazy", str(self._folder))
        self._folder.rmdir()
        kept.rename(self._folder)

    def _used_bytes(self) -> int:
        stat = os.statvfs(self._folder)
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize

    def _resize(self, num_bytes: int) -> bool:
        size = max(num_bytes, os.sysconf("SC_PAGE_SIZE"))  # 0 would be unlimited
        command = ["mount", "-o", f"remount,size={size}", str(self._folder)]
        return subprocess.run(command, capture_output=True).returncode == 0


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
