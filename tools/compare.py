"""`python -m tools.compare [key=value ...]`: compare policies on the same seeds and the same work.

    python -m tools.compare set=ablation base=configs/simulate/qwen14b.yaml out=runs/compare
    python -m tools.compare live=true set=live base=configs/demo.yaml seeds=[0,1,2] out=runs/compare

The policies are simulated or run live. A variant is a name and the configuration values that define
it; nothing else differs. The first variant is the reference for the others. Writes table.json,
table.html and table.png to `out`, and curves.png for live runs. A difference in time is called a
speedup only if the held-out rewards agree within `margin`; simulated policies have none, and the
table says so.

Live runs are judged after they have ended, by `tools.evaluate` on their checkpoints, so that
judging takes no time from any run. Times count from the end of the first step, because the engines
are loaded during that step.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import NoReturn

from buffer.records.files import atomic_write
from configs import cli
from configs.command import run_command
from configs.schema import key
from darts.simulate.schema import SimulateConfig, check
from darts.simulate.world import simulate
from tools.reporting.compare_page import COLUMNS, html, markdown, plot_curves, plot_table
from tools.reporting.run_directory import EVALUATIONS, Row, RunDirectory

Variants = dict[str, list[str]]

PLAIN = ["darts.policy=plain"]
SYNC, ASYNC = ["pipeline.mode=sync"], ["pipeline.mode=async"]
FIXED = ["redundancy.rule=fixed", "redundancy.upper=1.5"]
# The mean budget is about 12, the budget of FIXED.
ADAPTIVE = ["redundancy.rule=paper", "redundancy.upper=2.0", "redundancy.price=0.6"]
# The same 32 devices in two parts that are about equally busy under async plain.
SPLIT_32 = ["engines.num_engines=12", "learner.num_gpus=20"]
# The demo in smaller steps. A plain step has 32 responses, for which the latency of this engine is
# flat, as on a GPU that is not full.
FLAT = ["batch.groups=4", "run.steps=128", "optimizer.lr=1e-4"]
LONGER = [*FLAT, "run.steps=192"]  # still ends earlier than sync plain

SETS: dict[str, Variants] = {
    "ablation": {  # the published order, with the published rule for the long seat
        "sync plain": [*SYNC, *PLAIN, "learner.streaming=false"],
        "+ streaming": [*SYNC, *PLAIN],
        "+ sampling (longest)": [*SYNC, *FIXED, "darts.long_end=longest"],
        "+ adaptive (longest)": [*SYNC, *ADAPTIVE, "darts.long_end=longest"],
        "+ sampling (survivor)": [*SYNC, *FIXED],
        "+ adaptive (survivor)": [*SYNC, *ADAPTIVE],
        "random of 12": [*SYNC, *FIXED, "darts.policy=random"],
    },
    "sensitivity": {  # K:L
        "sync plain": [*SYNC, *PLAIN],
        "7:1": [*SYNC, *FIXED],
        "6:2": [*SYNC, *FIXED, "darts.num_long=2"],
        "4:4": [*SYNC, *FIXED, "darts.num_long=4"],
    },
    "async": {  # 32 devices each: sync uses all of them for both tasks, async splits them
        "sync plain": [*SYNC, *PLAIN],
        "sync tail batching": [*SYNC, "baseline.scheduler=tail_batching"],
        "sync partial rollout": [*SYNC, "baseline.scheduler=partial_rollout"],
        "sync darts": [*SYNC, *FIXED],
        "async plain": [*ASYNC, *PLAIN, *SPLIT_32],
        "async first finished": [*ASYNC, *FIXED, "darts.policy=first_finished", *SPLIT_32],
        "async random of 12": [*ASYNC, *FIXED, "darts.policy=random", *SPLIT_32],
        "async darts, longest": [*ASYNC, *FIXED, "darts.long_end=longest", *SPLIT_32],
        "async darts, fixed 12": [*ASYNC, *FIXED, *SPLIT_32],
        "async darts, marginal": [
            *ASYNC,
            "redundancy.rule=marginal",
            "redundancy.upper=2.0",
            *SPLIT_32,
        ],
    },
    "rules": {  # on the hardware of the base configuration
        "async plain": [*ASYNC, *PLAIN],
        "random of 12": [*ASYNC, *FIXED, "darts.policy=random"],
        "exact, longest": [*ASYNC, *FIXED, "darts.long_end=longest"],
        "exact, survivor": [*ASYNC, *FIXED],
        "exact, none": [*ASYNC, *FIXED, "darts.long_end=none"],
        "eager": [*ASYNC, *FIXED, "darts.cancel=eager"],
        "first finished": [*ASYNC, *FIXED, "darts.policy=first_finished"],
        "marginal": [*ASYNC, "redundancy.rule=marginal", "redundancy.upper=2.0"],
    },
    "live": {
        "sync plain": [*SYNC, *PLAIN, *FLAT],
        "async plain": [*ASYNC, *PLAIN, *LONGER],
        "async darts, 12": [*ASYNC, *FIXED, *LONGER],
        "async darts, marginal": [*ASYNC, "redundancy.rule=marginal", *LONGER],  # the default rule
        "async random of 12": [*ASYNC, *FIXED, "darts.policy=random", *LONGER],
    },
}


@dataclass
class CompareConfig:
    set: str = key("ablation", "The set of variants to compare.", choices=list(SETS))
    base: str = key(
        "configs/simulate/qwen14b.yaml", "Configuration file from which all variants start."
    )
    overrides: list[str] = key([], "Overrides of every variant, such as [run.steps=10].")
    only: list[str] = key(
        [], "Names of the variants to run; the first is the reference. Empty: the whole set."
    )
    seeds: list[int] = key([0], "Seeds; every variant runs once with each of them.")
    live: bool = key(
        False, "Compare real runs (tools.launch), one after the other, instead of simulations."
    )
    judge_every: int = key(
        5, "Live runs: number of learner steps between the checkpoints to judge.", ge=1
    )
    judge_samples: int = key(
        4, "Live runs: number of responses per held-out prompt and checkpoint.", ge=1
    )
    margin: float = key(
        0.02,
        "Largest difference in mean held-out reward at which a difference in time is called a "
        "speedup.",
        ge=0,
    )
    jobs: int = key(
        1, "Number of simulations, or of evaluations of live runs, that run in parallel.", ge=1
    )
    out: str = key("runs/compare", "Folder for the table, and for the directories of live runs.")


def run(config: CompareConfig) -> None:
    variants = _chosen(config)
    jobs = [(config, name, variants[name], seed) for name, seed in product(variants, config.seeds)]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if config.live:
        folders = [_train(*job) for job in jobs]
        with ThreadPoolExecutor(config.jobs) as pool:
            list(pool.map(lambda folder: _judge(folder, config.judge_samples), folders))
        results = [summarise(RunDirectory.read(folder)) for folder in folders]
        add_time_to_reach([seed for _, _, _, seed in jobs], results, config.margin)
    else:
        for job in jobs:
            _simulation(*job)  # reports any mistake before the first one runs
        with ProcessPoolExecutor(config.jobs) as pool:
            results = list(pool.map(_simulated, jobs))
    by_variant: dict[str, list[Row]] = {name: [] for name in variants}
    for (_, name, _, _), result in zip(jobs, results, strict=True):
        by_variant[name].append(result)
    rows = table(by_variant, config.margin)
    written = {"seeds": config.seeds, "variants": variants, "rows": rows, "results": by_variant}
    atomic_write(out / "table.json", json.dumps(written, indent=1) + "\n", durable=False)
    emulated = any(result.get("emulated") for result in results)
    kind = (
        f"Real runs{' on emulated decode latency (actors.min_step_ms)' if emulated else ''}"
        if config.live
        else "Simulated: held-out reward is not modelled, and lengths, latencies and learning are "
        "assumptions"
    )
    page = html(rows, config.set, f"{kind}. {config.base}, seeds {config.seeds}. Means over seeds.")
    atomic_write(out / "table.html", page, durable=False)
    plot_table(rows, out / "table.png")
    if config.live:
        plot_curves(by_variant, out / "curves.png")
    print(markdown(rows))
    print("\nthe decode latency is emulated" if emulated else "")
    print(f"{out}/table.json, table.html, table.png")


def _chosen(config: CompareConfig) -> Variants:
    known = SETS[config.set]
    unknown = [name for name in config.only if name not in known]
    if unknown:
        raise ValueError(
            f"only={unknown[0]!r}: not a variant of set={config.set}; its variants are "
            f"{', '.join(known)}"
        )
    if not config.seeds:
        raise ValueError("seeds=[]: give at least one seed, otherwise nothing runs")
    return {name: known[name] for name in (config.only or known)}


# Running ------------------------------------------------------------------------------------------


def _simulation(
    config: CompareConfig, name: str, values: Sequence[str], seed: int
) -> SimulateConfig:
    loaded: SimulateConfig = cli.load(
        ["--config", config.base, *config.overrides, *values, f"run.seed={seed}"], SimulateConfig
    )
    check(loaded)
    return loaded


def _simulated(job: tuple[CompareConfig, str, Sequence[str], int]) -> Row:
    return simulate(_simulation(*job))


def _train(config: CompareConfig, name: str, values: Sequence[str], seed: int) -> Path:
    """Execute a live run alone on this machine, and return its directory."""
    run_name = f"{name.replace(',', '').replace(' ', '-')}-{seed}"
    folder = Path(config.out) / run_name
    if not (folder / "report.html").exists():  # an interrupted comparison continues
        command = [
            sys.executable,
            "-m",
            "tools.launch",
            "--config",
            config.base,
            *config.overrides,
            *values,
            *_judged_later(config),
        ]
        command += [
            f"run.seed={seed}",
            f"run.name={run_name}",
            f"run.dir={config.out}",
            "launch.progress=none",
        ]
        command += ["run.resume=true"] if (folder / "config.yaml").exists() else []
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
    return folder


def _judge(folder: Path, num_samples: int) -> None:
    if not (folder / EVALUATIONS).exists():
        subprocess.run(
            [sys.executable, "-m", "tools.evaluate", str(folder), "--samples", str(num_samples)],
            check=True,
        )


def _judged_later(config: CompareConfig) -> list[str]:
    """Settings that keep the checkpoints to judge, and evaluate only before and after training.

    Evaluation stays enabled because prompts are held out only if a run evaluates.
    """
    return [
        f"learner.checkpoint_every={config.judge_every}",
        "learner.keep_checkpoints=1000000",
        "eval.every=1000000",
        "eval.samples_per_prompt=1",
    ]


def summarise(run: RunDirectory) -> Row:
    """A finished and judged run in the format of a simulation's summary, without the first step.

    `curve` has one entry per judged checkpoint: the seconds until it was saved, and its held-out
    reward.
    """
    if len(run.metrics) < 2:
        raise ValueError(
            f"{run.path}: {len(run.metrics)} steps recorded; a comparison needs at least two"
        )
    seconds, last = run.seconds(), run.metrics[-1]
    selected = sorted(
        r["tokens"]
        for group in run.trained_groups()
        for r in group["rollouts"]
        if r["end"].startswith("selected")
    )
    took_s = seconds[-1] - seconds[0]
    judged = [json.loads(line) for line in (run.path / EVALUATIONS).read_text().splitlines()]
    return {
        "step_s": took_s / (len(seconds) - 1),
        "emulated": run.emulated,
        **{name: last[name] for name in last if name.startswith("tokens/")},
        "busy_frac": _mean(run, "engine/busy_frac"),
        "wait_frac": sum(run.series("wait/learner_s")[1][1:]) / took_s,
        "lag_mean": _mean(run, "lag/mean"),
        "lag_max": max(run.series("lag/max")[1]),
        "generated_mean": _mean(run, "length/generated_mean"),
        "length_mean": fmean(selected),
        "length_p50": selected[len(selected) // 2],
        "length_p99": selected[int(0.99 * len(selected))],
        "reward": _mean(run, "reward/mean"),
        "budget": _mean(run, "darts/budget_mean"),
        "curve": [[seconds[row["step"] - 1] - seconds[0], row["reward_mean"]] for row in judged],
        "judged_reward": judged[-1]["reward_mean"],
        "judged_length_mean": judged[-1]["length_mean"],
        "judged_length_p99": judged[-1]["length_p99"],
        "trained_s": took_s,
    }


def _mean(run: RunDirectory, name: str) -> float:
    values = run.series(name)[1]
    return fmean(values) if values else float("nan")


def add_time_to_reach(seeds: Sequence[int], results: list[Row], margin: float) -> None:
    """Add the seconds until a run first reaches the final held-out reward of its reference.

    `reach_s` counts until the reward is reached, `near_s` until it is within `margin`. A value is
    absent if this never happens. The reference is the first result with the same seed.
    """
    targets: dict[int, float] = {}
    for seed, row in zip(seeds, results, strict=True):
        target = targets.setdefault(seed, row["judged_reward"])
        for name, enough in (("reach_s", target), ("near_s", target - margin)):
            reached = [time_s for time_s, reward in row["curve"] if reward >= enough]
            if reached:
                row[name] = reached[0]


# Table --------------------------------------------------------------------------------------------


def table(by_variant: dict[str, list[Row]], margin: float) -> list[Row]:
    """One row per variant: means over seeds, the range of step times, and the verdict."""
    reference = next(iter(by_variant.values()))
    rows = []
    for name, results in by_variant.items():
        row: Row = {"variant": name}
        for column in COLUMNS:
            values = [result[column] for result in results if column in result]
            if len(values) == len(results):
                row[column] = fmean(values)
        ratios = [
            base["step_s"] / result["step_s"]
            for base, result in zip(reference, results, strict=True)
        ]
        row["time_ratio"], row["time_ratio_range"] = fmean(ratios), [min(ratios), max(ratios)]
        row["verdict"] = verdict(row, rows[0] if rows else row, margin)
        rows.append(row)
    return rows


def verdict(row: Row, reference: Row, margin: float) -> str:
    """The speedup, or the reason why none is claimed."""
    if row is reference:
        return "reference"
    ratio = f"{row['time_ratio']:.2f}x"
    if "judged_reward" not in row or "judged_reward" not in reference:
        return f"{ratio} in time; held-out reward not modelled"
    difference = row["judged_reward"] - reference["judged_reward"]
    if abs(difference) > margin:
        return f"no speedup claimed: held-out reward {difference:+.3f}"
    return f"{ratio} speedup"


def main() -> NoReturn:
    run_command(
        "Run several policies on the same seeds and the same work, simulated or live, and print "
        "one table.",
        run,
        schema=CompareConfig,
        errors=(subprocess.CalledProcessError,),
    )


if __name__ == "__main__":
    main()
