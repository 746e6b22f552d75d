"""Atomic writes, and the lock on a run's folder."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.records.files import (
    Disk,
    RunLock,
    atomic_folder,
    atomic_write,
    make_run_folder,
    replace_folder,
)
from tests.disks import MemoryDisk, PowerCutError

ROOT = Path(__file__).parents[3]
FILE = Path("/run/latest")

HOLDER = """
import sys
from pathlib import Path
from buffer.records.files import RunLock

lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@given(num_steps=st.integers(0, 8), seed=st.integers(0, 2**16))
def test_a_power_cut_leaves_the_old_or_the_new_content_of_a_file(num_steps: int, seed: int) -> None:
    disk = MemoryDisk()
    atomic_write(FILE, "old", disk=disk)
    disk.fuse = num_steps
    try:
        atomic_write(FILE, "the new content", disk=disk)
        allowed = {b"the new content"}
    except PowerCutError:
        allowed = {b"old", b"the new content"}
    assert disk.after_power_cut(random.Random(seed)).read(FILE) in allowed


def test_a_failed_write_leaves_the_old_file_unchanged(tmp_path: Path) -> None:
    class FullDisk(Disk):
        def write(self, handle: int, data: bytes | memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "report.html"
    atomic_write(path, "old")
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, "new", disk=FullDisk())
    assert os.listdir(tmp_path) == ["report.html"] and path.read_text() == "old"


def test_a_written_file_has_the_requested_mode(tmp_path: Path) -> None:
    atomic_write(tmp_path / "secret", b"key", mode=0o600, durable=False)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    umask = os.umask(0o022)
    try:
        atomic_write(tmp_path / "public", "text")
    finally:
        os.umask(umask)
    assert (tmp_path / "public").stat().st_mode & 0o777 == 0o644


def test_a_folder_gets_its_name_only_once_it_is_complete(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").mkdir()
        (folder / "weights" / "0").write_text("1")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "weights" / "0").read_text() == "1"
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "other") as folder:
        (folder / "half").write_text("1")
        raise RuntimeError("no")
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_replaces_another(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert os.listdir(tmp_path) == ["old"] and os.listdir(tmp_path / "old") == ["new"]


def test_a_second_process_is_refused_until_the_first_has_died(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"in use by another buffer: process {holder.pid} on "):
            RunLock(tmp_path)
        RunLock(tmp_path, role="learner").release()  # another role, another lock
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with RunLock(tmp_path) as lock:
            assert lock.path.read_text().startswith(f"process {os.getpid()} on ")
            with pytest.raises(ValueError, match=f"process {os.getpid()} on "):
                RunLock(tmp_path)
        RunLock(tmp_path).release()


def test_a_run_folder_that_cannot_be_made_is_refused_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"run\.dir={tmp_path}/file: .*Not a directory"):
        make_run_folder(tmp_path / "file" / "run")
    make_run_folder(tmp_path / "runs" / "run")
    assert (tmp_path / "runs" / "run").is_dir()
