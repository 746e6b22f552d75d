"""`python -m buffer`: the trajectory buffer of one run."""

from __future__ import annotations

import sys
from pathlib import Path

from buffer.processes.stop_request import AGAIN, StopRequest
from buffer.service import Service
from buffer.wire.transport import TransportError
from configs.command import run_command
from configs.errors import writing_to
from configs.schema import Config

CLOSE_S = 5.0  # time to tell the peers and close the files, after the learner's time is up


def run(config: Config) -> int:
    with writing_to(Path(config.run.dir) / config.run.name):
        service = Service(config)

        def answer() -> None:
            print(f"stopping: {service.stop()}; {AGAIN}", file=sys.stderr, flush=True)

        with StopRequest(answer, config.run.stop_s + CLOSE_S):
            return service.serve()


if __name__ == "__main__":
    run_command(
        "The buffer of a run: it schedules the actors' rollouts by DARTS, and selects the "
        "trajectories on which the learner trains.",
        run,
        schema=Config,
        errors=(TransportError,),
    )
