"""`python -m buffer`: the trajectory buffer of one run."""

from __future__ import annotations

import signal

from buffer.service import Service
from buffer.wire.transport import TransportError
from configs.command import run_command
from configs.errors import ExitStatus
from configs.schema import Config


def run(config: Config) -> int:
    service, signals = Service(config), []

    def stop(number: int, frame: object) -> None:
        signals.append(number)
        service.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    status = service.serve()
    return 128 + signals[0] if status == ExitStatus.INTERRUPTED else status


if __name__ == "__main__":
    run_command(
        "The buffer of a run: decides by DARTS what the actors generate and what the learner "
        "trains on.",
        run,
        schema=Config,
        errors=(TransportError,),
    )
