"""`python -m tests.run_all [options of pytest]`: all tests that need no GPU, for `make test`.

First two files at a time, in the order of their folders, so that short tests fill the end. Then,
one after another, the tests that are marked `alone`. The second call of pytest prints the coverage
of both, and runs even if the first one has failed.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

# A file stays in one process, so that what its tests share is made once.
TOGETHER = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--cov", "--cov-report="]
ALONE = ["--cov", "--cov-append"]


def main(options: list[str]) -> int:
    """The exit status: 0 if all tests that ran have passed, and at least one ran."""
    statuses = [
        subprocess.run(
            [sys.executable, "-m", "pytest", "--durations=40", "-m", marks, *arguments, *options]
        ).returncode
        for marks, arguments in (
            ("not gpu and not alone", TOGETHER),
            ("not gpu and alone", ALONE),
        )
    ]
    failed = [
        s for s in statuses if s not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    ]
    return failed[0] if failed else min(statuses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
