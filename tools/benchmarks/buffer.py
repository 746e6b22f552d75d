"""`python -m tools.bench buffer`: every figure of the buffer, in about a minute and a half.

Owns the order of the measurements and their text. Prints each figure with its aim, if it has one,
and judges nothing. The load shares this machine's cores with the buffer.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tools.benchmarks import records
from tools.benchmarks.traffic import (
    LONGEST_S,
    NUM_ENGINES,
    NUM_LENGTHS,
    NUM_SLOTS,
    NUM_TOKENS,
    Load,
    bench_config,
    ends_per_s,
    run_for,
    running,
    seconds_to_restart,
)

NO_FSYNC_S = 1e6
CHUNK = 8
AIM_TRAJECTORIES, AIM_COST = 5000, 0.10


@dataclass(frozen=True)
class Sizes:
    """How much is measured. The defaults need about a minute and a half."""

    num_records: int = 20_000
    rounds: int = 3
    warm_up: int = 1000  # rollouts that end before each measurement
    measured_s: float = 4.0
    num_engines: int = 1000  # that report progress
    steps: int = 10  # with cancels
    outstanding: tuple[int, ...] = (16, 256, 1024)  # rollouts in flight when the buffer is killed


def main(sizes: Sizes | None = None) -> None:
    sizes = sizes or Sizes()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=Path.cwd()) as name:
        folder = Path(name)
        records.append_rates(folder, sizes.num_records, sizes.rounds)
        print_trajectories(folder, sizes)
        print_progress(folder, sizes)
        print_cancels(folder, sizes)
        print_restarts(folder, sizes)


def print_trajectories(folder: Path, sizes: Sizes) -> None:
    """Buffers with and without fsync take turns, so that noise affects both alike."""
    load = Load(num_engines=NUM_ENGINES, slots=NUM_SLOTS, chunk=NUM_TOKENS, num_tokens=NUM_TOKENS)
    durable, free = [], []
    for index in range(sizes.rounds):
        for fsync_s, rates in ((records.FSYNC_S, durable), (NO_FSYNC_S, free)):
            name = f"fsync-{index}-{fsync_s:g}"
            config = bench_config(folder, name, f"buffer.fsync_s={fsync_s}")
            rates.append(ends_per_s(config, folder, load, sizes.warm_up, sizes.measured_s))
    print(
        f"trajectories of {NUM_TOKENS:,} tokens through socket, core and logs: "
        f"{median(r.per_s for r in durable):,.0f}/s, "
        f"{median(r.per_cpu_s for r in durable):,.0f} per second of the buffer's CPU time "
        f"(aim {AIM_TRAJECTORIES:,}). Beside it, the load kept "
        f"{median(r.load_cores for r in durable):.2f} cores of {os.cpu_count()} busy"
    )
    pairs = list(zip(durable, free, strict=True))
    costs = [1 - median(a[i] / b[i] for a, b in pairs) for i in range(2)]
    print(
        f"cost of durability: {costs[0]:.1%} of the trajectories, {costs[1]:.1%} of the CPU time "
        f"(aim below {AIM_COST:.0%})"
    )


def print_progress(folder: Path, sizes: Sizes) -> None:
    """The lengths differ, so that the rollouts do not all end at the same time."""
    num_tokens = NUM_LENGTHS * CHUNK
    config = bench_config(folder, "progress", f"sampling.max_tokens={num_tokens}")
    load = Load(
        num_engines=sizes.num_engines, slots=2, chunk=CHUNK, num_tokens=num_tokens, varied=True
    )
    ends = ends_per_s(config, folder, load, sizes.warm_up // 4, sizes.measured_s)
    reports = (1 + NUM_LENGTHS) / 2  # per rollout
    print(
        f"progress of {sizes.num_engines:,} engines: {reports * ends.per_s:,.0f} reports of "
        f"{CHUNK} tokens/s, {reports * ends.per_cpu_s:,.0f} per second of the buffer's CPU time"
    )


def print_cancels(folder: Path, sizes: Sizes) -> None:
    """From the decision to cancel to the confirmed free slot, as the buffer records it per step.

    The engines report every 20 ms, so the buffer is not saturated.
    """
    load = Load(num_engines=16, slots=16, chunk=CHUNK, num_tokens=400, varied=True, pause_s=0.02)
    config = bench_config(
        folder, "cancels", "sampling.max_tokens=400", "redundancy.rule=fixed",
        "redundancy.upper=1.5", "darts.pilot=0", "batch.groups=8",
    )  # fmt: skip
    file, delays, waited_s = Path(config.run.dir) / config.run.name / "metrics.jsonl", [], 0.0
    with running(config, folder, load) as engines:
        while len(delays) < sizes.steps and waited_s < LONGEST_S:
            waited_s += run_for(engines, 0.5)
            delays = _cancel_delays(file)
    p50, p99 = (f"{median(of_q):.1f}" for of_q in zip(*delays, strict=True))
    print(
        f"cancel decision to freed slot: p50 {p50} ms, p99 {p99} ms "
        f"(medians over {len(delays)} steps)"
    )


def _cancel_delays(file: Path) -> list[tuple[float, float]]:
    """The median and the 99th percentile of each step in which something was cancelled."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    keys = "cancel/freed_p50_ms", "cancel/freed_p99_ms"
    return [(row[keys[0]], row[keys[1]]) for row in rows if keys[0] in row]


def print_restarts(folder: Path, sizes: Sizes) -> None:
    print(f"{'rollouts in flight':>20}{'tokens':>12}{'logs, MB':>10}{'restart, s':>12}")
    for number in sizes.outstanding:
        slots = max(1, number // 16)
        load = Load(
            num_engines=16, slots=slots, chunk=CHUNK, num_tokens=NUM_TOKENS // 2, ends=False
        )
        # Enough groups to fill the slots of all engines, since a group stays on one of them.
        config = bench_config(folder, f"restart-{number}", f"batch.groups={max(4, number // 8)}")
        wanted = 16 * slots * load.num_tokens
        with running(config, folder, load) as engines:
            filled_s = 0.0
            while engines.num_sampled < wanted and filled_s < LONGEST_S:
                filled_s += run_for(engines, 0.2)
            run_for(engines, 1.0)  # until the last reports are read
            num_tokens = engines.num_sampled
        run = Path(config.run.dir) / config.run.name
        num_bytes = sum(
            path.stat().st_size for name in ("events", "tokens") for path in (run / name).iterdir()
        )
        seconds = seconds_to_restart(config, folder)
        print(f"{16 * slots:>20,}{num_tokens:>12,}{num_bytes / 1e6:>10.1f}{seconds:>12.2f}")
