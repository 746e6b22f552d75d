"""Runs hold whichever of their processes is killed or stopped: the launcher, a pool, an engine of a
pool, or a rank of the learner. Nothing of them is left.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        (["seeds=[11]", "faults=4", "pools=2", "engines=1", "launcher=true"], "kill launcher"),
        (["seeds=[7]", "faults=3", "learner=real", "ranks=2"], "kill rank 1"),
    ],
)
def test_a_run_holds_whichever_process_is_the_victim(keys: list[str], fault: str) -> None:
    common = ["steps=4", "kinds=[kill,stop]", "deadline_s=300"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.chaos", *keys, *common],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=390,
    )
    assert done.returncode == 0, done.stdout
    assert fault in done.stdout  # the seed's schedule has it
