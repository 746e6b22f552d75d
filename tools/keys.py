"""`python -m tools.keys FOLDER`: make the CURVE keys that a run beyond one machine needs.

Owns the creation of the four key files, nothing else; `buffer.wire.transport` reads them.
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
Keys are in {folder}. They encrypt everything that a run sends, and let in only who holds them.
1. Learner and buffer nodes: copy the whole folder.
2. Actor nodes and monitors: copy only client.key_secret and server.key.
3. Start every process with buffer.keys=FOLDER, and with an address that the others reach, such as
   buffer.address=tcp://10.0.0.5:5577 weights.address=tcp://10.0.0.6:5580
Keep the *.key_secret files secret (they are readable by you alone), and out of version control."""


def make_keys(folder: Path) -> None:
    """Write server and client key pairs; ValueError, with nothing written, where one of the files exists."""
    existing = [name for name in (*SERVER_FILES, *CLIENT_FILES) if (folder / name).exists()]
    if existing:
        raise ValueError(
            f"{folder} already holds {', '.join(existing)}; replacing them would lock out running processes: name another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    umask = os.umask(
        0o077
    )  # so that a secret is never readable by others, not even while it is written
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
        help="folder for the keys; it is created if it is missing, and keys are never overwritten",
    )


def run(given: argparse.Namespace) -> None:
    make_keys(given.folder)
    print(NEXT_STEPS.format(folder=given.folder))


def main() -> NoReturn:
    run_command(
        "Make the CURVE keys that a run beyond one machine needs.", run, arguments=arguments
    )


if __name__ == "__main__":
    main()
