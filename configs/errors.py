"""How an expected error leaves a process: as one line, and with an exit status.

Imports nothing of ours, so that every layer can use it. Driven by `configs.command`.
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

MAX_CHARS = 1000
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class ExitStatus(IntEnum):
    """The exit statuses of every command."""

    OK = 0
    FAILED = 1
    REFUSED = 2
    TRY_AGAIN = 75  # EX_TEMPFAIL
    INTERRUPTED = 130  # 128 + SIGINT, for any signal that asks it to stop
    READER_GONE = 141  # 128 + SIGPIPE


EXIT_STATUSES = """\
exit status:
  0     it ended well
  1     it failed; a line "error: ..." on stderr says why
  2     the command line, the configuration or an input that they name was refused
  75    it was cut off, and may succeed if it is started again with run.resume=true
  130   it was asked to stop, by Ctrl-C or SIGTERM"""


def one_line(error: BaseException, with_type: bool = False) -> str:
    """The error on one line: its message, after its type if `with_type` or if it has no message."""
    name, message = type(error).__name__, " ".join(str(error).split())[:MAX_CHARS]
    if not message:
        return name
    return f"{name}: {message}" if with_type else message


def advice(error: BaseException) -> str:
    """The remedy for an error that the system reports, "" if none is known."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return "; free some space, or write elsewhere with run.dir=FOLDER"
    return ""


@contextmanager
def writing_to(folder: Path) -> Generator[None]:
    """Have the error of a full disk name `folder`, unless it names a file.

    A failed write knows no name, and a run may write to several disks.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            error.filename = str(folder)
        raise
