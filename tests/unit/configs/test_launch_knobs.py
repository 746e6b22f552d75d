"""Keys of the launcher: two values of each, and what it would start, where, and with which view."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from configs.schema import Config
from tests.knobs import Turn, check_turn
from tools import launch
from tools.launching.run_plan import commands_of


class Stop(Exception):
    """Ends a launch where enough has been seen."""


def plan(config: Config, own: Path) -> object:
    """Every process, with its arguments and its number of GPUs."""
    return repr(commands_of(config))


def host(config: Config, own: Path) -> object:
    """Where the processes would be started."""
    (own / "config.json").write_text("{}")
    config.model.path = str(own)
    with patch.object(launch, "conduct", lambda _, host, commands: type(host).__name__):
        return launch.run_all(config)


def cluster_joined(config: Config, own: Path) -> object:
    """The cluster that Ray is asked to join."""
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


RAY = ("launch.launcher=ray",)
TURNS = {
    "learner.num_ranks": Turn("1", "2", plan, ("learner.device=cuda",)),
    "launch.pools": Turn("[]", "['actors.name=b']", plan),
    "launch.launcher": Turn("local", "ray", host, ("buffer.address=tcp://127.0.0.1:{port}",)),
    "launch.ray_address": Turn('""', "10.0.0.1:6379", cluster_joined, RAY),
    "launch.progress": Turn("plain", "none", view),
}


@pytest.mark.parametrize("path", TURNS)
def test_a_key_changes_what_is_launched(path: str, tmp_path: Path, free_port) -> None:
    check_turn(path, TURNS[path], tmp_path, (free_port(), 0))
