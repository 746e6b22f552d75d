"""Environments of the package `verifiers` as sources of prompts: verifiers:NAME[:SPLIT].

SPLIT is train, the default, or eval. An environment's own code never runs in this process: its rows
come from `buffer.data.public_rows`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from buffer.data.tables import READERS, TableSource
from buffer.processes.child import ERROR, python_path
from configs.extras import check_extra
from configs.schema import DataConfig

PREFIX = "verifiers:"
SPLITS = ("train", "eval")
TIMEOUT_S = 600.0  # imports, and datasets that are downloaded


def environment_of(form: str) -> str:
    """The environment verifiers:NAME of a source verifiers:NAME[:SPLIT]."""
    return ":".join(form.split(":")[:2])


def open_environment(key: str, form: str) -> TableSource:
    """The rows of the environment that `form`, the value of `key`, names."""
    name, _, split = form.removeprefix(PREFIX).partition(":")
    split = split or "train"
    if split not in SPLITS:
        raise ValueError(f"{key}={form}: {split!r} must be one of {', '.join(SPLITS)}")
    check_extra("verifiers", f"{key}={form}", "verifiers")
    with tempfile.TemporaryDirectory(prefix="rows-") as folder:
        path = str(Path(folder) / "rows.jsonl")
        _write_rows(f"{key}={form}", [name, split, path])
        return TableSource(f"{key}={form}", READERS[".jsonl"](path), DataConfig())


def _write_rows(source: str, arguments: list[str]) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "buffer.data.public_rows", *arguments],
            env={**os.environ, **python_path()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"{source}: its rows took longer than {TIMEOUT_S:g} s; look at the environment's "
            "load_environment"
        ) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        reasons = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
        raise ValueError(f"{source}: {(reasons or lines)[-1]}")
