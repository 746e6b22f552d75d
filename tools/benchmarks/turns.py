"""`python -m tools.bench turns`: the cost of straggling environments, with DARTS and without.

Four short runs: with a quick and with a straggling environment, once with DARTS' cancel and once
plain, where a group waits for all its rollouts. Buffer, worker and the environment's processes are
real; the engine draws its tokens, and the learner trains nothing. Prints, and judges nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from actors.environments import Environment, make_environment
from actors.worker import Worker
from buffer.wire import messages as msg
from buffer.wire.client import EngineLink
from configs.schema import Config
from tools.benchmarks.slow_tool import LONGEST_S, QUICK_S, SLOW_S
from tools.benchmarks.traffic import LEAVE_S, Learner, bench_config, buffer_process
from tools.benchmarks.turn_times import ENGINE, TimedEngine, TimedEnvironment, TimedLink, Times

GROUPS, GROUP_SIZE, UPPER, SLOTS = 4, 4, 1.5, 16
NUM_ROWS = 2000
KINDS = ("quick", "straggling")
POLL_S, LONGEST_RUN_S = 0.02, 300.0
POLICIES = {
    "darts": ("redundancy.rule=fixed", f"redundancy.upper={UPPER}", "darts.pilot=0"),
    "plain": ("redundancy.rule=none", "darts.policy=plain"),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured. The defaults need about a minute and a half."""

    steps: int = 8
    warm_up: int = 2  # steps before those
    slow_frac: float = 0.05  # of the steps of the straggling environment
    num_workers: int = 24  # processes of the environment


@dataclass(frozen=True)
class Result:
    """One run. Seconds are those of all rollouts together, per group that was trained.

    overlap_s: slot-seconds of rollouts that waited for their environment, in total.
    lingering_s: seconds for which processes went on with steps of cancelled rollouts, in total.
    """

    group_s: float
    slot_s: float
    waiting_s: float
    overlap_s: float
    most_at_once: int
    cancel_delays: list[float]
    lingering_s: float


def main() -> None:
    sizes = Sizes()
    print(
        f"{sizes.slow_frac:.0%} of the steps of the straggling environment take {SLOW_S:g} to "
        f"{LONGEST_S:g} s, all others {QUICK_S:g} s; 3 turns, {SLOTS} slots, groups of {GROUP_SIZE}"
    )
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path.cwd()) as name:
        _print(measure(Path(name), tuple(itertools.product(KINDS, POLICIES)), sizes))


def measure(
    folder: Path, cases: Sequence[tuple[str, str]], sizes: Sizes
) -> dict[tuple[str, str], Result]:
    """One run for each pair of environment and policy; they share the environment's processes."""
    for kind in KINDS:
        slow_frac = sizes.slow_frac if kind == "straggling" else 0.0
        rows = [{"prompt": f"p{i}", "slow_frac": slow_frac} for i in range(NUM_ROWS)]
        _rows(folder, kind).write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = {case: _config(folder, *case, sizes) for case in cases}
    environment = make_environment(configs[cases[0]])
    try:
        return {
            case: asyncio.run(_measure(config, environment, sizes))
            for case, config in configs.items()
        }
    finally:
        environment.close()


def _rows(folder: Path, kind: str) -> Path:
    return folder / f"{kind}.jsonl"


def _config(folder: Path, kind: str, policy: str, sizes: Sizes) -> Config:
    return bench_config(
        folder, f"{kind}-{policy}", f"data.train={_rows(folder, kind)}",
        "data.environment=tools.benchmarks.slow_tool:SlowTool", f"actors.slots={SLOTS}",
        f"data.verifier_workers={sizes.num_workers}", f"batch.groups={GROUPS}",
        f"darts.group_size={GROUP_SIZE}", "sampling.max_tokens=1024", "actors.stream_interval=8",
        *POLICIES[policy],
    )  # fmt: skip


async def _measure(config: Config, environment: Environment, sizes: Sizes) -> Result:
    times = Times()
    timed = TimedEnvironment(environment, times)
    hello = msg.EngineHello(
        engine_id=ENGINE, engine_type="fake", slots=SLOTS, policy_version=-1, pid=os.getpid(),
        incarnation="bench",
    )  # fmt: skip
    with (
        buffer_process(config, Path(config.run.dir)),
        EngineLink(config.buffer.address, ENGINE, config.buffer.keys) as link,
    ):
        learner = Learner(config)
        learner.start()
        timed_link = TimedLink(link, times)
        welcome = await asyncio.to_thread(link.connect, hello, config.buffer.connect_timeout_s)
        worker = Worker(
            config, TimedEngine(config, times), timed_link, timed, _fetch, hello=hello
        )  # fmt: skip
        tasks = [asyncio.ensure_future(worker.run(welcome)), asyncio.ensure_future(timed.sample())]
        try:
            start_s = await _until(learner, sizes.warm_up, tasks)
            end_s = await _until(learner, sizes.warm_up + sizes.steps, tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            learner.over = True
            learner.join(LEAVE_S)
    groups = sizes.steps * GROUPS
    return Result(
        group_s=(end_s - start_s) / groups,
        slot_s=times.seconds("decoding", start_s, end_s) / groups,
        waiting_s=times.seconds("waiting", start_s, end_s) / groups,
        overlap_s=times.overlap_s(),
        most_at_once=times.most_at_once,
        cancel_delays=times.cancel_delays(),
        lingering_s=times.lingering_s,
    )


def _fetch(policy: msg.SnapshotRef) -> bytes:
    return b"policy %d" % policy.version


async def _until(learner: Learner, num_steps: int, tasks: list[asyncio.Future[object]]) -> float:
    """The time at which the learner has taken so many steps."""
    deadline_s = time.monotonic() + LONGEST_RUN_S
    while learner.num_steps < num_steps:
        await asyncio.sleep(POLL_S)
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{learner.num_steps} of {num_steps} steps in {LONGEST_RUN_S:g} s")
        for task in tasks:
            if task.done():
                raise RuntimeError(f"the run ended early: {task.result()}")
    return time.monotonic()


def _print(results: dict[tuple[str, str], Result]) -> None:
    print(
        f"{'environment':<12}{'policy':<8}{'s/group':>9}{'slot-s/group':>14}{'waits, s/group':>16}"
        f"{'slot-s in waits':>17}{'at once':>9}{'cancelled waits':>17}"
    )
    for (kind, policy), result in results.items():
        print(
            f"{kind:<12}{policy:<8}{result.group_s:>9.2f}{result.slot_s:>14.2f}"
            f"{result.waiting_s:>16.2f}{result.overlap_s:>17.2f}{result.most_at_once:>9}"
            f"{len(result.cancel_delays):>17}"
        )
    for policy in POLICIES:
        quick, slow = results["quick", policy], results["straggling", policy]
        print(
            f"{policy}: stragglers multiply the time per group by "
            f"{slow.group_s / quick.group_s:.2f}, its slot-seconds by "
            f"{slow.slot_s / quick.slot_s:.2f}"
        )
    slow = results["straggling", "darts"]
    if slow.cancel_delays:
        num = len(slow.cancel_delays)
        print(
            f"a cancelled wait: confirmed within {1000 * median(slow.cancel_delays):.1f} ms "
            f"(median; longest {1000 * max(slow.cancel_delays):.1f} ms), and its process was busy "
            f"for another {slow.lingering_s / num:.2f} s on average"
        )
