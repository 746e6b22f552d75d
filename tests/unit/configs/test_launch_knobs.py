"""Keys of the launcher: two values of each change its processes, their host or its view."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from contextlib import closing
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
from omegaconf import OmegaConf

from buffer.wire.client import MonitorLink
from configs.schema import Config
from tests.knobs import Turn, check_turn
from tools import launch, track
from tools.launching.processes import Command
from tools.launching.progress import make_view
from tools.launching.run_plan import commands_of
from tools.launching.supervision import Run
from tools.reporting.trackers import Identity, Prometheus


class Stop(Exception):
    """Ends a launch as soon as the test has seen enough."""


def plan(config: Config, own: Path) -> object:
    """Every process, with its arguments and its number of GPUs."""
    return repr(commands_of(config))


def host(config: Config, own: Path) -> object:
    """The host on which the processes would be started."""
    (own / "config.json").write_text("{}")
    config.model.path = str(own)
    with patch.object(launch, "conduct", lambda _, host, commands: type(host).__name__):
        return launch.run(config)


def cluster_joined(config: Config, own: Path) -> object:
    """The address of the cluster that Ray is told to join."""
    import ray

    from tools.launching import ray_cluster

    asked = []
    with (
        patch.object(ray_cluster, "_require_listener"),
        patch.object(ray, "init", side_effect=lambda address, **_: asked.append(address) or 1 / 0),
        pytest.raises(Exception, match="division"),
        ray_cluster.RayCluster(config, []),
    ):
        raise AssertionError("it joined")
    return asked


def view(config: Config, own: Path) -> object:
    """The progress view that a launch chooses."""
    chosen: list[object] = []
    original = launch.make_view

    def make_view(kind: str) -> object:
        chosen.append(type(original(kind)))
        raise Stop

    with patch.object(launch, "make_view", make_view), pytest.raises(Stop):
        launch.conduct(config, None, [])  # type: ignore[arg-type]
    return chosen


def project(config: Config, own: Path) -> object:
    """The project under which a tracker opens the run."""
    opened: list[str] = []
    (own / track.STATES).mkdir()
    with patch.dict(track.TRACKERS, tensorboard=lambda run: opened.append(run.project)):
        mirror = track.Mirror("tensorboard", own, config)
        mirror.finish.set()
        assert mirror.has_ended(20)
    return opened


# A run of scripted processes ----------------------------------------------------------------------


class PlayedProcess:
    """Dies when it is started or, if `ends_s` is given, ends that long after it is told to."""

    def __init__(self, name: str, ends_s: float | None) -> None:
        self.name, self.where, self.last_lines = name, "nowhere", deque[str]()
        self._ends_s = ends_s
        self._ended = ends_s is None
        self.killed = False

    def lines(self) -> list[str]:
        return []

    def status(self) -> int | None:
        return -signal.SIGKILL if self._ended else None

    def how_it_ended(self) -> str:
        return "ended"

    def peaks(self) -> dict[str, int]:
        return {}

    def terminate(self) -> None:
        assert self._ends_s is not None
        threading.Timer(self._ends_s, self._end).start()

    def _end(self) -> None:
        self._ended = True

    def kill(self) -> None:
        self.killed = self._ended = True


class Played:
    """A host of scripted processes and a link to no buffer, in one object."""

    def __init__(self, learner_ends_s: float | None) -> None:
        self.learners: list[PlayedProcess] = []
        self._learner_ends_s = learner_ends_s

    def start(self, command: Command) -> PlayedProcess:
        ends_s = self._learner_ends_s if command.role == "learner" else 0.01
        process = PlayedProcess(command.name, ends_s)
        if command.role == "learner":
            self.learners.append(process)
        return process

    def receive(self, timeout_s: float) -> None:
        time.sleep(0.01)
        if len(self.learners) > MANY:
            raise Stop


def play(config: Config, learner_ends_s: float | None, signalled: bool) -> list[PlayedProcess]:
    """The learner's processes in order of their start, until the run has ended."""
    played = Played(learner_ends_s)
    run = Run(config, make_view("none"), cast(MonitorLink, played))
    with run.request, contextlib.suppress(Stop):
        run.start(played, commands_of(config))
        if signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        run.watch()
    run.stop()
    return played.learners


def restarts(config: Config, own: Path) -> object:
    """The number of times that a learner which dies at once is started."""
    return len(play(config, None, signalled=False))


def patience(config: Config, own: Path) -> object:
    """Whether a learner that takes a while to end is killed."""
    return [process.killed for process in play(config, 0.4, signalled=True)]


MANY = 5


def endpoint(config: Config, own: Path) -> object:
    """The address at which the newest step is served."""
    settings = OmegaConf.to_container(OmegaConf.structured(config))
    with closing(Prometheus(Identity(own, "", "r", cast(dict[str, Any], settings)))) as tracker:
        return tracker.where


RAY = ("launch.launcher=ray",)
TURNS = {
    "learner.num_ranks": Turn("1", "2", plan, ("learner.device=cuda",)),
    "cluster.pools": Turn("{{}}", "{{b: {{}}}}", plan),
    "cluster.learner.num_nodes": Turn("1", "2", plan),
    "cluster.learner.num_gpus": Turn("0", "0.5", plan),
    "cluster.learner.accelerator_type": Turn('""', "A10", plan),
    "cluster.learner.resources": Turn("{{}}", "{{fast: 1}}", plan),
    "cluster.learner.labels": Turn("{{}}", "{{zone: b}}", plan),
    "launch.pools": Turn("[]", "['actors.name=b']", plan),
    "launch.launcher": Turn("local", "ray", host, ("buffer.address=tcp://127.0.0.1:{port}",)),
    "launch.ray_address": Turn('""', "10.0.0.1:6379", cluster_joined, RAY),
    "launch.progress": Turn("plain", "none", view),
    "launch.max_restarts": Turn("0", "2", restarts),
    "launch.restart_window_s": Turn("600", "0.001", restarts, ("launch.max_restarts=1",)),
    "run.stop_s": Turn("0.1", "20", patience),
    "run.trackers": Turn("[]", "[tensorboard]", plan),
    "run.project": Turn("a", "b", project),
    "run.prometheus_port": Turn("{port}", "{port2}", endpoint),
}


@pytest.mark.parametrize("path", TURNS)
def test_a_key_changes_what_is_launched(path: str, tmp_path: Path, free_port) -> None:
    check_turn(path, TURNS[path], tmp_path, (free_port(), free_port()))
