"""The buffer, its tools and the configuration import without loading torch, vLLM or Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "vllm", "ray", "transformers")


def loaded_by(module: str) -> set[str]:
    """Top-level names in `sys.modules` after `import module` in a fresh interpreter."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "configs.schema",
        "configs.cli",
        "configs.checks",
        "buffer.wire.messages",
        "buffer.wire.transport",
        "buffer.wire.client",
        "buffer.service",
        "darts.simulate",
        "tools.launch",
        "tools.replay",
        "tools.tail_monitor",
    ],
)
def test_loads_no_torch_and_no_engine(module: str) -> None:
    assert not loaded_by(module) & set(HEAVY)


@pytest.mark.parametrize(
    "module", ["darts.events", "darts.core", "darts.sizing.redundancy", "darts.sizing.latency"]
)
def test_darts_loads_no_io_modules(module: str) -> None:
    assert not loaded_by(module) & {*HEAVY, "asyncio", "zmq", "msgspec", "omegaconf", "logging"}
