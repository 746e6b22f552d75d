"""`python -m tools.keys FOLDER`: make the CURVE keys for a run on more than one machine.

Owns only the creation of the four key files; `buffer.wire.transport` reads them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

import zmq.auth

from buffer.wire.transport import CLIENT_FILES, SERVER_FILES
from configs.command import run_command

NEXT_STEPS = """\
The keys are in {folder}. They encrypt all traffic of a run and admit only processes that have them.
1. Learner and buffer nodes: copy the whole folder.
2. Actor nodes and monitors: copy only client.key_secret and server.key.
3. Start every process with buffer.keys=FOLDER, and with addresses that all of them reach, such as
   buffer.address=tcp://10.0.0.5:5577 weights.address=tcp://10.0.0.6:5580
Keep the *.key_secret files secret (only you can read them) and out of version control."""


def make_keys(folder: Path) -> None:
    """Write server and client key pairs.

    Raises `ValueError` and writes nothing if one of the files exists.
    """
    existing = [name for name in (*SERVER_FILES, *CLIENT_FILES) if (folder / name).exists()]
    if existing:
        raise ValueError(
            f"{folder} already holds {', '.join(existing)}; replacing them would lock out running "
            "processes, so name another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # No other user may read a secret, not even while it is being written.
    umask = os.umask(0o077)
    try:
        for name in ("server", "client"):
            _, secret = zmq.auth.create_certificates(folder, name)
            os.chmod(secret, 0o600)
    finally:
        os.umask(umask)


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
