"""The engines of one node: starts a process for each, restarts those that die, and ends them all.

Owns these processes and their numbers of restarts. An engine that fails does not affect the others.
Never talks to the buffer, because each engine does. A restarted engine says hello before it loads
its model, which tells the buffer that its predecessor's rollouts are lost. Driven by
`python -m actors`.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass

from actors.inference.device import check_cache, check_device, engine_device
from actors.inference.vllm_options import check_options
from actors.process import DONE, GAVE_UP, RUN_FAILED
from buffer.processes.child import Child, forward, given_reason, stop
from buffer.processes.restarts import Restarts
from buffer.processes.stop_request import AGAIN, StopRequest
from configs import cli
from configs.errors import ExitStatus
from configs.model_path import check_model
from configs.schema import Config

ENGINE = ("-m", "actors.process")  # of `sys.executable`
# An engine that ended with one of these statuses is not restarted.
FINAL = (DONE, GAVE_UP, RUN_FAILED, ExitStatus.INTERRUPTED)
POLL_S = 0.1
STOP_S = 10.0  # after this, vLLM's processes are killed; they usually end within 3 s


class EngineFailed(Exception):
    """The pool has no engine left. The message is one line that says why."""


@dataclass
class EngineProcess:
    """One engine: its present process, and the restarts that it has left."""

    engine_id: str
    index: int
    process: Child
    restarts: Restarts

    def why_it_ended(self) -> str:
        return given_reason(self.process.last_lines) or self.process.how_it_ended()

    def final_report(self) -> str:
        """A sentence about an end after which the engine is not restarted."""
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
        """Run the engines until the run ends.

        Returns 0 if it ended well, and 130 if the pool or its last engine was asked to stop. Raises
        `EngineFailed`, or `ValueError` for `model.path`, `actors.device` or `actors.vllm`.
        """
        check_model(self._config.model.path)
        check_device(self._config)
        check_options(self._config)
        check_cache(self._config)
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
        line = f"stopping: the engines end, up to {STOP_S:g} s; {AGAIN}"
        print(line, file=sys.stderr, flush=True)

    def _look_after_engines(self) -> int:
        """Restart engines that died, and remove those that have ended for good.

        Returns the status of the last one removed. Raises `EngineFailed` if it failed and no engine
        is left.
        """
        status, reports = DONE, list[str]()
        for engine in list(self._engines):
            has_ended = engine.process.status() is not None
            forward(engine.process)  # after that look, so that its last lines are among them
            if not has_ended or self._restart(engine):
                continue
            status = engine.process.status() or DONE
            self._engines.remove(engine)
            if status != DONE:
                reports.append(engine.final_report())
        if reports and not self._engines and status not in (DONE, ExitStatus.INTERRUPTED):
            raise EngineFailed(reports[-1])
        left = len(self._engines)
        for report in reports:
            say(f"{report}; " + (f"the pool continues with {left}" if left else "none is left"))
        return status

    def _restart(self, engine: EngineProcess) -> bool:
        """Restart an engine that has ended, unless it would end in the same way again."""
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
        return [sys.executable, *ENGINE, str(index), self._config_file]


def say(line: str) -> None:
    print(f"actors: {line}", file=sys.stderr, flush=True)


def engine_gpus(config: Config, index: int, visible: str) -> dict[str, str]:
    """The environment that gives engine `index` its own GPUs, or an empty one on a CPU.

    It gets `actors.tensor_parallel` of the visible GPUs. `visible` is the value of
    CUDA_VISIBLE_DEVICES; if it is empty, GPUs are counted from 0. Raises `ValueError` if it names
    too few. This has never been run on a GPU.
    """
    if engine_device(config) != "cuda":
        return {}
    size, engines = config.actors.tensor_parallel, config.actors.num_engines
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(engines * size)]
    if len(gpus) < engines * size:
        raise ValueError(
            f"actors.num_engines={engines} x actors.tensor_parallel={size} need {engines * size} "
            f"GPUs, but CUDA_VISIBLE_DEVICES={visible} names {len(gpus)}: start fewer engines here"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * size : (index + 1) * size])}
