"""The example of docs/from-python.md runs, also inside an event loop as in a notebook."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from buffer.processes.child import python_path
from tests.pages import ROOT, blocks
from tools.reporting.run_directory import RunDirectory

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
NOTEBOOK = """
import asyncio, sys
async def cell():
    exec(sys.argv[1], {})
asyncio.run(cell())
"""
SMALL = '"run.steps=2", "batch.groups=2", "eval.num_prompts=4", "learner.checkpoint_every=1"'


def test_a_notebook_trains_evaluates_and_exports(
    tmp_path: Path, free_port: Callable[[], int], tiny_reasoner: Path
) -> None:
    for name in ("configs", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    (code,) = blocks(ROOT / "docs/from-python.md", "python")
    assert '"run.steps=20"' in code
    address = f', "buffer.address=tcp://127.0.0.1:{free_port()}"'
    code = code.replace('"run.steps=20"', SMALL + address)
    done = subprocess.run(
        [sys.executable, "-P", "-c", NOTEBOOK, code],
        cwd=tmp_path,
        env={**os.environ, **python_path()},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert [row["step"] for row in RunDirectory.read(tmp_path / "runs/notebook").metrics] == [0, 1]
    assert "in 2 steps" in done.stdout
    assert (tmp_path / "exported/config.json").is_file()
