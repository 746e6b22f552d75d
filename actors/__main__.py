"""`python -m actors [key=value ...]`: this node's engines for the run at `buffer.address`."""

from __future__ import annotations

from typing import NoReturn

from actors.pool import EngineFailed, Pool
from buffer.processes import by_hand
from buffer.processes.private_folder import private_folder
from configs.command import run_command
from configs.errors import ExitStatus
from configs.schema import Config


def run(config: Config) -> int:
    with private_folder():
        status = Pool(config).run()
    if status == ExitStatus.OK:
        by_hand.tell("actors: the run has ended")
    return status


def main() -> NoReturn:
    by_hand.note_start()
    run_command(
        "A pool of engines: starts actors.num_engines vLLM engines on this node, which generate "
        "for the buffer at buffer.address.",
        run,
        schema=Config,
        errors=(EngineFailed,),
    )


if __name__ == "__main__":
    main()
