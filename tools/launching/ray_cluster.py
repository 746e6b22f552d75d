"""The processes of one run on a Ray cluster.

One Ray actor per process runs the same command that the local launcher would run. This module owns
where each process is placed and how it is reached. `tools.launch` drives it exactly as it drives
`LocalHost`, and imports it only if launch.launcher=ray. Every node needs this repository and its
environment at the same path, and run.dir on storage that all nodes share.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from buffer.processes.child import ERROR, NUM_LAST_LINES, in_words, python_path
from buffer.processes.private_folder import private_folder
from buffer.wire.transport import TransportError
from configs import cli
from configs.errors import one_line
from configs.schema import Config
from tools.launching.processes import Command, LocalHost, Role

LOOPBACK = re.compile(r"tcp://(127\.|localhost:|\[::1\])")
START_S = 120.0  # for Ray to find the resources and start a worker
CALL_S = 10.0
LISTENER_TIMEOUT_S = 5.0
FEW_CPUS = 0.01  # processes share a node's CPUs as under the local launcher; only GPUs are counted


@dataclass
class Poll:
    """The state of a process. `lines` is its output since the last poll."""

    status: int | None
    how_it_ended: str
    lines: list[str]
    peaks: dict[str, int]


class Runner:
    """Runs one command on its node, inside a Ray actor."""

    def __init__(self, command: Command, config_yaml: str, grace_s: float) -> None:
        # Ray sets this to 1, which would confine the learner to one core.
        os.environ.pop("OMP_NUM_THREADS", None)
        self._host = LocalHost(config_yaml, grace_s).__enter__()
        self._process = self._host.start(command)

    def where(self) -> str:
        return f"{self._process.where} on {ray.util.get_node_ip_address()}"

    def poll(self) -> Poll:
        """The status is read first, so that the lines are complete once the process has ended."""
        status = self._process.status()
        how = "" if status is None else self._process.how_it_ended()
        return Poll(status, how, self._process.lines(), self._process.peaks())

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._host.__exit__()


class RayProcess:
    """A command in its Ray actor, as the launcher sees it."""

    def __init__(self, name: str, runner: Any) -> None:
        self.name, self._runner = name, runner
        self.where: str = ray.get(runner.where.remote(), timeout=START_S)
        self.last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._status: int | None = None
        self._how_it_ended = ""
        self._lines: list[str] = []
        self._peaks: dict[str, int] = {}

    def status(self) -> int | None:
        if self._status is None:
            self._ask(self._poll)
        return self._status

    def lines(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def how_it_ended(self) -> str:
        return self._how_it_ended

    def peaks(self) -> dict[str, int]:
        return self._peaks

    def terminate(self) -> None:
        self._ask(lambda: ray.get(self._runner.terminate.remote(), timeout=CALL_S))

    def kill(self) -> None:
        self._ask(lambda: ray.get(self._runner.kill.remote(), timeout=CALL_S))
        ray.kill(self._runner)
        if self._status is None:
            self._end_as_killed()

    def _poll(self) -> None:
        poll: Poll = ray.get(self._runner.poll.remote(), timeout=CALL_S)
        self._status, self._how_it_ended, self._peaks = poll.status, poll.how_it_ended, poll.peaks
        self._say(poll.lines)

    def _say(self, lines: list[str]) -> None:
        self._lines += lines
        self.last_lines += lines

    def _end_as_killed(self) -> None:
        self._status = -signal.SIGKILL
        self._how_it_ended = in_words(self._status)

    def _ask(self, call: Callable[[], object]) -> None:
        """Make a call. If the Ray actor has died, the kernel has killed its process as well."""
        try:
            call()
        except (RayActorError, GetTimeoutError) as error:
            if self._status is None:
                what = "died" if isinstance(error, RayActorError) else "does not answer"
                self._say([f"{ERROR}its Ray actor {what}: {one_line(error)}"])
                self._end_as_killed()


def _require_listener(address: str) -> None:
    """Ray retries an unreachable address silently for minutes, so check it first.

    An address without a port, such as `auto`, is left to Ray.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=LISTENER_TIMEOUT_S).close()
    except OSError as error:
        raise TransportError(
            f"launch.ray_address={address}: no Ray cluster answers there ({one_line(error)}); "
            "see `ray status`"
        ) from error


