"""`python -m darts.simulate [key=value ...]`: hours of a run in minutes, without a GPU."""

from __future__ import annotations

from pathlib import Path

from configs import cli
from configs.command import run_command
from darts.simulate.schema import SimulateConfig
from darts.simulate.tally import Files
from darts.simulate.world import report, simulate


def run(config: SimulateConfig) -> None:
    files = Files(Path(config.run.out), cli.to_yaml(config)) if config.run.out else None
    print(report(simulate(config, files)))


if __name__ == "__main__":
    run_command(
        "Simulate a run: the same decisions at any scale, in virtual time, without a GPU.",
        run,
        schema=SimulateConfig,
    )
