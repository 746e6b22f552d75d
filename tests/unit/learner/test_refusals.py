"""Mistakes that the learner's command finds before it loads a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from configs import cli
from configs.schema import Config
from learner import __main__ as learner
from learner.installation import check_installation
from tools.launching.run_plan import prepare


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def refused(model: Path, *overrides: str) -> str:
    config = cli.load([f"model.path={model}", f"run.dir={model.parent}", *overrides], Config)
    with pytest.raises(ValueError) as caught:
        learner.run(config)
    return str(caught.value)


@pytest.mark.parametrize("command", [learner.run, prepare])
def test_a_pytorch_for_cpus_cannot_train_on_gpus(
    command: Callable[[Config], object], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"model.path={model}", f"run.dir={model.parent}", "actors.device=cpu"]
    monkeypatch.setattr("learner.installation.metadata.version", lambda name: "2.9.1+cpu")
    with pytest.raises(ValueError, match=r"^learner.device=cuda: the installed .* 2.9.1\+cpu"):
        command(cli.load([*given, "learner.device=cuda"]))
    check_installation(cli.load(["learner.device=auto"]))
    monkeypatch.setattr("learner.installation.metadata.version", lambda name: "2.9.1")
    check_installation(cli.load(["learner.device=cuda"]))


def test_missing_keys_are_refused_by_name(model: Path) -> None:
    keys = model.parent / "keys"
    assert refused(model, f"buffer.keys={keys}").startswith(f"buffer.keys: {keys} cannot be used")


def test_a_run_folder_that_cannot_be_made_is_refused_by_name(model: Path) -> None:
    folder = model / "config.json"
    assert refused(model, f"run.dir={folder}").startswith(f"run.dir={folder}: ")
