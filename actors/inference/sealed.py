"""An anonymous file that can no longer be changed: the bytes of a snapshot in memory.

The kernel frees it with the last process that holds it, however that ends, so nothing is left of
it. Knows nothing of snapshots. Used by `actors.inference.weights` and by the engines of a node,
which pass it on (`actors.inference.node_copies`).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from typing import Self

from buffer.wire.snapshots import Data

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class SealedFile:
    """Closed when it is no longer used, or by the end of this process."""

    def __init__(self, handle: int) -> None:
        """Takes over `handle`. Raises `ValueError` if others could still change the file."""
        self._handle = handle
        self._close = weakref.finalize(self, os.close, handle)
        self._data: memoryview | None = None
        try:
            sealed = fcntl.fcntl(handle, fcntl.F_GET_SEALS) & SEALS == SEALS
        except OSError:  # a file of another kind, which has no seals
            sealed = False
        if not sealed:
            self._close()
            raise ValueError("a file that was handed over is not sealed, so it may change")

    @classmethod
    def of(cls, data: Data) -> Self:
        """A file with these bytes."""
        handle = os.memfd_create("snapshot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(handle, 0o600)
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, SEALS)
        except BaseException:
            os.close(handle)
            raise
        return cls(handle)

    def fileno(self) -> int:
        return self._handle

    @property
    def path(self) -> str:
        """A path by which processes of this user can open it while this object lives."""
        return f"/proc/{os.getpid()}/fd/{self._handle}"

    @property
    def data(self) -> memoryview:
        """Its bytes, without a copy."""
        if self._data is None:
            # Older kernels refuse to map a sealed file that could be written through the mapping.
            reading = os.open(f"/proc/self/fd/{self._handle}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._data = memoryview(mmap.mmap(reading, 0, access=mmap.ACCESS_READ))
            finally:
                os.close(reading)
        return self._data
