"""The engines of one node: starts a process for each, restarts those that die, and ends all with
it.

Owns those processes, and how often each is restarted. An engine that fails is its own loss: the
others go on. Never speaks to the buffer: each engine does, and its hello after a restart, before
its model is loaded, says that its predecessor's rollouts are lost. Driven by `python -m actors`.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from actors.inference.device import engine_device
from actors.process import DONE, GAVE_UP, RUN_FAILED
from buffer.processes.child import Child, forward, given_reason, stop
from buffer.processes.restarts import Restarts
from buffer.processes.stop_request import AGAIN, StopRequest
from configs import cli
from configs.errors import ExitStatus
from configs.schema import Config

FINAL = (DONE, GAVE_UP, RUN_FAILED, ExitStatus.INTERRUPTED)  # after these, no other attempt is made
POLL_S = 0.1
STOP_S = 10.0  # vLLM's processes usually end within three seconds; then they are killed


class EngineFailed(Exception):
    """No engine of the pool is left to work. One line that says why."""


@dataclass
class EngineProcess:
    """One engine: its present process, and how often it may still be restarted."""

    engine_id: str
    index: int
    process: Child
    restarts: Restarts

    def why_it_ended(self) -> str:
        return given_reason(self.process.last_lines) or self.process.how_it_ended()

    def parting(self) -> str:
        """A sentence on its end for good."""
        status, why = self.process.status(), self.why_it_ended()
        if status == RUN_FAILED:
            return f"the run failed for engine {self.engine_id}: {why}"
        if status in FINAL:
            return f"engine {self.engine_id} {why}"
        return (
            f"engine {self.engine_id} died {self.restarts.most + 1} times within "
            f"{self.restarts.window_s:g} s (actors.max_restarts={self.restarts.most}); last: {why}"
        )


class Pool:
    """`actors.num_engines` engines, until the run ends."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._engines: list[EngineProcess] = []
        self._config_file = ""  # for the engines

    def run(self) -> int:
        """Returns 0 once the run has ended well, 130 if the pool or its last engine was asked to
        leave. Raises `EngineFailed`, or `ValueError` for `model.path`.
        """
        check_model(self._config.model.path)
        with (
            StopRequest(self._answer) as request,
            tempfile.NamedTemporaryFile("w", suffix=".yaml") as file,
        ):
            file.write(cli.to_yaml(self._config))
            file.flush()
            self._config_file = file.name
            try:
                self._engines = [self._engine(i) for i in range(self._config.actors.num_engines)]
                last_status = DONE
                while self._engines and not request.requested:
                    time.sleep(POLL_S)
                    last_status = self._look_after_engines()
            finally:
                processes = [engine.process for engine in self._engines]
                stop(processes, STOP_S, hurry=lambda: request.repeated)
        return ExitStatus.INTERRUPTED if request.requested else last_status

    def _answer(self) -> None:
        line = f"stopping: the engines leave, up to {STOP_S:g} s; {AGAIN}"
        print(line, file=sys.stderr, flush=True)

    def _look_after_engines(self) -> int:
        """Restart engines that died, and part with those that have ended for good.

        Returns the status of the last one of those. `EngineFailed` if it failed and none is left.
        """
        status, partings = DONE, list[str]()
        for engine in list(self._engines):
            forward(engine.process)
            if engine.process.status() is None or self._restart(engine):
                continue
            status = engine.process.status() or DONE
            self._engines.remove(engine)
            if status != DONE:
                partings.append(engine.parting())
        if partings and not self._engines and status not in (DONE, ExitStatus.INTERRUPTED):
            raise EngineFailed(partings[-1])
        left = len(self._engines)
        for parting in partings:
            say(f"{parting}; " + (f"the pool goes on with {left}" if left else "none is left"))
        return status

    def _restart(self, engine: EngineProcess) -> bool:
        """Start an engine again that has ended, unless it is known to end the same way."""
        if engine.process.status() in FINAL or not (number := engine.restarts.take()):
            return False
        say(
            f"engine {engine.engine_id} died ({engine.why_it_ended()}); "
            f"restart {number} of {engine.restarts.most}"
        )
        engine.process = self._start(engine.index)
        return True

    def _engine(self, index: int) -> EngineProcess:
        actors = self._config.actors
        restarts = Restarts(actors.max_restarts, actors.restart_window_s)
        return EngineProcess(f"{actors.name}/{index}", index, self._start(index), restarts)

    def _start(self, index: int) -> Child:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = engine_gpus(self._config, index, visible)
        return Child(f"engine {index}", self._command(index), gpus)

    def _command(self, index: int) -> list[str]:
        return [sys.executable, "-m", "actors.process", str(index), self._config_file]


def say(line: str) -> None:
    print(f"actors: {line}", file=sys.stderr, flush=True)


def engine_gpus(config: Config, index: int, visible: str) -> dict[str, str]:
    """The environment that gives engine `index` its own `tensor_parallel` of the visible GPUs;
    nothing on a CPU.

    `visible` is CUDA_VISIBLE_DEVICES; empty: all from 0. Raises `ValueError` if it names too few.
    We have never run this on a GPU.
    """
    if engine_device(config) != "cuda":
        return {}
    size, engines = config.actors.tensor_parallel, config.actors.num_engines
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(engines * size)]
    if len(gpus) < engines * size:
        raise ValueError(
            f"actors.num_engines={engines} x actors.tensor_parallel={size} need {engines * size} "
            f"GPUs, but CUDA_VISIBLE_DEVICES={visible} "
            f"names {len(gpus)}: start fewer engines here"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * size : (index + 1) * size])}


def check_model(path: str) -> None:
    """Raise `ValueError` if `model.path` can be neither a model's folder nor the name of one on the
    hub.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"model.path={path}: this folder holds no model (no config.json); give the folder "
                "of a Hugging Face model"
            )
    elif (
        folder.parent.is_dir()
        or not re.fullmatch(r"[\w.-]+/[\w.-]+", path)
        or path.startswith(("models/", "runs/"))
    ):
        raise ValueError(
            f"model.path={path}: no such folder; give the folder of a Hugging Face model, or its "
            "name on the hub. "
            "The embedded default is made by `make demo`"
        )
