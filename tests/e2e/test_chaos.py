"""A run with real engines holds under a seeded schedule of kills and stops, and leaves nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_run_with_real_engines_holds() -> None:
    keys = ["engine=vllm", "engines=1", "kinds=[kill,stop]"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.chaos", "seeds=[1]", "steps=2", "faults=1", *keys],
        stdout=subprocess.PIPE,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stdout
