"""`python -m tools.chaos seeds=[0,1,2]`: run real processes under seeded faults, and recount.

A run has the real buffer, engines with a fake sampler or real ones, and a learner: a stand-in
without a model, or the real one on a tiny model. Rollouts of odd seeds have several turns, except
with real engines. Each seed prints one line, and the last line is the number of seeds that held.
The folder of a seed that failed is kept, and the same seed repeats the same schedule.

`python -m tools.chaos fuzz frames=100000` runs without faults beside peers that send anything.
`python -m tools.chaos soak steps=20000` runs many small steps, and measures the buffer's growth.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

from buffer.processes.child import ROOT
from buffer.wire.client import MonitorLink
from buffer.wire.keys import make_keys
from buffer.wire.transport import next_port
from configs.command import run_command
from configs.errors import ExitStatus
from configs.schema import Config, key
from tools.faults import namespace, schedule, soak
from tools.faults.cluster import Cluster
from tools.faults.fuzzing import Attack
from tools.faults.leftovers import Leftovers
from tools.faults.recount import fake_faults, recount, text_faults
from tools.faults.small_run import of_vllm, run_config, soak_config
from tools.faults.standin_learner import HOLD

ENVIRONMENTS = ("score", "Conversation")  # of even seeds one turn, of odd seeds up to three
LEARNERS = {"standin": "tools.faults.standin_learner", "real": "tools.faults.real_learner"}
POOLS = {"fake": "tools.faults.fake_pool", "vllm": "actors"}
VLLM_MODEL = ROOT / "models" / "tiny-reasoner"


@dataclass
class ChaosConfig:
    seeds: list[int] = key([0], "Seeds; each defines one schedule of faults for one run.", ge=0)
    steps: int = key(20, "Number of learner steps per run.", ge=1)
    engines: int = key(2, "Number of engines per run, or of each pool.", ge=1)
    engine: Literal["fake", "vllm"] = key(
        "fake",
        "The engines: fake (they invent tokens that prove their origin) or vllm (real, with the "
        "model in models/tiny-reasoner, in at least one pool, and with the real learner).",
    )
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
    ranks: int = key(1, "Number of ranks of the real learner.", ge=1)
    pools: int = key(
        0,
        "Number of pools, each a process with `engines` engines of its own. 0: engines without a "
        "pool.",
        ge=0,
    )
    launcher: bool = key(
        False,
        "Whether the launcher is a process that is killed and stopped as well. After a kill it is "
        "started again with run.resume=true, once nothing is left of it.",
    )
    deadline_s: float = key(
        300.0, "Seconds after which a run that has not ended counts as stuck.", gt=0
    )
    out: str = key("", "Folder in which all runs are kept. Empty: a folder in /var/tmp.")


def hold(
    chaos: ChaosConfig, config: Config, folder: Path, own_folders: Sequence[Path]
) -> list[str]:
    """Run one seed and recount it. Returns its schedule, then every violation that was found."""
    leftovers = Leftovers(own_folders)
    config.learner.num_ranks = chaos.ranks
    if chaos.engine == "vllm":
        of_vllm(config)
    cluster = Cluster(
        config,
        folder,
        chaos.engines,
        LEARNERS[chaos.learner],
        pool=POOLS[chaos.engine],
        num_pools=chaos.pools,
        leftovers=leftovers if chaos.launcher else None,
    )
    faults = schedule.draw(
        config.run.seed, chaos.steps, chaos.faults, chaos.kinds, cluster.targets()
    )
    error = cluster.run(faults, chaos.deadline_s)
    of_engine = fake_faults
    if chaos.engine == "vllm":
        from transformers import AutoTokenizer  # here, because it takes seconds

        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        of_engine = text_faults(partial(tokenizer.decode, skip_special_tokens=True))
    found = [error] if error else recount(cluster.run_folder, config, cluster.record, of_engine)
    return [", ".join(map(str, faults)) or "no faults", *found, *leftovers.found()]


def complete(chaos: ChaosConfig, refusal: str) -> None:
    """Fill in `kinds`, and the parts that real engines need. Raises `ValueError`.

    `refusal` is the reason why this machine has no mount namespace, or "".
    """
    if chaos.engine == "vllm":
        chaos.learner, chaos.pools = "real", max(1, chaos.pools)
    if chaos.ranks > 1 and chaos.learner != "real":
        raise ValueError(
            f"ranks={chaos.ranks}: the stand-in learner has a single rank; add learner=real"
        )
    if not chaos.kinds:
        on_disk = schedule.ON_DISK if refusal else ()
        chaos.kinds = [kind for kind in schedule.KINDS if kind not in on_disk]
    elif refusal and set(chaos.kinds) & set(schedule.ON_DISK):
        raise ValueError(
            f"kinds={chaos.kinds}: full disks need a mount namespace, which this machine refuses: "
            f"{refusal}; run as root, or leave out {', '.join(schedule.ON_DISK)}"
        )


def enclose(out: Path, refusal: str) -> Sequence[Path]:
    """The folders for temporary files to which only this process and its descendants write."""
    if not refusal:
        namespace.enter("tools.chaos", sys.argv[1:])
        python = Path(sys.executable)
        return namespace.own_folders([ROOT, Path.cwd(), python, python.resolve(), out])
    print(
        "full disks are left out, and leftovers are looked for only below TMPDIR and among "
        f"processes, since nothing can be mounted here: {refusal}"
    )
    folder = tempfile.mkdtemp(prefix="chaos-", dir=namespace.TEMPORARY)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TMPDIR"], tempfile.tempdir = folder, None
    return [Path(folder)]


def new_folder(name: str) -> Path:
    """A folder for records, which outlive this process if there is something to see in them."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir="/var/tmp"))


