"""The launcher's checks before anything starts, and the processes that it would start."""

from __future__ import annotations

import argparse
import socket
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from buffer.records import settings
from buffer.wire.keys import keys_of_run, make_keys
from buffer.wire.messages import LiveState
from buffer.wire.transport import Publisher, TransportError, next_port
from configs import cli
from configs.schema import Config
from tools import tail_monitor
from tools.launching.processes import CONFIG, Command
from tools.launching.run_plan import (
    commands_of,
    free_name,
    has_ended,
    prepare,
    share_gpus,
    with_own_keys,
)

STATE = LiveState(
    time_s=0.0, run_name="demo run", phase="training", step=1, steps=10, policy_version=0,
    max_lag=4, waiting="", groups_open=0, groups_ready=0, bytes_held=0, refused_frames=0,
    histogram_edges=[0, 8], histogram={}, lags=[], metrics={}, groups=[], engines=[], prompts=[],
)  # fmt: skip


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


def test_an_existing_run_is_not_touched(config: Config, tmp_path: Path) -> None:
    assert prepare(config).run.name == "demo"
    assert not (tmp_path / "demo").exists()
    for taken in ("demo", "demo-2"):
        (tmp_path / taken).mkdir(exist_ok=True)
        (tmp_path / taken / "config.yaml").touch()
    assert prepare(config).run.name == "demo-3"
    assert free_name(replace(config, run=replace(config.run, resume=True))) == "demo"


def test_a_resume_of_an_unknown_run_is_refused_with_the_known_ones(
    config: Config, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        settings.write(tmp_path / name, config, {})
    unknown = replace(config, run=replace(config.run, resume=True, name="nosuch"))
    with pytest.raises(ValueError, match=r"there is no run .*nosuch \(runs in .*: one, two\)"):
        has_ended(unknown)


def test_a_resume_with_a_fixed_key_changed_is_refused_before_anything_starts(
    config: Config, tmp_path: Path
) -> None:
    (tmp_path / "demo").mkdir()
    settings.write(tmp_path / "demo", config, {})
    resumed = replace(config, run=replace(config.run, resume=True, steps=7))
    assert prepare(resumed).run.name == "demo"
    other = replace(resumed, darts=replace(config.darts, group_size=4))
    with pytest.raises(ValueError, match=r"darts.group_size=4 \(it has 8\)"):
        prepare(other)


def test_every_pool_gets_the_configuration_of_the_run_and_its_own_overrides(config: Config) -> None:
    pool = ["actors.name=b", "actors.slots=32", "actors.min_step_ms=[[1,12],[64,26]]"]
    config = replace(config, launch=replace(config.launch, pools=[" ".join(pool)]))
    arguments = {command.name: command.arguments for command in commands_of(config)}
    assert list(arguments) == ["buffer", "actors pool", "actors b", "learner", "tracker"]
    assert arguments["actors pool"] == ("-m", "actors", "--config", CONFIG)
    assert list(arguments["actors b"][-3:]) == pool
    assert arguments["tracker"][1:] == (
        "tools.track",
        f"{config.run.dir}/{config.run.name}",
        "--follow",
    )


@pytest.mark.parametrize("entry", ["actors.slots=32", "actors.name=b actors.slot=3"])
def test_a_pool_that_cannot_work_is_refused(config: Config, entry: str) -> None:
    with pytest.raises(ValueError, match="launch.pools"):
        commands_of(replace(config, launch=replace(config.launch, pools=[entry])))


def test_gpus_are_split_if_there_are_enough_and_shared_otherwise() -> None:
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
    prepared = with_own_keys(prepare(config))
    folder = Path(prepared.buffer.keys)
    assert folder == Path(config.run.dir).absolute() / prepared.run.name / "keys"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    again = with_own_keys(replace(config, run=replace(config.run, resume=True)))
    assert again.buffer.keys == prepared.buffer.keys


def test_keys_that_are_named_are_used(config: Config, tmp_path: Path) -> None:
    named = replace(config, buffer=replace(config.buffer, keys=str(tmp_path / "k")))
    make_keys(tmp_path / "k")
    assert with_own_keys(named).buffer.keys == str(tmp_path / "k")


def test_a_run_beyond_one_machine_is_not_given_keys_that_the_others_lack(config: Config) -> None:
    wide = replace(config, weights=replace(config.weights, address="tcp://10.0.0.6:5580"))
    assert with_own_keys(wide).buffer.keys == ""


@pytest.mark.parametrize("found", [True, False])
def test_the_monitor_finds_the_keys_of_a_run_by_its_address(
    tmp_path: Path,
    free_port: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: bool,
) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    keys = keys_of_run(tmp_path / "runs" / "a")
    config = f"buffer: {{address: '{address}', keys: '{keys if found else ''}'}}"
    (tmp_path / "runs" / "a" / "config.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tools.tail_monitor.FIRST_NEWS_S", 3.0)
    parser = argparse.ArgumentParser()
    tail_monitor.arguments(parser)
    ended = threading.Event()
    with Publisher(next_port(address), keys) as publisher:

        def publish() -> None:
            while not ended.wait(0.05):
                publisher.publish(b"state", STATE)

        thread = threading.Thread(target=publish)
        thread.start()
        try:
            if found:
                tail_monitor.run(parser.parse_args(["--once", "--address", address]))
                assert "demo run" in capsys.readouterr().out
            else:
                with pytest.raises(TransportError, match="--keys"):
                    tail_monitor.run(parser.parse_args(["--once", "--address", address]))
        finally:
            ended.set()
            thread.join()
