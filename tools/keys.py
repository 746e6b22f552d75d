"""`python -m tools.keys FOLDER`: make the CURVE keys for a run on more than one machine.

Owns only the instructions; `buffer.wire.keys` makes the files. A run on one machine does not need
this command: `tools.launch` makes its keys.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from buffer.wire.keys import make_keys
from configs.command import run_command

NEXT_STEPS = """\
The keys are in {folder}. They encrypt all traffic of a run and admit only processes that have the
key of their role.
1. Machine of buffer and learner: copy the whole folder.
2. Machines of actors: copy engine.key_secret, buffer.key and learner.key.
3. Machines of monitors: copy monitor.key_secret and buffer.key.
4. Start every process with buffer.keys=FOLDER, and with addresses that all of them reach, such as
   buffer.address=tcp://10.0.0.5:5577 weights.address=tcp://10.0.0.5:5580
Keep the *.key_secret files secret (only you can read them) and out of version control."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=Path,
        help="folder for the keys; created if missing; existing keys are never overwritten",
    )


def run(given: argparse.Namespace) -> None:
    make_keys(given.folder)
    print(NEXT_STEPS.format(folder=given.folder))


def main() -> NoReturn:
    run_command("Make the CURVE keys for a run on more than one machine.", run, arguments=arguments)


if __name__ == "__main__":
    main()
