"""A blocked event loop ends its process, and a busy one does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
SCRIPT = """
import asyncio, ctypes, sys, time
from actors.loop_watch import LoopWatch

async def main(limit_s, act):
    with LoopWatch(limit_s, 7, "error: blocked"):
        print("watched", flush=True)
        exec(act)
        await asyncio.sleep(0.05)
    time.sleep(limit_s * 4)  # nothing is watched any more

asyncio.run(main(float(sys.argv[1]), sys.argv[2]))
"""


def start(limit_s: float, act: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(limit_s), act]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)


def test_a_blocked_loop_ends_the_process_with_its_status_and_reason() -> None:
    process = start(1.0, "time.sleep(60)")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 7
    assert errors.splitlines()[-1] == "error: blocked"
    assert "time.sleep(60)" in errors or "in main" in errors  # the stacks


def test_a_loop_that_is_blocked_in_foreign_code_with_pythons_lock_ends_too() -> None:
    process = start(1.0, "ctypes.PyDLL(None).sleep(60)")
    process.communicate(timeout=30)
    assert process.returncode == 1


def test_a_loop_that_is_slow_but_works_goes_on() -> None:
    process = start(3.0, "time.sleep(1.5)")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    process = start(2.0, "time.sleep(1)")
    assert process.stdout is not None and process.stdout.readline() == "watched\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
