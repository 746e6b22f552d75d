"""The examples train, at reduced size. The one with data of its own does so from the root and from
its own folder, started by the launcher or by hand.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from buffer.processes.child import python_path
from tests.pages import ROOT
from tools.warm_start import warm_start

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("tiny_reasoner"),
]
EXAMPLE = ROOT / "examples/own_data"
MODEL = ROOT / "models/tiny-reasoner"
SMALL = ["run.steps=2", "batch.groups=2", "eval.every=0", "sampling.max_tokens=128"]
IN_ITS_FOLDER = ["data.train=rows.jsonl", "data.environment=verifier:verify"]


def keys(folder: Path, port: int, *more: str) -> list[str]:
    where = [f"run.dir={folder}", "run.name=r", f"buffer.address=tcp://127.0.0.1:{port}"]
    config = ["--config", str(EXAMPLE / "config.yaml")]
    return [*config, *where, f"model.path={MODEL}", *SMALL, *more]


def start(module: str, keys: list[str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *keys],
        cwd=cwd,
        env={**os.environ, **python_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-2000:]


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "r/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("in_its_folder", [True, False])
def test_the_launcher_trains_on_own_data(
    in_its_folder: bool, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    folder = Path(shutil.copytree(EXAMPLE, tmp_path / "mine")) if in_its_folder else ROOT
    more = IN_ITS_FOLDER if in_its_folder else []
    given = keys(tmp_path, free_port(), "launch.progress=none", *more)
    finish(start("tools.launch", given, folder))
    assert [row["step"] for row in steps(tmp_path)] == [0, 1]
    assert steps(tmp_path)[-1]["verifier/failures"] == 0


@pytest.mark.parametrize(
    ("name", "warm_steps", "shown"), [("calculator", 200, "calc"), ("game", 60, ".")]
)
def test_an_example_with_turns_trains(
    name: str, warm_steps: int, shown: str, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """After a short warm start, some trained texts have several turns."""
    example = importlib.import_module(f"examples.{name}.warm_start")
    model = tmp_path / "model"
    warm_start(model, phases=(replace(example.PHASES[0], steps=warm_steps),), task=example.TASK)
    given = [
        "--config", str(ROOT / f"examples/{name}/config.yaml"), f"run.dir={tmp_path}", "run.name=r",
        f"buffer.address=tcp://127.0.0.1:{free_port()}", f"model.path={model}", "run.steps=2",
        "batch.groups=4", "darts.group_size=8", "eval.every=0", "launch.progress=none",
    ]  # fmt: skip
    finish(start("tools.launch", given, ROOT))
    assert [row["step"] for row in steps(tmp_path)] == [0, 1]
    texts = [json.loads(line) for line in (tmp_path / "r/samples.jsonl").read_text().splitlines()]
    assert {text["reward"] for text in texts} <= {0.0, 1.0, None}  # None: it was cancelled
    assert any(shown in text["response"] for text in texts)


def test_processes_started_by_hand_train_on_own_data(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    folder = Path(shutil.copytree(EXAMPLE, tmp_path / "mine"))
    given = keys(tmp_path, free_port(), *IN_ITS_FOLDER)
    processes = [start(module, given, folder) for module in ("buffer", "actors", "learner")]
    try:
        for process in processes:
            finish(process)
    finally:
        for process in processes:
            process.terminate()
            process.wait(60)
    assert [row["step"] for row in steps(tmp_path)] == [0, 1]
