"""What a run came to: the lines that `tools.launch` ends with. Reads the run's directory; writes nothing but the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.progress import clock
from tools.run_directory import RunDirectory, is_number

HELD_OUT = {  # metric -> name, factor, unit
    "eval/accuracy": ("held-out accuracy", 100.0, " %"),
    "eval/length_mean": ("held-out length, mean", 1.0, ""),
    "eval/length_p99": ("held-out length, p99", 1.0, ""),
}


def print_summary(run_dir: Path, peaks: Mapping[str, int], wall_s: float) -> None:
    """Before and after, what it took, and the report, whose path is the last line. `peaks`: bytes by process."""
    from tools.report import write_report  # here: it draws, and takes a second to import

    run = RunDirectory.read(run_dir)
    trained_s = run.seconds()[-1] if run.metrics else 0.0
    print(f"run {run.name} ended well: {len(run.metrics)} steps in {clock(trained_s)} ({clock(wall_s)} from start to end)")
    Console(highlight=False).print(_table(run, peaks))
    print(f"Report: {write_report(run_dir)}")


def _table(run: RunDirectory, peaks: Mapping[str, int]) -> Table:
    table = Table.grid(padding=(0, 2))
    for key, (name, factor, unit) in HELD_OUT.items():
        values = [factor * value for value in run.series(key)[1]]
        if values:
            table.add_row(f"  {name}", " -> ".join(f"{value:.1f}" for value in dict.fromkeys((values[0], values[-1]))) + unit)
    last = run.metrics[-1] if run.metrics else {}
    tokens = [
        (name, last[key]) for name in ("generated", "trained", "cancelled", "discarded") if is_number(last.get(key := f"tokens/{name}"))
    ]
    if tokens:
        table.add_row("  tokens", ", ".join(f"{count:,.0f} {name}" for name, count in tokens))
    if peaks:
        table.add_row("  peak memory", ", ".join(f"{name} {peak / 2**20:,.0f} MiB" for name, peak in peaks.items()))
    return table


def resume_hint(run_dir: Path) -> str:
    """How to go on with a run that ended early, as a sentence."""
    if not (run_dir / "config.yaml").is_file():
        return "It had not begun: the same command starts it again."
    latest = run_dir / "checkpoints" / "latest"
    step = latest.read_text().strip().removeprefix("step_").lstrip("0") if latest.is_file() else ""
    where = f"from step {step}" if step else "from the start, as there is no checkpoint yet"
    return f"To go on {where}: python -m tools.launch --config {run_dir / 'config.yaml'} run.resume=true"
