"""The summary that `tools.launch` prints at the end of a run.

Reads the run's directory and writes only the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from tools.reporting.advice import RunFacts, advise
from tools.reporting.compact import duration
from tools.reporting.run_directory import RunDirectory, is_number

HELD_OUT = {  # metric -> name, factor, unit
    "eval/accuracy": ("held-out accuracy", 100.0, " %"),
    "eval/reward_mean": ("held-out reward", 1.0, ""),
    "eval/length_mean": ("held-out length, mean", 1.0, ""),
    "eval/length_p99": ("held-out length, p99", 1.0, ""),
}

MOST_ADVICE = 2  # the report has the rest


def print_summary(run_dir: Path, ended: str, peaks: Mapping[str, int]) -> None:
    """Print the outcome and the cost of a run; the last line is the path of its report.

    `ended` completes "run <name>". `peaks` maps a process to its peak memory in bytes.
    """
    from tools.report import write_report  # here, because importing matplotlib takes a second

    run = RunDirectory.read(run_dir)
    print(f"run {run.name} {ended}: {run.num_steps} steps")
    for name, value in facts(run, peaks):
        print(f"  {name:<22} {value}")
    for advice in advise(RunFacts.of(run))[:MOST_ADVICE]:
        print(f"  advice: {advice.observation} {advice.action}")
    print(f"Report: {write_report(run_dir)}")


def _held_out(run: RunDirectory, key: str, kind: str = "") -> Iterator[tuple[str, str]]:
    """The first and the last result, of all held-out prompts or of those of one kind."""
    name, factor, unit = HELD_OUT[key]
    digits = 3 if key == "eval/reward_mean" else 1
    recorded = run.series(key.replace("eval/", f"eval/{kind}/") if kind else key)[1]
    if recorded:
        values = [factor * value for value in recorded]
        ends = values[:: max(1, len(values) - 1)]
        text = " -> ".join(f"{value:.{digits}f}" for value in ends) + unit
        yield (f"  {kind}: {name.removeprefix('held-out ')}" if kind else name, text)


def facts(run: RunDirectory, peaks: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """(name, value) of each fact that was recorded."""
    for key in (run.held_out, "eval/length_mean", "eval/length_p99"):
        yield from _held_out(run, key)
    for kind in run.kinds:
        for key in (run.held_out, "eval/length_mean"):
            yield from _held_out(run, key, kind)
    if run.metrics:
        yield ("wall time", f"{duration(run.seconds()[-1])} to the last step")
    if run.emulated:
        yield ("decode latency", "emulated (actors.min_step_ms)")
    last = run.metrics[-1] if run.metrics else {}
    if skipped := last.get("data/skipped_prompts"):
        yield ("prompts skipped", f"{skipped:,.0f}")
    tokens = {
        use: last[key]
        for use in ("generated", "trained", "without_signal", "cancelled", "discarded")
        if is_number(last.get(key := f"tokens/{use}"))
    }
    if tokens:
        yield (
            "tokens",
            ", ".join(f"{count:,.0f} {use.replace('_', ' ')}" for use, count in tokens.items()),
        )
    if peaks:
        yield (
            "peak memory",
            ", ".join(f"{name} {peak / 2**20:,.0f} MiB" for name, peak in peaks.items()),
        )


def resume_hint(run_dir: Path) -> str:
    """A sentence that says how to continue a run that ended early."""
    if not (run_dir / "config.yaml").is_file():
        return "The run had not begun; start it again with the same command."
    latest = run_dir / "checkpoints" / "latest"
    step = latest.read_text().strip().removeprefix("step_").lstrip("0") if latest.is_file() else ""
    where = f"from step {step}" if step else "from the start, as there is no checkpoint yet"
    return (
        f"To continue {where}: python -m tools.launch --config {run_dir / 'config.yaml'} "
        "run.resume=true"
    )
