"""The preparation of a run: quick checks, and the command of each of its processes.

Owns the translation of a configuration into commands. Starts no process of the run, and leaves no
files behind. Driven by `tools.launch`.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from actors.inference.device import check_cache, check_device, engine_device
from actors.inference.vllm_options import check_options
from buffer.records import settings
from buffer.records.files import make_run_folder
from buffer.records.run_files import no_such_run
from buffer.wire.keys import keys_of_run
from buffer.wire.snapshots import reachable
from buffer.wire.transport import Publisher, TransportError, is_loopback, next_port
from configs import cli
from configs.model_path import check_model
from configs.schema import Config, Place
from learner.installation import check_installation
from tools.launching.placement import pool_entries
from tools.launching.processes import CONFIG, Command
from tools.reporting.run_directory import RunDirectory
from tools.reporting.trackers import check_trackers


def prepare(config: Config) -> Config:
    """The configuration to run, after quick checks, which leave nothing in the run's folder.

    Raises `ValueError` or `TransportError`.
    """
    if config.launch.launcher == "local":
        check_model(config.model.path)
        check_device(config)
        check_installation(config)
        check_cache(config)
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
    if config.launch.launcher == "ray":  # the buffer runs beside this process
        buffer = replace(config.buffer, address=reachable(config.buffer.address))
        config = replace(config, buffer=buffer)
    config = replace(config, run=replace(config.run, name=name))
    if config.launch.launcher == "local":
        for address in (config.buffer.address, next_port(config.buffer.address)):
            try:
                Publisher(address, config.buffer.keys).close()
            except TransportError as error:
                raise TransportError(f"buffer.address={config.buffer.address}: {error}") from None
    return config


def with_own_keys(config: Config) -> Config:
    """The configuration with keys of the run's own, so that no other user of this machine can join,
    unless it names some, or spans machines to which the launcher does not bring them.
    """
    addresses = (config.buffer.address, config.weights.address)
    brought = config.launch.launcher == "ray" or all(map(is_loopback, addresses))
    if config.buffer.keys or not brought:
        return config
    folder = Path(config.run.dir) / config.run.name
    make_run_folder(folder)
    keys = keys_of_run(folder)
    return replace(config, buffer=replace(config.buffer, keys=keys))


def has_ended(config: Config) -> bool:
    """Whether a run to be resumed has recorded its last step and its last evaluation.

    Raises `ValueError` with the names of the runs that there are if there is no such run.
    """
    if not config.run.resume:
        return False
    folder = Path(config.run.dir) / config.run.name
    if not (folder / settings.NAME).exists():
        raise ValueError(no_such_run(folder))
    return RunDirectory.read(folder).num_steps >= config.run.steps


def free_name(config: Config) -> str:
    """`run.name`, or the first of run.name-2, run.name-3, ... whose directory has no run yet."""
    name, number = config.run.name, 1
    while not config.run.resume and (Path(config.run.dir) / name / "config.yaml").exists():
        number += 1
        name = f"{config.run.name}-{number}"
    return name


def commands_of(config: Config) -> list[Command]:
    """Every process in start order. Raises `ValueError` if a pool's description is invalid."""
    pools = list(pools_of(config))
    names = [pool.actors.name for pool, _, _ in pools]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise ValueError(
            f"launch.pools, cluster.pools: there is already a pool named {twice}; names must be "
            "unique, so add actors.name=ANOTHER to one of the two"
        )
    if config.launch.launcher == "local":  # on a cluster, another vLLM may be installed
        for pool, _, _ in pools:
            check_options(pool)
    commands = [Command("buffer", "buffer", ("-m", "buffer", "--config", CONFIG))]
    for pool, overrides, place in pools:
        gpus = pool.actors.num_engines * pool.actors.tensor_parallel
        commands.append(
            Command(
                "actors",
                "actors" if len(pools) == 1 else f"actors {pool.actors.name}",
                ("-m", "actors", "--config", CONFIG, *overrides),
                place.num_gpus or (gpus if engine_device(pool) == "cuda" else 0),
                place,
            )
        )
    device = engine_device(config) if config.learner.device == "auto" else config.learner.device
    place = config.cluster.learner
    ranks = place.num_gpus or (config.learner.num_ranks if device == "cuda" else 0)
    learner = ("-m", "learner", "--config", CONFIG)
    commands.append(Command("learner", "learner", learner, ranks, place))
    if config.run.trackers:
        folder = str(Path(config.run.dir) / config.run.name)
        commands.append(Command("tracker", "tracker", ("-m", "tools.track", folder, "--follow")))
    return commands


def pools_of(config: Config) -> Iterator[tuple[Config, tuple[str, ...], Place]]:
    """The configuration, the overrides and the place of each pool."""
    if not config.cluster.pools:
        yield config, (), Place()
    for overrides, place in pool_entries(config):
        where = f"cluster.pools, {overrides[0].removeprefix('actors.name=')}"
        yield with_overrides(config, overrides, where), overrides, place
    for entry in config.launch.pools:
        overrides = tuple(shlex.split(entry))
        yield with_overrides(config, overrides, f"launch.pools={entry!r}"), overrides, Place()


def with_overrides(config: Config, overrides: Sequence[str], where: str) -> Config:
    """A pool's own configuration. `where` is the place of its description, for an error."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(cli.to_yaml(config))
        file.flush()
        try:
            return cli.load(["--config", file.name, *overrides])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def share_gpus(commands: list[Command], gpus: Sequence[str]) -> list[Command]:
    """Give each process GPUs of its own if there are enough; otherwise all share every GPU."""
    left, shared = list(gpus), []
    if sum(math.ceil(command.num_gpus) for command in commands) > len(left):
        return commands
    for command in commands:
        count = math.ceil(command.num_gpus)
        own, left = left[:count], left[count:]
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
