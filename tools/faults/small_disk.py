"""A small disk for a run's folder, which can be full: real writes get ENOSPC from the kernel.

The disk is a tmpfs whose size shrinks to its content and grows again. It is mounted in a mount
namespace of this process and its children: see `tools.faults.namespace`. Driven by `tools.chaos`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Self

from tools.faults.namespace import mount

SIZE_BYTES = 1 << 30
TRIES = 20


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
        mount("-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "none", str(self._folder))
        return self

    def __exit__(self, *_: object) -> None:
        kept = self._folder.with_name(f"{self._folder.name}.kept")
        shutil.copytree(self._folder, kept)
        subprocess.run(["umount", "--lazy", str(self._folder)], check=True, capture_output=True)
        self._folder.rmdir()
        kept.rename(self._folder)

    def _used_bytes(self) -> int:
        stat = os.statvfs(self._folder)
        return (stat.f_blocks - stat.f_bfree) * stat.f_frsize

    def _resize(self, num_bytes: int) -> bool:
        size = max(num_bytes, os.sysconf("SC_PAGE_SIZE"))  # 0 would be unlimited
        command = ["mount", "-o", f"remount,size={size}", str(self._folder)]
        return subprocess.run(command, capture_output=True).returncode == 0
