"""Lines that a process prints only if it was started by hand.

`tools.launch` shows the progress of the processes that it starts, and writes the report at the end
of the run. Without it, a buffer, a learner or a pool of engines says by itself that it has joined,
that it serves, how the run ended, and where the report is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from buffer.processes.child import given_reason, in_words
from buffer.processes.descendants import OWNER

BY_HAND = "DARTS_STARTED_BY_HAND"  # also in the environment of the processes that it starts
REPORT_S = 300.0


def note_start() -> None:
    """Call it first in a command: a supervisor marks the environment of those that it starts."""
    if OWNER not in os.environ:
        os.environ[BY_HAND] = "1"


def tell(line: str) -> None:
    """On stderr, like all lines that a supervisor passes on."""
    if BY_HAND in os.environ:
        print(line, file=sys.stderr, flush=True)


def write_report(run: Path) -> None:
    """Write the report of a run that has ended, and say where it is, or why there is none."""
    if BY_HAND not in os.environ:
        return
    command = [sys.executable, "-m", "tools.report", str(run)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=REPORT_S)
    except subprocess.TimeoutExpired:
        failure = f"it took longer than {REPORT_S:g} s"
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines() or [in_words(error.returncode)]
        failure = given_reason(lines) or lines[-1]
    else:
        print(f"Report: {run / 'report.html'}", flush=True)
        return
    again = f"python -m tools.report {run} tries again"
    print(f"buffer: the report was not written: {failure}; {again}", file=sys.stderr)
