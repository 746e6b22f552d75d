"""Trainings over three local Ray nodes with unequal resources.

In the first, two nodes are removed, and engines and learner are stand-ins. In the second, a real
learner spans two nodes. Launcher, placement, buffer, pools and sockets are real.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SETUP = """
import json, re, sys, threading, time
from dataclasses import replace
from pathlib import Path
import psutil
from ray.cluster_utils import Cluster
from configs import cli
from tools import launch
from tools.launching import supervision
from tools.launching.ray_cluster import RayCluster
from tools.launching.run_plan import commands_of, prepare, with_own_keys
from tools.faults.small_run import run_config

folder, port = Path(sys.argv[1]), sys.argv[2]
small = {"object_store_memory": 80_000_000, "num_cpus": 1}

def start_nodes(*resources):
    head = {**small, "include_dashboard": False, "resources": resources[0]}
    cluster = Cluster(True, head_node_args=head)
    return cluster, [cluster.add_node(**small, resources=given) for given in resources[1:]]

def settings(cluster, model, steps):
    config = run_config(folder, model, 0, steps)
    config.buffer.address, config.weights.address = f"tcp://0.0.0.0:{port}", "tcp://0.0.0.0:*"
    config.launch.launcher, config.launch.ray_address = "ray", cluster.address
    config.pipeline.mode, config.run.stop_s, config.launch.progress = "async", 20.0, "plain"
    config.cluster.learner.resources = {"h100": 1}
    return config

def plan(config, learner):
    (folder / "yaml").write_text(cli.to_yaml(config))
    config = with_own_keys(prepare(cli.load(["--config", str(folder / "yaml")])))
    standins = {
        "actors": ("-m", "tools.faults.fake_pool"),
        "learner": ("-m", f"tools.faults.{learner}", str(folder / "trained.jsonl")),
    }
    return config, [
        replace(c, arguments=(*standins.get(c.role, c.arguments[:2]), *c.arguments[2:]))
        for c in commands_of(config)
    ]

def conduct(config, commands):
    return launch.exit_status(
        lambda: launch.conduct(config, RayCluster(config, commands), commands)
    )
"""

LOST_NODES = """
cluster, nodes = start_nodes({"h100": 2}, {"a10": 1}, {"a10": 2})
raylets = {n.all_processes["raylet"][0].process.pid: n for n in [cluster.head_node, *nodes]}

config = settings(cluster, folder, 30)
config.cluster.pools = {
    "h100": {"resources": {"h100": 1}},
    "a10": {"resources": {"a10": 1}, "actors": {"slots": 4}},
}
config, commands = plan(config, "standin_learner")
hold = folder / "hold"
hold.touch()
started, seen = {}, {"places": [], "commands": []}
start = RayCluster.start
def start_and_remember(self, command):
    started[command.name] = process = start(self, command)
    return process
RayCluster.start = start_and_remember

def place(name):
    process = started.get(name)
    match = re.match(r"pid (\\d+) on", process.where if process and not process._status else "")
    if not match:
        return None
    child = psutil.Process(int(match[1]))
    seen["commands"].append(" ".join(child.cmdline()))
    return raylets[child.parent().ppid()]

def until(condition, limit_s=90):
    deadline = time.monotonic() + limit_s
    while not (result := condition()):
        assert time.monotonic() < deadline, condition
        time.sleep(0.3)
    return result

def steps():
    metrics = folder / "disk" / "run" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0

def disturb():
    try:
        until(lambda: steps() >= 2)
        for _ in nodes:
            seen["places"].append({
                name: sorted(until(lambda: place(name))._ray_params.resources)
                for name in ("learner", "actors h100", "actors a10")
            })
            gone = place("actors a10")
            raylets_of_a10 = started["actors a10"]
            cluster.remove_node(gone, allow_graceful=False)
            until(lambda: started["actors a10"] is not raylets_of_a10)
        log = folder / "disk" / "run" / "output" / "actors a10.log"
        until(lambda: "the cluster has" in log.read_text())
        seen["wait"] = [x for x in log.read_text().splitlines() if "waits for" in x][-1]
        seen["steps"] = steps()
    except BaseException as error:
        seen["error"] = repr(error)
    hold.unlink()

threading.Thread(target=disturb, daemon=True).start()
status = conduct(config, commands)
(folder / "seen.json").write_text(json.dumps(seen))
cluster.shutdown()
sys.exit(status)
"""

TWO_NODES = """
from tools.faults.tiny_model import save_model
save_model(folder / "model")
cluster, _ = start_nodes({"h100": 1}, {"h100": 1}, {"a10": 1})
config = settings(cluster, folder / "model", 3)
config.buffer.peer_timeout_s, config.eval.every, config.launch.max_restarts = 30.0, 0, 1
config.cluster.learner.num_nodes = 2
config.cluster.pools = {"a10": {"resources": {"a10": 1}}}
status = conduct(*plan(config, "real_learner"))
cluster.shutdown()
sys.exit(status)
"""


def run_script(script: str, folder: Path, port: int) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", SETUP + script, str(folder), str(port)],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.e2e
@pytest.mark.slow
def test_a_run_goes_on_when_nodes_are_lost(tmp_path: Path, free_port: Callable[[], int]) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = run_script(LOST_NODES, tmp_path, free_port())
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert "error" not in seen, seen
    expected = {"learner": ["h100"], "actors h100": ["h100"], "actors a10": ["a10"]}
    assert seen["places"] == [expected, expected]
    # The pool's nodes are gone, and the run has ended with the other pool.
    assert seen["wait"].startswith("actors: waits for {a10: 1}; the cluster has ")
    assert seen["wait"].count("a10") == 1 and "h100: 2" in seen["wait"]
    run = tmp_path / "disk" / "run"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 30
    # Secrets travel neither in command lines nor in output.
    keys = [line for key in (run / "keys").glob("*secret") for line in key.read_text().splitlines()]
    secrets = [line.split('"')[1] for line in keys if "secret-key" in line]
    texts = [*seen["commands"], done.stdout, done.stderr]
    texts += [log.read_text() for log in (run / "output").iterdir()]
    assert len(secrets) == 4
    assert not any(secret in text for secret in secrets for text in texts)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_learner_spans_two_nodes(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """Its ranks meet at the address that Ray gives them, and train on shards of the same steps."""
    run_script(TWO_NODES, tmp_path, free_port())
    run = tmp_path / "disk" / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["train/grad_norm"] > 0 for row in rows)
    records = [json.loads(line) for line in (tmp_path / "trained.jsonl").read_text().splitlines()]
    assert sorted((r["step"], r["rank"]) for r in records) == [
        (s, r) for s in range(3) for r in (0, 1)
    ]
    ids = [t["rollout_id"] for record in records for t in record["trajectories"]]
    assert len(set(ids)) == len(ids)  # no response is trained by both
    files = {path.name for path in (run / "checkpoints" / "step_000003").iterdir()}
    shards = [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    assert files >= {*shards}
