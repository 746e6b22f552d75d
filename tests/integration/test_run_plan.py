"""What the launcher checks before anything starts, and what it would start."""

from __future__ import annotations

import socket
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from buffer.wire.keys import make_keys
from buffer.wire.transport import TransportError
from configs import cli
from configs.schema import Config
from tools.launching.processes import CONFIG, Command
from tools.launching.run_plan import commands_of, free_name, prepare, share_gpus


@pytest.fixture
def config(tmp_path: Path, free_port: Callable[[], int]) -> Config:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return cli.load(
        [
            f"run.dir={tmp_path}",
            "run.name=demo",
            f"model.path={model}",
            f"buffer.address=tcp://127.0.0.1:{free_port()}",
        ]
    )


@pytest.mark.parametrize("offset", [0, 1])
def test_a_port_in_use_is_refused_before_anything_starts(config: Config, offset: int) -> None:
    port = int(config.buffer.address.rpartition(":")[2]) + offset
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(TransportError, match=str(port)):
            prepare(config)


def test_a_missing_model_names_the_command_that_makes_it(config: Config, tmp_path: Path) -> None:
    path = str(tmp_path / "models" / "tiny-reasoner")
    with pytest.raises(ValueError, match=f"tools.warm_start {path}"):
        prepare(replace(config, model=replace(config.model, path=path)))


def test_an_existing_run_is_left_alone(config: Config, tmp_path: Path) -> None:
    assert prepare(config).run.name == "demo"
    for taken in ("demo", "demo-2"):
        (tmp_path / taken).mkdir(exist_ok=True)
        (tmp_path / taken / "config.yaml").touch()
    assert prepare(config).run.name == "demo-3"
    assert free_name(replace(config, run=replace(config.run, resume=True))) == "demo"


def test_every_pool_gets_the_run_s_configuration_and_its_own_overrides(config: Config) -> None:
    config = replace(config, launch=replace(config.launch, pools=["actors.name=b actors.slots=32"]))
    arguments = {command.name: command.arguments for command in commands_of(config)}
    assert list(arguments) == ["buffer", "actors pool", "actors b", "learner"]
    assert arguments["actors pool"] == ("-m", "actors", "--config", CONFIG)
    assert arguments["actors b"][-2:] == ("actors.name=b", "actors.slots=32")


@pytest.mark.parametrize("entry", ["actors.slots=32", "actors.name=b actors.slot=3"])
def test_a_pool_that_cannot_work_is_refused(config: Config, entry: str) -> None:
    with pytest.raises(ValueError, match="launch.pools"):
        commands_of(replace(config, launch=replace(config.launch, pools=[entry])))


def test_gpus_are_split_where_there_are_enough_and_shared_where_not() -> None:
    table = [
        Command("buffer", "buffer", ()),
        Command("actors", "actors", (), 2),
        Command("learner", "learner", (), 1),
    ]
    split = [
        command.environment.get("CUDA_VISIBLE_DEVICES")
        for command in share_gpus(table, ["4", "5", "6"])
    ]
    assert split == [None, "4,5", "6"]
    assert share_gpus(table, ["0"]) == table


def test_a_run_on_one_machine_gets_private_keys_and_keeps_them(config: Config) -> None:
    prepared = prepare(config)
    folder = Path(prepared.buffer.keys)
    assert folder == Path(config.run.dir).absolute() / prepared.run.name / "keys"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    again = prepare(replace(config, run=replace(config.run, resume=True)))
    assert again.buffer.keys == prepared.buffer.keys


def test_keys_that_are_named_are_used(config: Config, tmp_path: Path) -> None:
    named = replace(config, buffer=replace(config.buffer, keys=str(tmp_path / "k")))
    make_keys(tmp_path / "k")
    assert prepare(named).buffer.keys == str(tmp_path / "k")


def test_a_run_beyond_one_machine_is_not_given_keys_that_the_others_lack(config: Config) -> None:
    wide = replace(config, weights=replace(config.weights, address="tcp://10.0.0.6:5580"))
    assert prepare(wide).buffer.keys == ""