def run(chaos: ChaosConfig) -> int:
    refusal = namespace.why_not()
    complete(chaos, refusal)
    if chaos.out:
        Path(chaos.out).mkdir(parents=True, exist_ok=True)
    own_folders = enclose(Path(chaos.out).resolve(), refusal)
    out = Path(chaos.out) if chaos.out else new_folder("chaos")
    model = out / "model"
    if chaos.engine == "vllm":
        from tools.warm_start import warm_start  # as below

        warm_start(VLLM_MODEL)
        model.symlink_to(VLLM_MODEL)
    elif chaos.learner == "real":
        from tools.faults.tiny_model import save_model  # here, because torch takes seconds

        save_model(model)
    else:  # a pool refuses a folder without a model
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").touch()
    num_held = 0
    for seed in chaos.seeds:
        folder = out / f"seed-{seed}"
        folder.mkdir(parents=True)
        started = time.monotonic()
        config = run_config(folder, model, seed, chaos.steps)
        environment = ENVIRONMENTS[seed % 2 if chaos.engine == "fake" else 0]
        config.data.environment = f"tools.faults.sampled:{environment}"
        plan, *found = hold(chaos, config, folder, own_folders)
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
    flood_s: float = key(
        30.0, "Seconds after these frames, in which peers send as fast as they can.", gt=0
    )
    keys: bool = key(
        True,
        "Give the run keys, which hostile engines and learners hold, too. If false, the frames of "
        "strangers reach the buffer as well.",
    )
    seed: int = key(0, "Seed of the frames.", ge=0)
    deadline_s: float = key(
        3600.0, "Seconds after which a run that has not ended counts as stuck.", gt=0
    )


def fuzz(chaos: FuzzConfig) -> int:
    """One undisturbed run beside hostile peers; its last step waits for the last frame."""
    own_folders = enclose(Path.cwd(), namespace.why_not())
    folder = new_folder("fuzz")
    leftovers = Leftovers(own_folders)
    config = run_config(folder, folder, chaos.seed, steps=8)
    config.buffer.peer_timeout_s = 15.0
    config.buffer.step_timeout_s = chaos.deadline_s  # the last step waits that long
    if chaos.keys:
        config.buffer.keys = str(folder / "keys")
        make_keys(folder / "keys")
    cluster = Cluster(config, folder, 2)
    hold = folder / HOLD
    hold.touch()
    attack = Attack(
        cluster, chaos.frames, chaos.flood_s, chaos.seed, lambda: hold.unlink(missing_ok=True)
    )
    error = cluster.run([], chaos.deadline_s, attack.turn)
    attack.end()
    found = [error] if error else recount(cluster.run_folder, config, cluster.record)
    found += attack.faults() + leftovers.found()
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
        16 << 20,
        "Largest growth of all files of the run between these tenths, in bytes. The token log "
        "fills about three segments of 4 MiB before it frees the first one.",
        ge=0,
    )
    deadline_s: float = key(
        3600.0, "Seconds after which a run that has not ended counts as stuck.", gt=0
    )


def run_soak(chaos: SoakConfig) -> int:
    own_folders = enclose(Path.cwd(), namespace.why_not())
    folder = new_folder("soak")
    leftovers = Leftovers(own_folders)
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
    found += leftovers.found()
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
