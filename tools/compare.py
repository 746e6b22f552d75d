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
from typing import NoReturn

from buffer.records import settings
from buffer.records.files import atomic_write
from configs import cli
from configs.command import run_command
from configs.schema import key
from darts.simulate.schema import SimulateConfig, check
from darts.simulate.world import simulate
from tools.comparing.page import html, markdown, plot_curves, plot_table
from tools.comparing.rows import add_cost_to_reach, summarise, table
from tools.comparing.sets import SETS, Variants
from tools.reporting.differences import IDENTITY
from tools.reporting.run_directory import EVALUATIONS, Row, RunDirectory

AVERAGES = "Means over the seeds; ± is half of a 95 % interval (Student's t)."


@dataclass
class CompareConfig:
    set: str = key("ablation", "The set of variants to compare.", choices=list(SETS))
    base: str = key(
        "configs/simulate/qwen14b.yaml", "Configuration file from which all variants start."
    )
    latency: str = key(
        "",
        "Live runs: a configuration file over base with an emulated decode latency, such as "
        "configs/latency/a10_7b.yaml.",
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
    reach: float = key(
        0.0,
        "Live runs: held-out reward to which seconds, steps and tokens count. 0: the final one of "
        "the first variant, for each seed.",
        ge=0,
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


Job = tuple[CompareConfig, str, Sequence[str], int]  # a variant's name and values, and a seed


def run(config: CompareConfig) -> None:
    variants = _chosen(config)
    jobs: list[Job] = [
        (config, name, variants[name], seed) for name, seed in product(variants, config.seeds)
    ]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if config.live:
        for job in jobs:
            _check_live(job)  # reports any mistake before the first one runs
        folders = [_train(job) for job in jobs]
        with ThreadPoolExecutor(config.jobs) as pool:
            list(pool.map(lambda folder: _judge(folder, config.judge_samples), folders))
        results = [summarise(RunDirectory.read(folder)) for folder in folders]
        add_cost_to_reach([seed for _, _, _, seed in jobs], results, config.margin, config.reach)
    else:
        for job in jobs:
            _simulation(job)  # reports any mistake before the first one runs
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
    page = html(rows, config.set, f"{kind}. {config.base}, seeds {config.seeds}. {AVERAGES}")
    atomic_write(out / "table.html", page, durable=False)
    plot_table(rows, out / "table.png", emulated)
    if config.live:
        plot_curves(by_variant, out / "curves.png", emulated)
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


def _simulation(job: Job) -> SimulateConfig:
    config, _, values, seed = job
    loaded: SimulateConfig = cli.load(
        ["--config", config.base, *config.overrides, *values, f"run.seed={seed}"], SimulateConfig
    )
    check(loaded)
    return loaded


def _simulated(job: Job) -> Row:
    return simulate(_simulation(job))


def _train(job: Job) -> Path:
    """Execute a live run alone on this machine, and return its directory."""
    config, _, _, seed = job
    folder = _folder(job)
    if not (folder / "report.html").exists():  # an interrupted comparison continues
        command = [sys.executable, "-m", "tools.launch", *_settings(job), f"run.seed={seed}"]
        command += [f"run.name={folder.name}", f"run.dir={config.out}", "launch.progress=none"]
        command += ["run.resume=true"] if (folder / settings.NAME).exists() else []
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
    return folder


def _folder(job: Job) -> Path:
    config, name, _, seed = job
    return Path(config.out) / f"{name.replace(',', '').replace(' ', '-')}-{seed}"


def _settings(job: Job) -> list[str]:
    """The arguments that `tools.launch` takes for a live run, without those that locate it."""
    config, _, values, _ = job
    files = ["--config", config.base, *(["--config", config.latency] if config.latency else [])]
    return [*files, *config.overrides, *values, *_judged_later(config)]


def _check_live(job: Job) -> None:
    """Raises `ValueError` if the run cannot be started, or its folder holds one of other settings.

    Otherwise its results would stand in a table to which they do not belong.
    """
    config, _, _, seed = job
    wanted, folder = cli.load([*_settings(job), f"run.seed={seed}"]), _folder(job)
    if not (folder / settings.NAME).exists():
        return
    before = cli.load(["--config", str(folder / settings.NAME)])
    ignored = settings.OF_THE_COMMAND | IDENTITY | {"launch.progress"}
    changed = [change for change in cli.changes(before, wanted) if change.path not in ignored]
    if changed:
        raise ValueError(
            f"out={config.out}: {folder} was run with {changed[0].path}={changed[0].before}, and "
            f"this comparison has {changed[0].after}; give another out, or delete that folder"
        )


def _judge(folder: Path, num_samples: int) -> None:
    if not _is_judged(folder / EVALUATIONS, num_samples):
        subprocess.run(
            [sys.executable, "-m", "tools.evaluate", str(folder), "--samples", str(num_samples)],
            check=True,
        )


def _is_judged(file: Path, num_samples: int) -> bool:
    if not file.exists():
        return False
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return all(row.get("samples_per_prompt") == num_samples for row in rows)


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
