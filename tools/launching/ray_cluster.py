"""The processes of one run on a Ray cluster.

One Ray actor per process runs the same command that the local launcher would run. This module owns
the place of each process, and the keys that it gets there. `tools.launch` drives it exactly as it
drives `LocalHost`, and imports it only if launch.launcher=ray. Every node needs this repository and
its environment at the same path, and run.dir on storage that all nodes share.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from buffer.processes.child import python_path
from buffer.processes.private_folder import private_folder
from buffer.wire.keys import key_files
from buffer.wire.transport import TransportError, is_loopback
from configs import cli
from configs.errors import one_line
from configs.schema import Config
from tools.launching.processes import KEY_ROLES, Command, Role
from tools.launching.ray_nodes import Needs, Node, nodes_of, waits_for
from tools.launching.ray_process import RayGroup, RayProcess, Runner

LISTENER_TIMEOUT_S = 5.0
OBJECT_STORE_BYTES = 80_000_000  # nothing of a run goes through Ray's object store
OUTPUT = "output"  # folder of a run with all lines that its processes print


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
        local: dict[str, Any] = {}
        if not address:
            local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
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
            self._check_places()
            self._exit = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def start(self, command: Command) -> RayProcess | RayGroup:
        """Ask Ray to start it. Returns at once: the process may still wait for its place."""
        needs, pinned = Needs.of(command), self._pinned_to(command.role)
        options: dict[str, Any] = {**needs.options(), "max_restarts": 0}
        if pinned:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                node_id=pinned[0].node_id, soft=False
            )
        config = self._config
        runners: list[Any] = [
            ray.remote(Runner).options(**options).remote() for _ in range(command.place.num_nodes)
        ]
        first = runners[0].rendezvous.remote()
        given = (command, cli.to_yaml(config), config.run.stop_s, self._keys_for(command.role))
        log = Path(config.run.dir) / config.run.name / OUTPUT / f"{command.name}.log"
        parts = [
            RayProcess(
                command,
                runner,
                runner.start.remote(*given, number, first),
                log,
                lambda: waits_for(needs, pinned or nodes_of(ray.nodes())),
            )
            for number, runner in enumerate(runners)
        ]
        return parts[0] if len(parts) == 1 else RayGroup(command.name, parts)

    def _keys_for(self, role: Role) -> dict[str, bytes]:
        """The files of the keys that a process needs on its node. The buffer's has the folder."""
        folder = self._config.buffer.keys
        if not folder or role == "buffer" or role not in KEY_ROLES:
            return {}
        return {name: (Path(folder) / name).read_bytes() for name in key_files(KEY_ROLES[role])}

    def _check_places(self) -> None:
        """Refuse a process that no node could ever hold, and more GPUs than there are."""
        nodes = nodes_of(ray.nodes())
        for command in self._commands:
            needs, allowed = Needs.of(command), self._pinned_to(command.role) or nodes
            if not any(needs.fits(node) for node in allowed):
                raise ValueError(
                    f"launch.launcher=ray: {command.name} would wait forever for "
                    f"{waits_for(needs, allowed)}"
                )
        wanted = {c.name: c.num_gpus * c.place.num_nodes for c in self._commands if c.num_gpus}
        there = sum(node.resources.get("GPU", 0) for node in nodes)
        if sum(wanted.values()) > there:
            listed = ", ".join(f"{name} {count:g}" for name, count in wanted.items())
            raise ValueError(
                f"launch.launcher=ray: the run needs {sum(wanted.values()):g} GPUs ({listed}), but "
                f"the cluster has {there:g}, so the run would wait for them forever; lower "
                "actors.num_engines or learner.num_ranks, or add nodes"
            )

    def _pinned_to(self, role: str) -> list[Node]:
        """The node that owns the address which a role binds; [] if any node will do."""
        config, nodes = self._config, nodes_of(ray.nodes())
        own = ray.get_runtime_context().get_node_id()
        if is_loopback(config.buffer.address):
            # No process on another node could reach the buffer.
            return [node for node in nodes if node.node_id == own]
        binds = {
            "buffer": config.buffer.address,
            "tracker": config.buffer.address,  # it reads the buffer's files
            "learner": config.weights.address if config.weights.transport == "zmq" else "",
        }
        host = re.sub(r"^tcp://\[?|\]?:[^:]*$", "", binds.get(role, ""))
        if host in ("", "0.0.0.0"):
            return []
        here = [node for node in nodes if node.address == host]
        if not here:
            raise ValueError(
                f"{role} at {binds[role]}: no node of the Ray cluster has this address; the nodes "
                f"are {', '.join(sorted(node.address for node in nodes))}"
            )
        return [node for node in here if node.node_id == own] or here[:1]
