"""The temporary folder of a supervisor and of everything that it starts, which goes
when they do.
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
# A Unix socket's path has at most 107 bytes; the names that vLLM and our own folders add leave this
# much.
LONGEST_PARENT = 20
LEAVE_S = 10.0  # for the janitor


@contextmanager
def private_folder(grace_s: float = 30.0) -> Generator[Path]:
    """Have `tempfile`, here and in all children, use a new folder. Afterwards, or once this process
    was killed, nothing is left of it: no file, no shared memory, and no process that was started
    meanwhile. If this process was killed, the others, which the kernel tells to end, have
    `grace_s`. A process that was started by a supervisor has such a folder already, and goes on to
    use that.
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
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans that die are reaped here
    os.environ.update(marks(folder))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _compiled())
    tempfile.tempdir = None  # chosen again when it is next needed
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
    kill_processes_of(folder)  # nothing is left of either, unless the janitor was killed
    shutil.rmtree(folder, ignore_errors=True)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return  # none is left


def _compiled() -> str:
    """Where torch keeps kernels that it has compiled, which must outlive the folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "torchinductor")
