"""A process or file that a run leaves is found, wherever it was made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools.faults import namespace
from tools.faults.leftovers import Leftovers

# Its parent ends at once, so that only a process that adopts orphans can find it.
ORPHAN = """
import os, sys, time
if os.fork():
    os._exit(0)
os.setsid()
print(os.getpid(), flush=True)
time.sleep(300)
"""

# Lists its own `/tmp` and `/dev/shm` before and after it has written to both.
INSIDE = """
import os, sys
from pathlib import Path
from tools.faults import namespace
namespace.enter("program", sys.argv[1:])
kept = Path(sys.argv[1])
folders = namespace.own_folders([kept, Path.cwd(), Path(sys.executable)])
before = [set(os.listdir(folder)) for folder in folders]
for folder in folders:
    (folder / "mark").touch()
kept.write_text("outside")
print([sorted(set(os.listdir(f)) - b) for f, b in zip(folders, before)])
"""


def test_a_new_file_is_named_and_an_old_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    leftovers = Leftovers([tmp_path])
    assert leftovers.found() == []
    (tmp_path / "new").touch()
    assert leftovers.found() == [f"{tmp_path / 'new'} was left"]


def test_an_orphan_is_named_until_it_ends(tmp_path: Path) -> None:
    leftovers = Leftovers([tmp_path])
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
    try:
        [left] = leftovers.found()
        assert left.startswith(f"process {pid} was left")
    finally:
        os.kill(pid, signal.SIGKILL)
    assert leftovers.found(limit_s=10) == []
    os.waitpid(pid, 0)


@pytest.mark.skipif(bool(namespace.why_not()), reason="no mount namespace on this machine")
def test_files_written_inside_a_namespace_are_its_own(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    program = tmp_path / "program.py"
    program.write_text(INSIDE)
    done = subprocess.run(
        [sys.executable, "-m", "program", str(kept)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "[['mark'], ['mark']]"
    assert not Path("/tmp/mark").exists() and not Path("/dev/shm/mark").exists()
    assert kept.read_text() == "outside"
