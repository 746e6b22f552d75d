"""The processes of a run as text: the commands of each machine, and a batch script for Slurm.

Owns these texts. Starts nothing and writes no file. `tools.launch` prints them if launch.launcher
asks for them; `tools.launching.kubernetes` has the manifests.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf

from buffer.wire.transport import is_loopback
from configs import cli
from configs.schema import Config, Place
from tools.launching.kubernetes import RENDEZVOUS_PORT, kubernetes
from tools.launching.placement import group_variables
from tools.launching.processes import CONFIG, Command
from tools.launching.run_plan import commands_of

PYTHON = ".venv/bin/python"
FILE = "run.yaml"


def script(config: Config) -> str:
    """The text that `launch.launcher` asks for.

    Raises `ValueError` if the run cannot span machines.
    """
    if is_loopback(config.buffer.address):
        raise ValueError(
            f"launch.launcher={config.launch.launcher}: buffer.address={config.buffer.address} "
            "cannot be reached from other machines; use buffer.address=tcp://0.0.0.0:5577, "
            "weights.address=tcp://0.0.0.0:* and buffer.keys=keys"
        )
    if not config.buffer.keys:
        raise ValueError(
            f"launch.launcher={config.launch.launcher}: buffer.keys is empty, and processes on "
            "several machines must have keys; set buffer.keys=keys (`python -m tools.keys keys` "
            "makes them)"
        )
    return SCRIPTS[config.launch.launcher](config, commands_of(config))


def run_file(config: Config) -> str:
    """The keys that differ from their defaults, as YAML."""
    own = OmegaConf.create()
    for change in cli.changes(Config(), config):
        if change.path != "launch.launcher":
            value: Any = OmegaConf.select(OmegaConf.structured(config), change.path)
            OmegaConf.update(own, change.path, value)
    return OmegaConf.to_yaml(own)


def _commands(config: Config, commands: list[Command]) -> str:
    """The configuration file, and each process with the machine that it needs."""
    host, port = _host_and_port(config)
    lines = [
        "# On every machine, in the folder of the repository:",
        *_file(config),
        f"# Once; it says which files each machine needs: {PYTHON} -m tools.keys "
        f"{config.buffer.keys}",
    ]
    for command in commands:
        line = _line(command)
        if host == "BUFFER_HOST" and command.role in ("actors", "learner"):
            line += f" buffer.address=tcp://{host}:{port}"
        for node in range(command.place.num_nodes):
            prefix = _group(command, str(node), "FIRST_LEARNER_HOST")
            number = f" {node + 1} of {command.place.num_nodes}" if prefix else ""
            lines += ["", f"# {command.name}{number}: on {_machine(command, host)}", prefix + line]
    return "\n".join([*lines, ""])


def _slurm(config: Config, commands: list[Command]) -> str:
    """One heterogeneous job. Buffer, tracker and learner share its first component."""
    _, port = _host_and_port(config)
    learner = next(command for command in commands if command.role == "learner")
    pools = [command for command in commands if command.role == "actors"]
    lines = ["#!/bin/bash", f"#SBATCH --job-name={shlex.quote(config.run.name)}"]
    lines += _component(learner)
    for pool in pools:
        lines += ["#SBATCH hetjob", *_component(pool)]
    lines += [
        "set -euo pipefail",
        'cd "$SLURM_SUBMIT_DIR"  # on storage that all nodes share',
        "host=$(hostname -I | cut -d' ' -f1)",
        f"address=tcp://$host:{port}",
        "export host address",
        f"[ -e {config.buffer.keys} ] || {PYTHON} -m tools.keys {config.buffer.keys}",
        *_file(config),
    ]
    groups = {"buffer": 0, "learner": 0, "tracker": 0}
    groups |= {pool.name: number for number, pool in enumerate(pools, 1)}
    for command in commands:
        nodes = command.place.num_nodes
        prefix = _group(command, "$SLURM_PROCID", "$host")
        start = (
            f"srun --het-group={groups[command.name]} --nodes={nodes} --ntasks={nodes} --overlap"
        )
        line = _line(command)
        if command.role != "tracker":
            line += ' "buffer.address=$address"'
        if prefix:
            line = f"bash -c {shlex.quote(prefix + 'exec ' + line)}"
        lines.append(f"{start} {line} &")
        if command.role in ("buffer", "tracker"):
            lines.append(f"{command.role}=$!")
    lines.append('wait "$buffer"')
    if any(command.role == "tracker" for command in commands):
        # It follows the run until a signal, and then logs the rest. srun passes the signal on.
        lines.append('kill "$tracker" || true')
    return "\n".join([*lines, "wait", ""])


SCRIPTS: dict[str, Callable[[Config, list[Command]], str]] = {
    "commands": _commands,
    "slurm": _slurm,
    "kubernetes": lambda config, commands: kubernetes(config, commands, run_file(config)),
}


def _file(config: Config) -> list[str]:
    return [f"cat > {FILE} <<'END'", run_file(config).rstrip("\n"), "END"]


def _line(command: Command) -> str:
    arguments = [argument.replace(CONFIG, FILE) for argument in command.arguments]
    return shlex.join([PYTHON, *arguments])


def _group(command: Command, node: str, first: str) -> str:
    variables = group_variables(command.place, node, first, RENDEZVOUS_PORT)
    return "".join(f"{name}={value} " for name, value in variables.items())


def _machine(command: Command, host: str) -> str:
    place: Place = command.place
    if command.role in ("buffer", "tracker"):
        return host
    needs = [f"{command.num_gpus:g} GPUs" if command.num_gpus else ""]
    needs += [place.accelerator_type and f"of type {place.accelerator_type}"]
    needs += [f"{name}: {value}" for name, value in (place.labels | place.resources).items()]
    return f"a machine with {', '.join(filter(None, needs))}" if any(needs) else "any machine"


def _component(command: Command) -> list[str]:
    """The options of the part of a job that runs `command`."""
    place: Place = command.place
    kind = f"{place.accelerator_type.lower()}:" if place.accelerator_type else ""
    options = [f"--nodes={place.num_nodes}", "--ntasks-per-node=1"]
    if command.num_gpus:
        options.append(f"--gres=gpu:{kind}{math.ceil(command.num_gpus)}")
    if place.labels:
        options.append(f"--constraint={'&'.join(str(value) for value in place.labels.values())}")
    return [f"#SBATCH {option}" for option in options]


def _host_and_port(config: Config) -> tuple[str, str]:
    host, _, port = config.buffer.address.removeprefix("tcp://").rpartition(":")
    return ("BUFFER_HOST" if re.fullmatch(r"0\.0\.0\.0|\*", host) else host), port
