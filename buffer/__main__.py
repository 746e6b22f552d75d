"""`python -m buffer`: the trajectory buffer of one run."""

import signal

from buffer.service import Service
from buffer.wire.transport import TransportError
from configs.cli import main
from configs.schema import Config


def run(config: Config) -> int:
    service = Service(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: service.stop())
    return service.serve()


if __name__ == "__main__":
    main(
        "The trajectory buffer: runs DARTS between actors and learner.",
        run,
        errors=(TransportError,),
    )
