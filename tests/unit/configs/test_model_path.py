"""`model.path` is checked before a library tries to load it, by every command that loads it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from actors.pool import Pool
from configs import cli
from configs.model_path import check_model, hub_trouble
from configs.schema import Config
from learner import __main__ as learner
from tools import check
from tools.evaluate import evaluate
from tools.export import export
from tools.launching.run_plan import prepare


def run_of(config: Config) -> Path:
    """A run's folder with this configuration and, seemingly, a checkpoint."""
    run = Path("run")
    (run / "checkpoints" / "step_000001").mkdir(parents=True)
    (run / "config.yaml").write_text(cli.to_yaml(config))
    return run


def check_config(config: Config) -> check.CheckConfig:
    return cli.load([f"model.path={config.model.path}"], check.CheckConfig)


COMMANDS: dict[str, Callable[[Config], object]] = {
    "actors": lambda config: Pool(config).run(),
    "learner": learner.run,
    "tools.launch": prepare,
    "tools.check": lambda config: check.run(check_config(config)),
    "tools.evaluate": lambda config: evaluate(run_of(config)),
    "tools.export": lambda config: export(run_of(config), Path("out")),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A library that tries the hub fails the test with another message.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("path", ["models/none", "some/model"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_missing_model_itself(command: str, path: str) -> None:
    config = cli.load([f"model.path={path}"], Config)
    reason = "no such folder" if path == "models/none" else "the hub, .* cannot be reached"
    with pytest.raises(ValueError, match=f"^model.path={path}: {reason}"):
        COMMANDS[command](config)


def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model.path={tmp_path}: .*config.json"):
        check_model(str(tmp_path))


@pytest.mark.parametrize("path", ["models/tiny-reasoner", "/nowhere/at/all", "tiny", "./a/b"])
def test_a_missing_folder_is_refused_by_name(path: str) -> None:
    with pytest.raises(ValueError, match=f"model.path={path}: no such folder"):
        check_model(path)


def test_a_missing_folder_that_a_tool_makes_names_the_tool() -> None:
    with pytest.raises(ValueError, match=r"tools\.smollm2 models/smollm2` makes this one"):
        check_model("models/smollm2")


def test_a_model_that_is_cached_needs_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    check_model("some/model")


def test_behind_a_proxy_it_is_the_proxy_that_must_answer(
    monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    port = free_port()
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    assert f"cannot be reached through the proxy 127.0.0.1:{port} (" in hub_trouble()
    with socket.create_server(("127.0.0.1", port)):
        assert hub_trouble() == ""
        check_model("some/model")


def test_a_name_server_that_does_not_answer_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait() and [])
    monkeypatch.setattr("configs.model_path.getproxies", dict)
    monkeypatch.setattr("configs.model_path.CONNECT_S", 0.1)
    assert "no answer within 0.1 s" in hub_trouble()
    released.set()


def test_an_offline_hub_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        check_model("some/model")


def test_a_launcher_on_other_machines_leaves_the_model_to_them() -> None:
    config = cli.load(["model.path=models/none"], Config)
    with pytest.raises(ValueError, match="no such folder"):
        prepare(config)
    prepare(replace(config, launch=replace(config.launch, launcher="ray")))
