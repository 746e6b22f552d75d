"""`python -m tools.chaos seeds=[0,1,2]`: run real processes under seeded faults, and recount.

A run has the real buffer, engines with a fake sampler, and a learner: a stand-in without a model,
or the real one on a tiny model. Each seed prints one line, and the last line is the number of seeds
that held. The folder of a seed that failed is kept, and the same seed repeats the same schedule.

`python -m tools.chaos fuzz frames=100000` runs without faults beside peers that send anything.
`python -m tools.chaos soak steps=20000` runs many small steps, and measures the buffer's growth.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from buffer.wire.client import MonitorLink
from buffer.wire.transport import next_port
from configs.command import run_command
from configs.errors import ExitStatus
from configs.schema import Config, key
from tools.faults import schedule, soak
from tools.faults.cluster import Cluster
from tools.faults.fuzzing import Attack
from tools.faults.recount import recount
from tools.faults.small_disk import enter_namespace, why_not
from tools.faults.standin_learner import HOLD

LEARNERS = {"standin": "tools.faults.standin_learner", "real": "tools.faults.real_learner"}


@dataclass
class ChaosConfig:
    seeds: list[int] = key([0], "Seeds; each defines one schedule of faults for one run.", ge=0)
    steps: int = key(20, "Number of learner steps per run.", ge=1)
    engines: int = key(2, "Number of engines per run.", ge=1)
    faults: int = key(10, "Number of faults per run. 0 runs the same processes undisturbed.", ge=0)
    kinds: list[str] = key(
        [],
        "Kinds of faults to draw from. Name fewer to find the one that breaks a run. Empty: every "
        "kind that this machine allows; full disks need root, or namespaces for users.",
        choices=schedule.KINDS,
    )
    learner: Literal["standin", "real"] = key(
        "standin",
        "The learner: standin (starts at once, trains nothing) or real (on a tiny random model).",
    )
    deadline_s: float = key(
        180.0, "Seconds after which a run that has not ended counts as stuck.", gt=0
    )
    out: str = key("", "Folder in which all runs are kept. Empty: a temporary folder.")


def run_config(folder: Path, model: Path, seed: int, steps: int) -> Config:
    """A run of small steps and timeouts of seconds, in a mode that is drawn from its seed."""
    config, rng = Config(), random.Random(f"run {seed}")
    config.run.dir, config.run.name = str(folder / schedule.DISK), "run"
    config.run.seed, config.run.steps, config.run.trackers = seed, steps, []
    config.run.stop_s = 10.0
    config.model.path, config.model.max_context = str(model), 256
    config.data.environment = "tools.faults.sampled:score"
    config.data.num_prompts = 500
    config.batch.groups, config.batch.max_tokens = 4, 512
    config.pipeline.mode = rng.choice(["async", "async", "sync"])
    config.staleness.max_lag = rng.randint(1, 4)
    config.staleness.on_deadline = rng.choice(["wait", "drop"])
    config.weights.publish_every = rng.randint(1, 2)
    config.darts.cancel = rng.choice(["exact", "eager"])
    config.darts.group_size, config.darts.num_long = 4, 1
    config.sampling.max_tokens = 96
    config.actors.name, config.actors.slots, config.actors.stream_interval = "engine", 16, 4
    config.buffer.peer_timeout_s, config.buffer.rejoin_timeout_s = 3.0, 60.0
    config.buffer.segment_bytes = 100_000
    config.learner.device, config.learner.checkpoint_every = "cpu", rng.randint(1, 4)
    config.learner.max_logprob_diff = 100.0  # the engines invent their log-probabilities
    config.optimizer.lr = 1e-4
    config.eval.every, config.eval.num_prompts = 5, 3
    config.launch.max_restarts = 100
    return config


def hold(chaos: ChaosConfig, config: Config, folder: Path) -> list[str]:
    """Run one seed and recount it. Returns its schedule, then every violation that was found."""
    cluster = Cluster(config, folder, chaos.engines, LEARNERS[chaos.learner])
    faults = schedule.draw(
        config.run.seed, chaos.steps, chaos.faults, chaos.kinds, cluster.targets()
    )
    error = cluster.run(faults, chaos.deadline_s)
    found = [error] if error else recount(cluster.run_folder, config, cluster.record)
    return [", ".join(map(str, faults)) or "no faults", *found]


def choose_kinds(chaos: ChaosConfig) -> None:
    """Fill in `kinds`, and prepare this process for full disks. Raises `ValueError`."""
    reason = why_not()
    if not chaos.kinds:
        on_disk = schedule.ON_DISK if reason else ()
        chaos.kinds = [kind for kind in schedule.KINDS if kind not in on_disk]
        if reason:
            print(f"full disks are left out, since no disk can be mounted here: {reason}")
    elif reason and set(chaos.kinds) & set(schedule.ON_DISK):
        raise ValueError(
            f"kinds={chaos.kinds}: full disks need a mount namespace, which this machine refuses: "
            f"{reason}; run as root, or leave out {', '.join(schedule.ON_DISK)}"
        )
    if set(chaos.kinds) & set(schedule.ON_DISK):
        enter_namespace("tools.chaos", sys.argv[1:])


def run(chaos: ChaosConfig) -> int:
    choose_kinds(chaos)
    out = Path(chaos.out or tempfile.mkdtemp(prefix="chaos-"))
    model = out / "model"
    if chaos.learner == "real":
        from tools.faults.tiny_model import save_model  # here, because torch takes seconds

        save_model(model)
    num_held = 0
    for seed in chaos.seeds:
        folder = out / f"seed-{seed}"
        folder.mkdir(parents=True)
        started = time.monotonic()
        plan, *found = hold(chaos, run_config(folder, model, seed, chaos.steps), folder)
        print(
            f"seed {seed}: {'; '.join(found) or 'held'} "
            f"({time.monotonic() - started:.0f} s in {folder}; {plan})",
            flush=True,
        )
        num_held += not found
        if not found and not chaos.out:
            shutil.rmtree(folder)
    print(f"{num_held} of {len(chaos.seeds)} seeds held")
    if num_held < len(chaos.seeds):
        return ExitStatus.FAILED
    if not chaos.out:
        shutil.rmtree(out)
    return ExitStatus.OK


@dataclass
class FuzzConfig:
    frames: int = key(100_000, "Frames sent by hostile peers during one run.", ge=1)
    seed: int = key(0, "Seed of the frames.", ge=0)
    deadline_s: float = key(
        900.0, "Seconds after which a run that has not ended counts as stuck.", gt=0
    )


def fuzz(chaos: FuzzConfig) -> int:
    """One undisturbed run beside hostile peers; its last step waits for the last frame."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    config = run_config(folder, folder, chaos.seed, steps=8)
    config.buffer.peer_timeout_s = 15.0
    cluster = Cluster(config, folder, 2)
    hold = folder / HOLD
    hold.touch()
    attack = Attack(cluster, chaos.frames, chaos.seed, lambda: hold.unlink(missing_ok=True))
    error = cluster.run([], chaos.deadline_s, attack.turn)
    attack.end()
    found = [error] if error else recount(cluster.run_folder, config, cluster.record)
    found += attack.faults()
    print(f"{attack}: {'; '.join(found) or 'held'}")
    if found:
        print(f"its records are in {folder}")
        return ExitStatus.FAILED
    shutil.rmtree(folder)
    return ExitStatus.OK


