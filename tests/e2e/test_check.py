"""`python -m tools.check` passes a dense model, and refuses one without an engine in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import save_family

pytestmark = pytest.mark.e2e

SMALL = ("model.max_context=512", "sampling.max_tokens=256")
CHECKS = [
    "packed equals alone",
    "engine equals learner",
    "decoding equals scoring",
    "loading version 0 changes nothing",
    "loading other weights",
]


def check(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.check", "--config", "demo", *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_dense_model_passes_every_check(tmp_path: Path) -> None:
    done = check(f"model.path={save_family(tmp_path, 'qwen3')}", *SMALL)
    assert done.returncode == 0, done.stderr
    of_model = done.stdout.partition(" in float32:")[2]  # the verdicts on the data come first
    passed = [line for line in of_model.splitlines() if line.startswith("  ok")]
    assert len(passed) == len(CHECKS)
    assert all(name in line for name, line in zip(CHECKS, passed, strict=True))


def test_a_model_that_no_engine_runs_is_refused_in_one_line(tmp_path: Path) -> None:
    done = check(f"model.path={save_family(tmp_path, 'bamba')}", *SMALL)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: bamba models cannot be generated from: ")
    assert "vLLM has no other way to handle it" in line
