"""`python -m buffer`: the trajectory buffer of one run."""

from __future__ import annotations

import sys

from buffer.processes.stop_request import AGAIN, StopRequest
from buffer.service import Service
from buffer.wire.transport import TransportError
from configs.command import run_command
from configs.schema import Config

CLOSE_S = 5.0  # to tell the peers and close the files, once the learner has had its time


def run(config: Config) -> int:
    service = Service(config)

    def answer() -> None:
        print(f"stopping: {service.stop()}; {AGAIN}", file=sys.stderr, flush=True)

    with StopRequest(answer, config.run.stop_s + CLOSE_S):
        return service.serve()


if __name__ == "__main__":
    run_command(
        "The buffer of a run: decides by DARTS what the actors generate and what the learner "
        "trains on.",
        run,
        schema=Config,
        errors=(TransportError,),
    )