class RayCluster:
    """Starts processes through Ray, on the cluster at launch.ray_address.

    If launch.ray_address is empty, it starts a cluster on this machine that ends with the run.
    """

    def __init__(self, config: Config, commands: Sequence[Command]) -> None:
        self._config, self._commands = config, commands
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        address = self._config.launch.ray_address
        local: dict[str, Any] = {} if address else {"include_dashboard": False}
        _require_listener(address)
        with ExitStack() as opened:
            opened.enter_context(private_folder(self._config.run.stop_s))  # for Ray's own files too
            opened.callback(ray.shutdown)
            try:
                ray.init(
                    address or "local",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={"env_vars": python_path()},
                    **local,
                )
            except Exception as error:  # Ray raises plain exceptions here
                what = (
                    f"the Ray cluster launch.ray_address={address} could not be joined"
                    if address
                    else "Ray did not start on this machine"
                )
                raise TransportError(f"{what}: {one_line(error)}") from error
            self._check_gpus()
            roles: tuple[Role, ...] = ("buffer", "learner", "actors")
            self._places = {role: self._node_of(role) for role in roles}
            self._places["tracker"] = self._places["buffer"]  # it reads the buffer's files
            self._exit = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def start(self, command: Command) -> RayProcess:
        node = self._places[command.role]
        options: dict[str, Any] = {
            "num_cpus": FEW_CPUS,
            "num_gpus": command.num_gpus,
            "max_restarts": 0,
        }
        if node:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                node_id=node, soft=False
            )
        config_yaml, grace_s = cli.to_yaml(self._config), self._config.run.stop_s
        runner = ray.remote(Runner).options(**options).remote(command, config_yaml, grace_s)
        try:
            return RayProcess(command.name, runner)
        except (RayActorError, GetTimeoutError) as error:
            raise TransportError(
                f"Ray did not start {command.name} within {START_S:g} s (it needs "
                f"{command.num_gpus} GPUs on one node{', the one of its address' if node else ''}; "
                f"`ray status` shows the free resources): {one_line(error)}"
            ) from None

    def _check_gpus(self) -> None:
        needed = {command.name: command.num_gpus for command in self._commands if command.num_gpus}
        there = int(ray.cluster_resources().get("GPU", 0))
        if sum(needed.values()) > there:
            wanted = ", ".join(f"{name} {count}" for name, count in needed.items())
            raise ValueError(
                f"launch.launcher=ray: the run needs {sum(needed.values())} GPUs ({wanted}), but "
                f"the cluster has {there}, so the run would wait for them forever; lower "
                "actors.num_engines or learner.num_ranks, or add nodes"
            )

    def _node_of(self, role: str) -> str:
        """The node that owns the address which a role binds; "" if any node will do."""
        config = self._config
        if LOOPBACK.match(config.buffer.address):
            # No process on another node could reach the buffer.
            return ray.get_runtime_context().get_node_id()
        binds = {
            "buffer": config.buffer.address,
            "learner": config.weights.address if config.weights.transport == "zmq" else "",
        }
        address = binds.get(role, "")
        if not address:
            return ""
        if LOOPBACK.match(address):
            raise ValueError(
                f"weights.address={address}: actors on other nodes cannot reach it; name the "
                "learner's node, as in tcp://HOST:*"
            )
        host = re.sub(r"^tcp://\[?|\]?:[^:]*$", "", address)
        nodes = {
            node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]
        }
        if host not in nodes:
            raise ValueError(
                f"{role} at {address}: no node of the Ray cluster has this address; the nodes are "
                f"{', '.join(sorted(nodes))}"
            )
        return nodes[host]
