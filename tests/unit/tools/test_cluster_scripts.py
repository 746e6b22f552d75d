"""`cluster.pools`, and the commands, the Slurm script and the manifests that are made from it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import cli
from configs.schema import Config
from tools.launching.placement import pool_entries
from tools.launching.run_plan import commands_of
from tools.launching.scripts import script

ROOT = Path(__file__).parents[3]
CLUSTER = ["--config", "cluster/h100_a10", "actors.device=cuda", "learner.device=cuda"]
WIDE = [*CLUSTER, "cluster.learner.num_nodes=2", "run.name=Wide_Run"]


def load(*overrides: str) -> Config:
    return cli.load([*WIDE, *overrides])


def printed(launcher: str, *overrides: str) -> str:
    return script(load(f"launch.launcher={launcher}", *overrides))


def test_the_pools_of_a_cluster_take_the_place_of_the_pool_of_the_run() -> None:
    commands = [command for command in commands_of(load()) if command.role == "actors"]
    assert [command.name for command in commands] == [
        "actors h100", "actors a10-0", "actors a10-1"
    ]  # fmt: skip
    assert [(c.num_gpus, c.place.accelerator_type) for c in commands] == [
        (4, "H100"), (4, "A10"), (4, "A10")
    ]  # fmt: skip
    assert commands[2].arguments[-3:] == (
        "actors.name=a10-1", "actors.num_engines=4", "actors.slots=48"
    )  # fmt: skip


def test_nested_settings_of_a_pool_become_overrides() -> None:
    pools = "cluster.pools={b: {actors: {vllm: {max_num_seqs: 8}, min_step_ms: [[1, 2.5]]}}}"
    (pool,) = pool_entries(cli.load([pools]))
    assert pool.overrides == (
        "actors.name=b", "actors.vllm.max_num_seqs=8", "actors.min_step_ms=[[1, 2.5]]"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("3", "cluster.pools.b=3: must be a table"),
        ("{num_node: 2}", "cluster.pools.b.num_node: unknown key; did you mean num_nodes"),
        ("{num_nodes: 0}", "cluster.pools.b.num_nodes=0: must be >= 1"),
        ("{num_nodes: many}", "cluster.pools.b.num_nodes='many'"),
        ("{labels: 3}", "cluster.pools.b.labels=3"),
        ("{actors: 3}", "cluster.pools.b.actors=3: must be a table"),
        ("{data: null}", "cluster.pools.b.data=None: must be a table"),
        ("{actors: {slot: 3}}", "cluster.pools, b: actors.slot .*actors.slots"),
        ("{actors: {name: c}}", "cluster.pools.b.actors.name"),
    ],
)
def test_a_pool_that_cannot_work_is_named(entry: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        commands_of(cli.load([f"cluster.pools={{b: {entry}}}"]))


@pytest.mark.parametrize("module", ["buffer", "actors", "learner", "tools.launch"])
def test_every_process_refuses_weights_that_only_its_machine_reaches(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "buffer.address=tcp://10.0.0.1:5577", "buffer.keys=keys"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: weights.address=tcp://127.0.0.1:*: must not be on the")


def test_weights_in_a_shared_folder_need_no_address() -> None:
    cli.load(["buffer.address=tcp://10.0.0.1:5577", "weights.transport=file"])


# The texts ----------------------------------------------------------------------------------------


def test_every_command_loads_with_the_file_that_is_printed_with_it(tmp_path: Path) -> None:
    text = printed("commands")
    file = tmp_path / "run.yaml"
    file.write_text(re.findall(r"<<'END'\n(.*?)^END$", text, re.M | re.S)[0])
    assert cli.load(["--config", str(file)]) == load("launch.launcher=local")
    learners, pools = [], []
    for line in text.splitlines():
        if "--config run.yaml" not in line:
            continue
        words = shlex.split(line)
        module = words[words.index("-m") + 1]
        config = cli.load(["--config", str(file), *words[words.index("run.yaml") + 1 :]])
        assert (
            config.buffer.address
            == f"tcp://{'0.0.0.0' if module == 'buffer' else 'BUFFER_HOST'}:5577"
        )
        pools += [config.actors.name] if module == "actors" else []
        learners += [words[:2]] if module == "learner" else []
    assert pools == ["h100", "a10-0", "a10-1"]
    assert learners == [[f"GROUP_RANK={node}", "GROUP_WORLD_SIZE=2"] for node in range(2)]


def test_an_option_prints_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.launch", *WIDE, "--print-commands"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout.rstrip()) == (0, printed("commands").rstrip())


def test_the_slurm_script_has_a_component_for_the_learner_and_for_each_pool(tmp_path: Path) -> None:
    text = printed("slurm", "cluster.pools.a10.labels.zone=b")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=20)
    options = [re.findall(r"^#SBATCH --(\S+)$", part, re.M) for part in text.split("hetjob\n")]
    assert options[0][1:] == ["nodes=2", "ntasks-per-node=1", "gres=gpu:h100:4"]
    assert [option[-1] for option in options[1:]] == ["gres=gpu:h100:4", *["constraint=b"] * 2]
    assert re.findall(r"^srun --het-group=(\d) --nodes=(\d)", text, re.M) == [
        ("0", "1"), ("1", "1"), ("2", "1"), ("3", "1"), ("0", "2"), ("0", "1")
    ]  # fmt: skip


def test_the_slurm_script_starts_every_process(tmp_path: Path) -> None:
    """`srun` is replaced by a program that records its arguments. The buffer ends last."""
    (tmp_path / "keys").mkdir()
    fake = tmp_path / "srun"
    fake.write_text(
        '#!/bin/bash\necho "$*" >> started\n[[ "$*" != *"-m buffer"* ]] || '
        "until (($(wc -l < started) == 6)); do sleep 0.05; done\n"
    )
    fake.chmod(0o755)
    subprocess.run(
        ["bash"], input=printed("slurm"), text=True, check=True, timeout=20, cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path)},
    )  # fmt: skip
    started = (tmp_path / "started").read_text()
    assert len(started.splitlines()) == 6
    assert len(re.findall(r"buffer\.address=tcp://\d+\.\d+\.\d+\.\d+:5577", started)) == 4
    assert cli.load(["--config", str(tmp_path / "run.yaml")]) == load("launch.launcher=local")


def test_a_pod_has_the_keys_of_its_role_alone() -> None:
    manifests = list(yaml.safe_load_all(printed("kubernetes", "buffer.keys=k")))
    jobs: dict[str, Any] = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "Job"}
    assert list(jobs) == [
        f"wide-run-{own}"
        for own in ("buffer", "actors-h100", "actors-a10-0", "actors-a10-1", "learner", "tracker")
    ]
    pods = {name: job["spec"]["template"]["spec"] for name, job in jobs.items()}
    secrets = {
        name: [v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v]
        for name, pod in pods.items()
    }
    assert secrets["wide-run-actors-a10-0"] == ["wide-run-keys-engine"]
    assert secrets["wide-run-learner"] == ["wide-run-keys-learner"]
    assert secrets["wide-run-tracker"] == []
    assert pods["wide-run-actors-a10-0"]["nodeSelector"] == {"nvidia.com/gpu.product": "A10"}
    assert jobs["wide-run-learner"]["spec"]["completions"] == 2
    limits = pods["wide-run-actors-h100"]["containers"][0]["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": 4}
    run_file = manifests[0]["data"]["run.yaml"]
    assert yaml.safe_load(run_file)["cluster"]["learner"]["num_nodes"] == 2


def test_the_commands_of_pods_are_valid_for_a_shell() -> None:
    for manifest in yaml.safe_load_all(printed("kubernetes")):
        if manifest["kind"] == "Job":
            (container,) = manifest["spec"]["template"]["spec"]["containers"]
            *shell, text = container["command"]
            assert shell == ["sh", "-c"]
            subprocess.run(["sh", "-n"], input=text, text=True, check=True, timeout=20)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("buffer.address=tcp://127.0.0.1:5577", "cannot be reached from other machines"),
        ("buffer.keys=", "buffer.keys is empty"),
    ],
)
def test_a_run_that_other_machines_cannot_join_is_not_printed(
    override: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        printed("slurm", override)
