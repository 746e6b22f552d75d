"""The engines of one node: starts a worker process for each, restarts those that die, and leaves nothing behind.

Owns the worker processes, each the leader of a process group that holds its vLLM processes too. Never speaks to the buffer: a worker
does, and its hello after a restart tells the buffer that what its predecessor had in flight is lost. Driven by `python -m actors`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from actors.worker import COULD_NOT_START, DONE, RUN_FAILED
from configs import cli
from configs.schema import Config

POLL_S = 0.1
STOP_S = 8.0  # vLLM's processes end within two or three; then they are killed
ROOT = Path(__file__).resolve().parents[1]


class EngineFailed(Exception):
    """An engine that cannot run, or a run that failed. One line that names the engine and says why."""


@dataclass
class Worker:
    """One engine's process. `errors`: the pipe on which it says why it ends."""

    engine_id: str
    index: int
    process: subprocess.Popen[bytes]
    errors: int
    restarts: int = 0

    def ended(self) -> bool:
        """Whether it is dead, without forgetting its id: its group can still be killed by it."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def bury(self) -> tuple[int, str]:
        """Kill what is left of its group, and return its status and its last words."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it left nothing
        status = self.process.wait()
        os.set_blocking(self.errors, False)
        try:
            words = os.read(self.errors, 1 << 16).decode(errors="replace").strip()
        except BlockingIOError:
            words = ""
        os.close(self.errors)
        return status, words or (f"killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}")


class Pool:
    """`actors.engines` workers, until the run ends."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stopping = False
        self._workers: list[Worker] = []
        self._config_fd = os.memfd_create("config.yaml")  # read by workers; vanishes with us
        os.write(self._config_fd, cli.to_yaml(config).encode())

    def run(self) -> int:
        """Returns 0 when the buffer ended the run or a signal asked for it. Raises `EngineFailed`."""
        check_model(self._config.model.path)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        try:
            self._workers = [self._start(index) for index in range(self._config.actors.engines)]
            while self._workers and not self._stopping:
                for worker in [worker for worker in self._workers if worker.ended()]:
                    self._workers.remove(worker)
                    self._replace(worker, *worker.bury())
                time.sleep(POLL_S)
            return 0
        finally:
            self._stop()

    def _ask_to_stop(self, number: int, frame: object) -> None:
        self._stopping = True

    def _start(self, index: int) -> Worker:
        read, write = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "actors.worker", str(index), f"/proc/self/fd/{self._config_fd}", str(write), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            pass_fds=(self._config_fd, write),
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
        )
        os.close(write)
        return Worker(f"{self._config.actors.name}/{index}", index, process, read)

    def _replace(self, worker: Worker, status: int, words: str) -> None:
        if status == DONE:
            return
        if status == COULD_NOT_START:
            raise EngineFailed(f"engine {worker.engine_id} {words}")
        if status == RUN_FAILED:
            raise EngineFailed(f"the run failed: {words}")
        if worker.restarts >= self._config.actors.max_restarts:
            raise EngineFailed(
                f"engine {worker.engine_id} died {worker.restarts + 1} times (actors.max_restarts={self._config.actors.max_restarts}); last: {words}"
            )
        restarts = worker.restarts + 1
        print(
            f"actors: engine {worker.engine_id} died ({words}); restart {restarts} of {self._config.actors.max_restarts}", file=sys.stderr
        )
        successor = self._start(worker.index)
        successor.restarts = restarts
        self._workers.append(successor)

    def _stop(self) -> None:
        """End every worker and all its processes, in seconds."""
        for worker in self._workers:
            worker.process.terminate()
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and not all(worker.ended() for worker in self._workers):
            time.sleep(POLL_S)
        for worker in self._workers:
            worker.bury()
        self._workers = []
        os.close(self._config_fd)


def check_model(path: str) -> None:
    """`ValueError` where `model.path` can be neither a model's folder nor the name of one on the hub."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"model.path={path}: no model is in this folder (config.json is missing); give the folder of a Hugging Face model"
            )
    elif folder.parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith(("models/", "runs/")):
        raise ValueError(
            f"model.path={path}: no such folder; give the folder of a Hugging Face model, or its name on the hub. "
            "The embedded default is made by `make demo`"
        )
