"""Environments of a user's class with `close`, from `reset` until they are closed: one file each.

The file holds the state between two steps, so that a process other than the one of the last step,
and even one that outlives the engine, can close the environment. Names:

    KEY           it waits for its next step
    KEY.live      a process holds it; the content is that of the step before, or empty in the first
    KEY.closing   a process closes it

Knows nothing of rollouts. Used by the processes of verifiers, and by their pool to see which are
left.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from buffer.processes.descendants import OPEN


class OpenEnvironments:
    """Those of one pool, in `folder`, which exists once a verifier's class turns out to need it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / OPEN

    def create(self) -> None:
        self._folder.mkdir(exist_ok=True)

    @property
    def exists(self) -> bool:
        return self._folder.exists()

    def begin(self, key: str) -> None:
        """A new one is about to be reset."""
        self._path(key, "live").touch()

    def hold(self, key: str) -> bytes:
        """The state of one that waits, which the caller holds from now on."""
        return self._path(key).rename(self._path(key, "live")).read_bytes()

    def keep(self, key: str, data: bytes) -> None:
        """One that the caller holds waits for its next step from now on."""
        new = self._path(key, "new")
        new.write_bytes(data)
        new.rename(self._path(key))
        self._path(key, "live").unlink()

    def forget(self, key: str) -> None:
        """One that the caller holds has been closed."""
        self._path(key, "live").unlink(missing_ok=True)

    def remains(self, key: str) -> bool:
        return self._path(key).exists() or self._path(key, "live").exists()

    def take(self, key: str) -> bytes:
        """Its newest state, to close it; empty if nothing is known of it, or if it was closed."""
        closing = self._path(key, "closing")
        for path in (self._path(key), self._path(key, "live")):
            with contextlib.suppress(FileNotFoundError):
                return path.rename(closing).read_bytes()
        return b""

    def closed(self, key: str) -> None:
        """One that `take` has returned is closed."""
        self._path(key, "closing").unlink(missing_ok=True)

    def waiting(self) -> list[str]:
        """The keys of those that no process holds."""
        return [path.name for path in self._folder.iterdir() if not path.suffix]

    def _path(self, key: str, part: str = "") -> Path:
        return self._folder / (f"{key}.{part}" if part else key)