@dataclass
class SoakConfig:
    steps: int = key(20_000, "Number of learner steps. At least 100.", ge=100)
    engines: int = key(2, "Number of engines.", ge=1)
    most_memory_bytes: int = key(
        20 << 20,
        "Largest growth of the buffer's resident memory from the first tenth of the steps to the "
        "last, in bytes.",
        ge=0,
    )
    most_descriptors: int = key(
        4, "Largest growth of the buffer's number of open descriptors between these tenths.", ge=0
    )
    most_disk_bytes: int = key(
        20 << 20,
        "Largest growth of the run's files between these tenths, in bytes. metrics.jsonl, "
        "groups.jsonl and samples.jsonl are not counted, since they have lines for each step.",
        ge=0,
    )
    deadline_s: float = key(
        3600.0, "Seconds after which a run that has not ended counts as stuck.", gt=0
    )


def soak_config(folder: Path, num_steps: int) -> Config:
    """The smallest steps that a run can have, and logs that reach their bounds at once."""
    config = run_config(folder, folder, 0, num_steps)
    config.pipeline.mode, config.staleness.max_lag = "async", 4
    config.batch.groups, config.darts.group_size = 2, 2
    config.weights.publish_every, config.learner.checkpoint_every = 4, 10
    config.sampling.max_tokens = 32
    config.actors.slots, config.eval.every = 64, 500
    config.buffer.peer_timeout_s = 15.0
    config.buffer.segment_bytes, config.buffer.keep_event_bytes = 500_000, 2_000_000
    return config


def run_soak(chaos: SoakConfig) -> int:
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    config = soak_config(folder, chaos.steps)
    cluster = Cluster(config, folder, chaos.engines, "tools.faults.fast_learner")
    started = time.monotonic()
    with MonitorLink(next_port(f"tcp://127.0.0.1:{cluster.port}")) as link:
        watch = soak.Soak(cluster.run_folder, link)
        error = cluster.run([], chaos.deadline_s, watch.turn)
    if error:
        found = [error]
    else:
        limits = soak.Limits(
            memory_bytes=chaos.most_memory_bytes,
            descriptors=chaos.most_descriptors,
            disk_bytes=chaos.most_disk_bytes,
        )
        tenths = soak.tenths(watch.samples, chaos.steps)
        print(soak.table(tenths))
        found = soak.missing_steps(cluster.run_folder, chaos.steps) + soak.growth(tenths, limits)
    took_s = time.monotonic() - started
    print(f"{chaos.steps:,} steps in {took_s:,.0f} s: {'; '.join(found) or 'held'}")
    if found:
        print(f"its records are in {folder}")
        return ExitStatus.FAILED
    shutil.rmtree(folder)
    return ExitStatus.OK


def main() -> NoReturn:
    if sys.argv[1:2] == ["soak"]:
        run_command(
            "Run many small steps, and compare the buffer's memory, descriptors and files in the "
            "first tenth of them with those in the last.",
            run_soak,
            schema=SoakConfig,
            argv=sys.argv[2:],
            program="python -m tools.chaos soak",
        )
    if sys.argv[1:2] == ["fuzz"]:
        run_command(
            "Have strangers and joined peers send anything to the buffer of a run, and count it.",
            fuzz,
            schema=FuzzConfig,
            argv=sys.argv[2:],
            program="python -m tools.chaos fuzz",
        )
    run_command(
        "Kill, stop and cut off the processes of a run by a seeded schedule, and recount the run.",
        run,
        schema=ChaosConfig,
    )


if __name__ == "__main__":
    main()
