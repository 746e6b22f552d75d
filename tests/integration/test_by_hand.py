"""A run whose processes are started by hand: each says what it does, and the report is written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from buffer.processes.descendants import OWNER
from configs import cli
from tools.faults.small_run import run_config
from tools.faults.tiny_model import save_model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_processes_say_that_they_joined_and_ended(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    save_model(tmp_path / "model")
    config = run_config(tmp_path, tmp_path / "model", 0, 2)
    config.buffer.address = f"tcp://127.0.0.1:{free_port()}"
    config.buffer.peer_timeout_s, config.eval.every = 30.0, 0
    (tmp_path / "run.yaml").write_text(cli.to_yaml(config))
    environment = {name: value for name, value in os.environ.items() if name != OWNER}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, "--config", str(tmp_path / "run.yaml")],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for module in ("buffer", "learner", "tools.faults.fake_pool")
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], said
    buffer, learner, pool = [lines.splitlines() for _, lines in said]
    report = Path(config.run.dir) / config.run.name / "report.html"
    assert said[0][0].splitlines()[-1] == f"Report: {report}" and report.exists()
    assert len(buffer) == 1  # ended
    assert config.buffer.address in learner[0]  # joined
    assert "has ended" in learner[-1]
    assert len(pool) == 3 and config.buffer.address in pool[0]  # joined, serves, and ended
