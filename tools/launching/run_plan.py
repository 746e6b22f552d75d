"""The preparation of a run: quick checks, and the command of each of its processes.

Owns the translation of a configuration into commands. Starts no process of the run, and leaves no
files behind. Driven by `tools.launch`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from actors.inference.device import engine_device
from actors.pool import check_model
from buffer.records import settings
from buffer.wire.keys import keys_of_run
from buffer.wire.transport import Publisher, TransportError, is_loopback, next_port
from configs import cli
from configs.schema import Config
from tools.launching.processes import CONFIG, Command
from tools.reporting.run_directory import RunDirectory
from tools.reporting.trackers import check_trackers

# The tool that makes a missing model, by a part of the name of its folder.
BUILDERS = {"tiny": "tools.warm_start", "smollm2": "tools.smollm2"}


def prepare(config: Config) -> Config:
    """The configuration to run, after quick checks. Raises `ValueError` or `TransportError`."""
    try:
        check_model(config.model.path)
    except ValueError as error:
        tool = next((tool for word, tool in BUILDERS.items() if word in config.model.path), None)
        raise ValueError(
            f"{error} (`python -m {tool} {config.model.path}` makes this one)"
            if tool
            else str(error)
        ) from None
    check_trackers(config.run.trackers)
    folder = Path(config.run.dir) / config.run.name
    if config.run.resume and (folder / settings.NAME).exists():
        settings.changes(folder, config)  # the buffer would refuse fixed ones, but seconds later
    name = free_name(config)
    if name != config.run.name:
        print(
            f"{Path(config.run.dir) / config.run.name} holds a run already, so this one is called "
            f"{name} (run.resume=true would continue the existing run)"
        )
    config = with_own_keys(replace(config, run=replace(config.run, name=name)))
    if config.launch.launcher == "local":
        for address in (config.buffer.address, next_port(config.buffer.address)):
            try:
                Publisher(address, config.buffer.keys).close()
            except TransportError as error:
                raise TransportError(f"buffer.address={config.buffer.address}: {error}") from None
    return config


def with_own_keys(config: Config) -> Config:
    """The configuration with keys of the run's own, so that no other user of this machine can join,
    unless it names some or spans machines.
    """
    addresses = (config.buffer.address, config.weights.address)
    if config.buffer.keys or not all(map(is_loopback, addresses)):
        return config
    keys = keys_of_run(Path(config.run.dir) / config.run.name)
    return replace(config, buffer=replace(config.buffer, keys=keys))


def has_ended(config: Config) -> bool:
    """Whether a run to be resumed has recorded its last step and its last evaluation."""
    if not config.run.resume:
        return False
    metrics = RunDirectory.read(Path(config.run.dir) / config.run.name).metrics
    return len(metrics) >= config.run.steps


def free_name(config: Config) -> str:
    """`run.name`, or the first of run.name-2, run.name-3, ... whose directory has no run yet."""
    name, number = config.run.name, 1
    while not config.run.resume and (Path(config.run.dir) / name / "config.yaml").exists():
        number += 1
        name = f"{config.run.name}-{number}"
    return name


def commands_of(config: Config) -> list[Command]:
    """Every process in start order. Raises `ValueError` if an entry of launch.pools is invalid."""
    pools: list[tuple[Config, tuple[str, ...]]] = [(config, ())]
    names = [config.actors.name]
    for entry in config.launch.pools:
        pool, overrides = with_overrides(config, entry)
        if pool.actors.name in names:
            raise ValueError(
                f"launch.pools={entry!r}: there is already a pool named {pool.actors.name}; "
                "add actors.name=ANOTHER"
            )
        names.append(pool.actors.name)
        pools.append((pool, overrides))
    commands = [Command("buffer", "buffer", ("-m", "buffer", "--config", CONFIG))]
    for pool, overrides in pools:
        gpus = pool.actors.num_engines * pool.actors.tensor_parallel
        commands.append(
            Command(
                "actors",
                "actors" if len(pools) == 1 else f"actors {pool.actors.name}",
                ("-m", "actors", "--config", CONFIG, *overrides),
                gpus if engine_device(pool) == "cuda" else 0,
            )
        )
    device = engine_device(config) if config.learner.device == "auto" else config.learner.device
    ranks = config.learner.num_ranks if device == "cuda" else 0
    commands.append(Command("learner", "learner", ("-m", "learner", "--config", CONFIG), ranks))
    if config.run.trackers:
        folder = str(Path(config.run.dir) / config.run.name)
        commands.append(Command("tracker", "tracker", ("-m", "tools.track", folder, "--follow")))
    return commands


def with_overrides(config: Config, entry: str) -> tuple[Config, tuple[str, ...]]:
    """A pool's own configuration, and the list of its overrides."""
    overrides = tuple(shlex.split(entry))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(cli.to_yaml(config))
        file.flush()
        try:
            return cli.load(["--config", file.name, *overrides]), overrides
        except ValueError as error:
            raise ValueError(f"launch.pools={entry!r}: {error}") from None


def share_gpus(commands: list[Command], gpus: Sequence[str]) -> list[Command]:
    """Give each process GPUs of its own if there are enough; otherwise all share every GPU."""
    left, shared = list(gpus), []
    if sum(command.num_gpus for command in commands) > len(left):
        return commands
    for command in commands:
        own, left = left[: command.num_gpus], left[command.num_gpus :]
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(own)}
        shared.append(replace(command, environment=visible) if own else command)
    return shared


def visible_gpus() -> list[str]:
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    return asked.stdout.split() if asked.returncode == 0 else []
