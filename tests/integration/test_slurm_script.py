"""A training by the printed Slurm script: only `srun` and `hostname` are replaced.

`srun` starts its tasks on this machine. Buffer, tracker and a learner of two nodes are real; the
engines are stand-ins.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from buffer.processes.descendants import OWNER
from configs import cli
from tools.faults.small_run import run_config
from tools.faults.tiny_model import save_model
from tools.launching.kubernetes import RENDEZVOUS_PORT
from tools.launching.scripts import script

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "bin/srun": """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 != --ntasks=* ]] || tasks=${1#*=}; shift; done
[[ $tasks != 1 ]] || SLURM_PROCID=0 exec "$@"  # so that a signal reaches the task, as by srun
for ((task = 0; task < tasks; task++)); do SLURM_PROCID=$task "$@" & started+=($!); done
for one in "${started[@]}"; do wait "$one" || status=$?; done
exit "${status:-0}"
""",
    "bin/hostname": """#!/bin/bash
echo "127.0.0.1 192.0.2.7"
""",
    ".venv/bin/python": f"""#!/bin/bash
[[ $2 != actors ]] || set -- -m tools.faults.fake_pool "${{@:3}}"
exec {sys.executable} "$@"
""",
}


@pytest.mark.slow
def test_the_slurm_script_trains(tmp_path: Path, free_port: Callable[[], int]) -> None:
    checkout, model = tmp_path / "checkout", tmp_path / "model"
    for name, text in PROGRAMS.items():
        program = checkout / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    for package in ("actors", "buffer", "configs", "darts", "learner", "tools"):
        (checkout / package).symlink_to(ROOT / package)
    save_model(model)
    config = run_config(tmp_path, model, 0, 2)
    config.launch.launcher, config.run.trackers = "slurm", ["tensorboard"]
    config.buffer.address, config.buffer.keys = f"tcp://0.0.0.0:{free_port()}", "keys"
    config.buffer.peer_timeout_s, config.eval.every = 30.0, 0
    config.weights.address = "tcp://0.0.0.0:*"
    config.cluster.learner.num_nodes = 2
    config.cluster.pools = {"near": {}, "far": {"num_nodes": 2}}
    (tmp_path / "config.yaml").write_text(cli.to_yaml(config))
    text = script(cli.load(["--config", str(tmp_path / "config.yaml")]))
    assert str(RENDEZVOUS_PORT) in text
    environment = {name: value for name, value in os.environ.items() if name != OWNER}
    done = subprocess.run(
        ["bash", "-c", text.replace(str(RENDEZVOUS_PORT), str(free_port()))],
        cwd=tmp_path, capture_output=True, text=True, timeout=250,
        env=environment
        | {"PATH": f"{checkout}/bin:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(checkout)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = Path(config.run.dir) / config.run.name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["train/grad_norm"] > 0 for row in rows)
    assert (run / "report.html").exists()
    assert list((run / "tb").iterdir())
    # Each rank of the learner has saved its shard.
    files = {path.name for path in (run / "checkpoints" / "step_000002").iterdir()}
    shards = {f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)}
    assert files >= shards
    for engine in ("near/0", "far-0/0", "far-1/0"):
        assert f"engine {engine} joined" in done.stdout
