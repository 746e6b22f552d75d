"""Commands in their own processes: a signal ends them with the exit status that `--help` states."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import ExitStatus

ROOT = Path(__file__).parents[2]


def status_after(command: list[str], sign: Path, number: signal.Signals) -> int:
    """The exit status of a command that gets a signal once the file `sign` exists."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while not sign.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1].decode()
    assert "Traceback" not in errors
    return process.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_buffer(
    number: signal.Signals, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    command = ["buffer", f"run.dir={tmp_path}", f"buffer.address=tcp://127.0.0.1:{free_port()}"]
    serving = tmp_path / "run" / "tokens"  # the last folder that is made before the main loop
    assert status_after(command, serving, number) == ExitStatus.INTERRUPTED


def test_ctrl_c_ends_a_simulation(tmp_path: Path) -> None:
    command = ["darts.simulate", "run.steps=1000000", f"run.out={tmp_path / 'out'}"]
    assert status_after(command, tmp_path / "out" / "groups.jsonl", signal.SIGINT) == 130
