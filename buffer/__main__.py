"""`python -m buffer`: the trajectory buffer of one run."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from buffer.processes import by_hand
from buffer.processes.stop_request import AGAIN, StopRequest
from buffer.service import Service
from buffer.wire.transport import TransportError
from configs.command import run_command
from configs.errors import ExitStatus, writing_to
from configs.schema import Config

YOUNG_OBJECTS = 50_000  # before a collection; messages and events make no cycles
CLOSE_S = 5.0  # time to tell the peers and close the files, after the learner's time is up


def run(config: Config) -> int:
    folder = Path(config.run.dir) / config.run.name
    with writing_to(folder):
        service = Service(config)

        def answer() -> None:
            print(f"stopping: {service.stop()}; {AGAIN}", file=sys.stderr, flush=True)

        gc.set_threshold(YOUNG_OBJECTS)
        with StopRequest(answer, config.run.stop_s + CLOSE_S):
            status = service.serve()
    step, steps = service.run.step, config.run.steps
    if status == ExitStatus.OK:
        by_hand.tell(f"buffer: the run has ended after {step} steps")
        by_hand.write_report(folder)
    else:
        again = "run.resume=true continues it"
        by_hand.tell(f"buffer: the run stopped after {step} of {steps} steps; {again}")
    return status


if __name__ == "__main__":
    by_hand.note_start()
    run_command(
        "The buffer of a run: it schedules the actors' rollouts by DARTS, and selects the "
        "trajectories on which the learner trains.",
        run,
        schema=Config,
        errors=(TransportError,),
    )
