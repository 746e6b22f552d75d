"""A mount namespace for runs under faults, in which `/tmp` and `/dev/shm` are empty and their own.

Whatever is there after a run was left by that run, and full disks can be mounted for it. Nothing
stays mounted, and no other process sees it. That needs root, or a kernel that lets users make
namespaces. Driven by `tools.chaos`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INSIDE = "CHAOS_MOUNT_NAMESPACE"  # the pid of the process that is in its own namespace
TEMPORARY, SHARED_MEMORY = Path("/tmp"), Path("/dev/shm")


def why_not() -> str:
    """The reason why this machine allows no such namespace, or ""."""
    if is_inside():
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


def enter(module: str, arguments: Sequence[str]) -> None:
    """Restart this process, which runs `module`, in a mount namespace of its own. Call it early.

    Returns if it is in one already.
    """
    if not is_inside():
        os.environ[INSIDE] = str(os.getpid())  # which stays the same
        sys.stdout.flush()
        command = [*_unshare(), sys.executable, "-m", module, *arguments]
        os.execvp(command[0], command)


def is_inside() -> bool:
    return os.environ.get(INSIDE) == str(os.getpid())


def own_folders(kept: Sequence[Path]) -> tuple[Path, Path]:
    """Empty `/tmp` and `/dev/shm` for this namespace, and return both.

    Entries of `/tmp` that hold one of the `kept` paths stay, as they are.
    """
    assert is_inside()
    os.environ.pop("TMPDIR", None)
    mount("-t", "tmpfs", "-o", "mode=1777", "none", str(SHARED_MEMORY))
    outer = SHARED_MEMORY / "tmp"
    outer.mkdir()
    mount("--rbind", str(TEMPORARY), str(outer))
    mount("-t", "tmpfs", "-o", "mode=1777", "none", str(TEMPORARY))
    for name in {path.relative_to(TEMPORARY).parts[0] for path in kept if _is_temporary(path)}:
        (TEMPORARY / name).mkdir()
        mount("--rbind", str(outer / name), str(TEMPORARY / name))
    subprocess.run(["umount", "--lazy", str(outer)], check=True, capture_output=True)
    outer.rmdir()
    return TEMPORARY, SHARED_MEMORY


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _is_temporary(path: Path) -> bool:
    return path != TEMPORARY and path.is_relative_to(TEMPORARY)


def _unshare() -> list[str]:
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", "--mount", *as_root]
