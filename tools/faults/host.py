"""Starts the processes of a run under faults, each with its own proxy's address and its own log.

A `Host` of `tools.launching.supervision`. Owns the configuration files and logs in its folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from buffer.processes.private_folder import private_folder
from configs import cli
from configs.schema import Config
from tools.launching.processes import CONFIG, Command, LocalProcess


class LoggedProcess(LocalProcess):
    """A child process whose entire output is kept."""

    log: Path

    def lines(self) -> list[str]:
        lines = super().lines()
        if lines:
            with self.log.open("a") as file:
                file.write("".join(f"{time.monotonic():.2f} {line}\n" for line in lines))
        return lines


@dataclass
class Host:
    """`ports` are those of the proxies, by the names of the commands."""

    config: Config
    folder: Path
    ports: Mapping[str, int]
    _exit: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        self._exit.enter_context(private_folder(self.config.run.stop_s))
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def start(self, command: Command) -> LoggedProcess:
        config = deepcopy(self.config)
        config.buffer.address = f"tcp://127.0.0.1:{self.ports[command.name]}"
        file = config_file(self.folder, command.name)
        file.write_text(cli.to_yaml(config))
        arguments = [argument.replace(CONFIG, str(file)) for argument in command.arguments]
        process = LoggedProcess(command.name, [sys.executable, *arguments], command.environment)
        process.log = file.with_suffix(".log")
        return process


def config_file(folder: Path, name: str) -> Path:
    """The configuration file of the command `name`, which is part of its command line."""
    return folder / f"{name.replace('/', '-')}.yaml"
