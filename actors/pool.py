"""The engines of one node: starts a process for each, restarts those that die, and leaves nothing behind.

Owns those processes, each the leader of a group that holds its vLLM processes too. Never speaks to the buffer: each engine does, and
its hello after a restart, before its model is loaded, says that what its predecessor had in flight is lost. Driven by `python -m actors`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from actors.device import engine_device
from actors.process import DONE, GAVE_UP, RUN_FAILED
from configs import cli
from configs.schema import Config

POLL_S = 0.1
STOP_S = 10.0  # vLLM's processes end within three seconds as a rule; then they are killed
ROOT = Path(__file__).resolve().parents[1]


class EngineFailed(Exception):
    """An engine that cannot run, or a run that failed. One line that names the engine and says why."""


@dataclass
class EngineProcess:
    """One engine's process. `errors`: the pipe on which it says why it ends."""

    engine_id: str
    index: int
    process: subprocess.Popen[bytes]
    errors: int
    restarts: int

    def ended(self) -> bool:
        """Whether it is dead. Leaves it unburied, so that its group can still be killed by its id."""
        return (
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        )

    def bury(self) -> tuple[int, str]:
        """Kill what is left of its group, and return its status and its last words."""
        with contextlib.suppress(ProcessLookupError):  # it left nothing
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        os.set_blocking(self.errors, False)
        try:
            words = os.read(self.errors, 1 << 16).decode(errors="replace").strip()
        except BlockingIOError:
            words = ""
        os.close(self.errors)
        return status, words or (
            f"killed by {signal.Signals(-status).name}"
            if status < 0
            else f"exited with status {status}"
        )


class Pool:
    """`actors.num_engines` engines, until the run ends."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._signal = 0  # the one that stops the pool
        self._engines: list[EngineProcess] = []
        self._config_fd = os.memfd_create(
            "config.yaml"
        )  # read by the engines' processes; vanishes with us
        os.write(self._config_fd, cli.to_yaml(config).encode())

    def run(self) -> int:
        """Returns 0 when the buffer ended the run, 128 + N when signal N stopped the pool.

        Raises `EngineFailed`, or `ValueError` for `model.path`.
        """
        check_model(self._config.model.path)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        try:
            self._engines = [self._start(index) for index in range(self._config.actors.num_engines)]
            while self._engines and not self._signal:
                time.sleep(POLL_S)
                for engine in [engine for engine in self._engines if engine.ended()]:
                    self._engines.remove(engine)
                    status, words = engine.bury()
                    if status != DONE:
                        self._engines.append(self._successor(engine, status, words))
            return 128 + self._signal if self._signal else 0
        finally:
            self._stop()

    def _ask_to_stop(self, number: int, frame: object) -> None:
        self._signal = number

    def _command(self, index: int, errors: int) -> list[str]:
        return [
            sys.executable,
            "-m",
            "actors.process",
            str(index),
            f"/proc/self/fd/{self._config_fd}",
            str(errors),
            str(os.getpid()),
        ]

    def _start(self, index: int, restarts: int = 0) -> EngineProcess:
        read, write = os.pipe()
        process = subprocess.Popen(
            self._command(index, write),
            stdin=subprocess.DEVNULL,
            pass_fds=(self._config_fd, write),
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(
                    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
                ),
                **engine_gpus(self._config, index, os.environ.get("CUDA_VISIBLE_DEVICES", "")),
            },
        )
        os.close(write)
        return EngineProcess(f"{self._config.actors.name}/{index}", index, process, read, restarts)

    def _successor(self, engine: EngineProcess, status: int, words: str) -> EngineProcess:
        """A fresh process for an engine that died. `EngineFailed` where another would end the same way."""
        most = self._config.actors.max_restarts
        if status == GAVE_UP:
            raise EngineFailed(f"engine {engine.engine_id} {words}")
        if status == RUN_FAILED:
            raise EngineFailed(f"the run failed: {words}")
        if engine.restarts >= most:
            raise EngineFailed(
                f"engine {engine.engine_id} died {most + 1} times (actors.max_restarts={most}); last: {words}"
            )
        print(
            f"actors: engine {engine.engine_id} died ({words}); restart {engine.restarts + 1} of {most}",
            file=sys.stderr,
            flush=True,
        )
        return self._start(engine.index, engine.restarts + 1)

    def _stop(self) -> None:
        """End every engine and all its processes, in seconds."""
        for engine in self._engines:
            engine.process.terminate()
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and not all(engine.ended() for engine in self._engines):
            time.sleep(POLL_S)
        for engine in self._engines:
            engine.bury()
        self._engines = []
        os.close(self._config_fd)


def engine_gpus(config: Config, index: int, visible: str) -> dict[str, str]:
    """The environment that gives engine `index` its own `tensor_parallel` of the visible GPUs; nothing on a CPU.

    `visible` is CUDA_VISIBLE_DEVICES; empty: all from 0. `ValueError` where it names too few. Never run on a GPU by us.
    """
    if engine_device(config) != "cuda":
        return {}
    size, engines = config.actors.tensor_parallel, config.actors.num_engines
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(engines * size)]
    if len(gpus) < engines * size:
        raise ValueError(
            f"actors.num_engines={engines} x actors.tensor_parallel={size} need {engines * size} GPUs, but CUDA_VISIBLE_DEVICES={visible} "
            f"names {len(gpus)}: start fewer engines here"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * size : (index + 1) * size])}


def check_model(path: str) -> None:
    """`ValueError` where `model.path` can be neither a model's folder nor the name of one on the hub."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"model.path={path}: this folder holds no model (no config.json); give the folder of a Hugging Face model"
            )
    elif (
        folder.parent.is_dir()
        or not re.fullmatch(r"[\w.-]+/[\w.-]+", path)
        or path.startswith(("models/", "runs/"))
    ):
        raise ValueError(
            f"model.path={path}: no such folder; give the folder of a Hugging Face model, or its name on the hub. "
            "The embedded default is made by `make demo`"
        )
