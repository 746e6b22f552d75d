"""The launcher on a local Ray cluster with stub commands: the life cycle is that of local runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from buffer.wire.transport import TransportError
from configs import cli
from tools.launching.ray_cluster import RayCluster

ROOT = Path(__file__).parents[2]
# Not beside the cluster of test_ray_nodes.py.
pytestmark = [pytest.mark.e2e, pytest.mark.alone]

DRIVER = """
import sys
from configs import cli
from tools import launch
from tools.launching.processes import Command
from tools.launching.ray_cluster import RayCluster
address = f"tcp://127.0.0.1:{sys.argv[2]}"
overrides = [f"run.dir={sys.argv[1]}", f"buffer.address={address}", "launch.progress=plain"]
config = cli.load([*overrides, "launch.launcher=ray"])
note = "import os, sys, time; open(os.path.join(%r, str(os.getpid())), 'w').close(); " % sys.argv[1]
stubs = {
    "buffer": "time.sleep(300)",
    "actors": "time.sleep(300)",
    "learner": "time.sleep(1); sys.exit('error: broke')",
}
commands = [Command(name, name, ("-c", note + code)) for name, code in stubs.items()]
if __name__ == "__main__":
    cluster = RayCluster(config, commands)
    sys.exit(launch.exit_status(lambda: launch.conduct(config, cluster, commands)))
"""


def test_a_failed_process_is_named_and_ends_the_others_on_ray(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path), str(free_port())],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "learner (pid" in done.stderr and "exit status 1: broke" in done.stderr
    assert "killed" not in done.stdout  # the others ended when they were asked to
    pids = [int(file.name) for file in tmp_path.iterdir() if file.name.isdigit()]
    assert len(pids) == 3
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_an_address_without_a_cluster_is_named(free_port: Callable[[], int]) -> None:
    config = cli.load(["launch.launcher=ray", f"launch.ray_address=127.0.0.1:{free_port()}"])
    with (
        pytest.raises(TransportError, match="launch.ray_address=127.0.0.1"),
        RayCluster(config, []),
    ):
        pass
