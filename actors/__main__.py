"""`python -m actors [key=value ...]`: this node's engines for the run at `buffer.address`."""

from __future__ import annotations

from actors.pool import EngineFailed, Pool
from buffer.processes.private_folder import private_folder
from configs.command import run_command
from configs.schema import Config


def run(config: Config) -> int:
    with private_folder():
        return Pool(config).run()


if __name__ == "__main__":
    run_command(
        "A pool of engines: starts actors.num_engines vLLM engines on this node, which generate "
        "for the buffer at buffer.address.",
        run,
        schema=Config,
        errors=(EngineFailed,),
    )
