"""Why vLLM failed, in one line instead of several tracebacks from several processes.

vLLM logs the cause of a failure in the process in which it happens, and raises "see root cause
above" in others. A `CauseKeeper` on its loggers writes the cause to a file that lives as long as
the frontend. Tracebacks of a failed start are shown only if VLLM_LOGGING_LEVEL asks for progress.
Installed by `actors.inference.engine` in the frontend, and by `actors.inference.extension` in
vLLM's own processes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from configs.errors import one_line

CAUSE_FILE = "DARTS_CAUSE_FILE"
AT_START = ("vllm.model_executor.models.registry",)  # logged by the frontend itself
IN_CORE = ("vllm.v1.engine.core",)
VERBOSE = ("DEBUG", "INFO", "WARNING")
FAILED_START = "EngineCore failed to start."


class CauseKeeper(logging.Filter):
    """Writes the exceptions that are logged to the file named by `CAUSE_FILE`."""

    def filter(self, record: logging.LogRecord) -> bool:
        error, path = record.exc_info[1] if record.exc_info else None, os.environ.get(CAUSE_FILE)
        if error is None or path is None:
            return True
        with open(path, "a") as file:
            file.write(f"{last_line(error)}\n")
        if os.environ.get("VLLM_LOGGING_LEVEL") in VERBOSE:
            return True
        if record.getMessage() == FAILED_START:
            # Python would print the traceback as well, and nothing has to be cleaned up.
            os._exit(1)
        return record.name not in AT_START


def install(loggers: Sequence[str]) -> None:
    """Keep the causes that these loggers get in this process."""
    for name in loggers:
        logger = logging.getLogger(name)
        if not any(isinstance(present, CauseKeeper) for present in logger.filters):
            logger.addFilter(CauseKeeper())


def last_line(error: BaseException) -> str:
    """An exception in one line. If it quotes a traceback, that is its last line."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        return text.splitlines()[-1][:500]
    return one_line(error, with_type=True)[:500]


class Causes:
    """The frontend's file of causes, for itself and for the processes that it starts later."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("vllm-causes")
        self._path = f"/proc/{os.getpid()}/fd/{self._fd}"
        os.environ[CAUSE_FILE] = self._path
        install(AT_START)

    def first(self) -> str:
        """The first cause so far, from which later errors follow. "" if there is none."""
        return next(iter(Path(self._path).read_text().splitlines()), "")

    def close(self) -> None:
        os.close(self._fd)
