"""`python -m tools.faults.launcher FILE`: the launcher, for a run whose processes have proxies.

FILE holds a `Launch`. Everything but the table of processes is `tools.launch` itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from configs import cli
from configs.schema import Config
from tools import launch
from tools.faults.host import Host
from tools.launching.processes import Command
from tools.launching.run_plan import has_ended


class Launch(msgspec.Struct):
    """Everything that a launcher is told. `config_yaml` is the run's configuration."""

    config_yaml: str
    folder: str
    ports: dict[str, int]
    commands: list[Command]


def main(file: Path) -> int:
    given = msgspec.json.decode(file.read_bytes(), type=Launch)
    yaml = file.with_suffix(".yaml")
    yaml.write_text(given.config_yaml)
    config = cli.load(["--config", str(yaml)])
    assert isinstance(config, Config)
    if has_ended(config):
        return 0
    host = Host(config, Path(given.folder), given.ports)
    return launch.exit_status(lambda: launch.conduct(config, host, given.commands))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
