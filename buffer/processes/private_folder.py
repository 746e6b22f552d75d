"""The temporary folder of a supervisor and of everything that it starts.

It is removed when they end. If its supervisor and its janitor are both killed, the next supervisor
removes it.
"""

from __future__ import annotations

import fcntl
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
from buffer.processes.shared_memory import remove_recorded

PR_SET_CHILD_SUBREAPER = 36
# A Unix socket's path has at most 107 bytes. The names that vLLM and our own folders add leave this
# many.
LONGEST_PARENT = 20
LEAVE_S = 10.0  # time for the janitor to end
PREFIX = "darts-"
# A file in the folder, which its supervisor and its janitor keep locked.
LOCK = "in-use"


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
    remove_abandoned(Path(parent))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    lock = _locked(folder)
    before = dict(os.environ)
    janitor = subprocess.Popen(
        [sys.executable, "-S", "-m", "buffer.processes.janitor", str(folder), str(grace_s)],
        env={**os.environ, **python_path()},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # it must not keep this process's output open
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=[lock],
    )
    adopt_orphans()  # they are reaped here
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
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Remove the private folders in `parent` whose supervisor and janitor were both killed.

    Their processes are killed, too.
    """
    for file in parent.glob(f"{PREFIX}*/{LOCK}"):
        try:
            lock = os.open(file, os.O_WRONLY)
        except (FileNotFoundError, PermissionError):
            continue  # it was removed just now, or belongs to another user
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(file.parent)
        except BlockingIOError:
            continue  # its supervisor or its janitor lives
        finally:
            os.close(lock)


def _locked(folder: Path) -> int:
    """Make the lock's file, which other processes see only once it is locked."""
    unseen = folder / f"{LOCK}.new"
    lock = os.open(unseen, os.O_WRONLY | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    unseen.rename(folder / LOCK)
    return lock


def _remove(folder: Path) -> None:
    kill_processes_of(folder)
    remove_recorded(folder)
    shutil.rmtree(folder, ignore_errors=True)


def adopt_orphans() -> None:
    """Become the parent of each descendant whose own parent ends."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)


def _dismiss(janitor: subprocess.Popen[bytes], folder: Path) -> None:
    try:
        janitor.communicate(AT_ONCE, timeout=LEAVE_S)
    except subprocess.TimeoutExpired:
        janitor.kill()
        janitor.wait()
    _remove(folder)  # in case the janitor was killed
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return  # none is left


def _compiled() -> str:
    """The folder of torch's compiled kernels, which must outlive the private one."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "torchinductor")
