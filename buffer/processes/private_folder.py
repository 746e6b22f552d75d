"""The temporary folder of a supervisor and of everything that it starts.

It is removed when they end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from buffer.processes.child import LIBC, python_path
from buffer.processes.descendants import OWNER, kill_processes_of, marks
from buffer.processes.janitor import AT_ONCE

PR_SET_CHILD_SUBREAPER = 36
# A Unix socket's path has at most 107 bytes. The names that vLLM and our own folders add leave this
# many.
LONGEST_PARENT = 20
LEAVE_S = 10.0  # time for the janitor to end


@contextmanager
def private_folder(grace_s: float = 30.0) -> Generator[Path]:
    """Make `tempfile` use a new folder, here and in all children.

    Afterwards, or after this process was killed, nothing is left of it: no file, no shared memory,
    and no process that was started in the meantime. If this process was killed, the kernel tells
    the others to end, and they have `grace_s` to do so. A process that was started by a supervisor
    has such a folder already and keeps using it.
    """
    if OWNER in os.environ:
        yield Path(os.environ[OWNER])
        return
    parent = tempfile.gettempdir()
    parent = parent if len(parent) <= LONGEST_PARENT else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="darts-", dir=parent))
    before = dict(os.environ)
    janitor = subprocess.Popen(
        [sys.executable, "-S", "-m", "buffer.processes.janitor", str(folder), str(grace_s)],
        env={**os.environ, **python_path()},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # it must not keep this process's output open
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans are adopted and reaped here
    os.environ.update(marks(folder))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _compiled())
    tempfile.tempdir = None  # `tempfile` chooses again when it needs one
    try:
        yield folder
    finally:
        os.environ.clear()
        os.environ.update(before)
        tempfile.tempdir = None
        _dismiss(janitor, folder)


def _dismiss(janitor: subprocess.Popen[bytes], folder: Path) -> None:
    try:
        janitor.communicate(AT_ONCE, timeout=LEAVE_S)
    except subprocess.TimeoutExpired:
        janitor.kill()
        janitor.wait()
    kill_processes_of(folder)  # in case the janitor was killed
    shutil.rmtree(folder, ignore_errors=True)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return  # none is left


def _compiled() -> str:
    """The folder of torch's compiled kernels, which must outlive the private one."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "torchinductor")
