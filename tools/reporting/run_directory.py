"""Reads the directory of a run, finished or not.

Never writes, and never raises because of a half-written line. Driven by the tools that read a run:
`tools.report`, `tools.compare` and `tools.tail_monitor --play`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from buffer.records.row_segments import Row, begins_at, exists, read_lines
from configs.errors import one_line

FILES = {
    "config.yaml": "the settings are unknown",
    "metrics.jsonl": "there are no curves",
    "groups.jsonl": "nothing is known about single prompts",
    "samples.jsonl": "there are no responses to read",
}
EVALUATIONS = "evaluations.jsonl"  # exists only if `tools.evaluate` was run
REQUIRED_KEYS = {
    "metrics.jsonl": {"step"},
    "groups.jsonl": {
        "step",
        "prompt_id",
        "opened_version",
        "shipped_version",
        "budget",
        "end",
        "rollouts",
    },
    "samples.jsonl": {"step"},
}


@dataclass
class RunDirectory:
    """The rows of a run. `problems` has one sentence per thing missing, skipped or unfinished."""

    path: Path
    config: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    groups: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> RunDirectory:
        """Read the directory. Raises `ValueError` if `path` holds none of a run's files."""
        if not any(exists(path / name) for name in FILES):
            what = "is not a folder" if not path.is_dir() else f"holds none of {', '.join(FILES)}"
            raise ValueError(f"{path} {what}: give the directory of a run, such as runs/<name>")
        run = cls(path)
        run._read_config()
        run.metrics = run._latest_per_step(run._read_rows("metrics.jsonl"))
        run.groups = run._read_rows("groups.jsonl")
        run.samples = run._read_rows("samples.jsonl")
        planned = run.setting("run.steps")
        if run.metrics and isinstance(planned, int) and run.num_steps < planned:
            run.problems.append(
                f"The run has not finished: {run.num_steps} of {planned} steps are recorded."
            )
        return run

    @property
    def num_steps(self) -> int:
        """Number of steps done, with those whose rows were removed since."""
        return int(self.metrics[-1]["step"]) + 1 if self.metrics else 0

    @property
    def name(self) -> str:
        return str(self.setting("run.name") or self.path.resolve().name)

    def setting(self, key: str) -> Any:
        """The value of a dotted configuration key, or None if it is unknown."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def emulated(self) -> bool:
        """Whether engines of this run emulated the decode latency of another machine."""
        pools = [self.setting("launch.pools"), self.setting("cluster.pools")]
        return bool(self.setting("actors.min_step_ms")) or "min_step_ms" in str(pools)

    @property
    def held_out(self) -> str:
        """The metric of its evaluations: accuracy if each of them has one, else the mean reward."""
        every = "eval/reward_mean"
        one = "eval/accuracy"
        return one if len(self.series(one)[0]) == len(self.series(every)[0]) else every

    @property
    def kinds(self) -> list[str]:
        """The kinds of held-out prompts, if their results were recorded separately."""
        names = {name for row in self.metrics for name in row if name.startswith("eval/")}
        return sorted({name.split("/")[1] for name in names if name.count("/") == 2})

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """The steps at which metric `key` was recorded, and its values."""
        rows = [row for row in self.metrics if is_number(row.get(key))]
        return [float(row["step"]) for row in rows], [float(row[key]) for row in rows]

    def seconds(self) -> list[float]:
        """Wall time of each row of `metrics` since the start of the run.

        If the recorded times count from the epoch, the first row is taken as the start.
        """
        times = [
            float(row["time_s"]) if is_number(row.get("time_s")) else 0.0 for row in self.metrics
        ]
        start = times[0] if times and times[0] > 1e8 else 0.0
        return [time - start for time in times]

    def trained_groups(self) -> list[Row]:
        return [group for group in self.groups if group["end"] == "shipped"]

    def ledger(self) -> dict[str, Counter[str]]:
        """For each prompt, how often its groups were opened, shipped, filled and dropped.

        A group is filled if a truncated response was selected.
        """
        counts: dict[str, Counter[str]] = {}
        for group in self.groups:
            if group["end"] == "evaluated":
                continue
            of_prompt = counts.setdefault(
                group["prompt_id"], Counter(opened=0, shipped=0, filled=0, dropped=0)
            )
            of_prompt["opened"] += 1
            of_prompt["shipped" if group["end"] == "shipped" else "dropped"] += 1
            of_prompt["filled"] += any(
                r["truncated"] and r["end"].startswith("selected") for r in group["rollouts"]
            )
        return counts

    def _read_config(self) -> None:
        file = self.path / "config.yaml"
        if not file.is_file():
            self.problems.append(f"config.yaml is missing: {FILES['config.yaml']}.")
            return
        try:
            config = OmegaConf.to_container(OmegaConf.load(file))
        except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
            self.problems.append(
                f"config.yaml cannot be read ({one_line(error)}): {FILES['config.yaml']}."
            )
            return
        self.config = (
            {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}
        )

    def _read_rows(self, name: str) -> list[Row]:
        file = self.path / name
        if not exists(file):
            self.problems.append(f"{name} is missing: {FILES[name]}.")
            return []
        rows: list[Row] = []
        skipped: list[int] = []
        for number, line in enumerate(read_lines(file), start=1):
            row = _parsed(line)
            if row is not None and row.keys() >= REQUIRED_KEYS[name] and is_number(row["step"]):
                rows.append(row)
            elif line.strip():
                skipped.append(number)
        if skipped:
            lines = (
                f"line {skipped[0]} cannot be read and was skipped"
                if len(skipped) == 1
                else f"{len(skipped)} lines cannot be read and were skipped (the first is line "
                f"{skipped[0]})"
            )
            self.problems.append(
                f"{name}: {lines}; the run may have been killed while it wrote them."
            )
        if first := begins_at(rows):
            self.problems.append(
                f"{name}: its records begin at step {first}; those of earlier steps were removed "
                f"(buffer.keep_row_bytes)."
            )
        if not rows:
            self.problems.append(f"{name} has no rows: {FILES[name]}.")
        return rows

    def _latest_per_step(self, rows: list[Row]) -> list[Row]:
        # A resumed run repeats the steps after its checkpoint. The later record describes the step
        # that led to the final weights.
        latest = {row["step"]: row for row in rows}
        if len(latest) < len(rows):
            self.problems.append(
                f"{len(rows) - len(latest)} steps are recorded twice, because the run was resumed; "
                "the later record counts."
            )
        return [latest[step] for step in sorted(latest)]


def is_number(value: Any) -> bool:
    """True for a finite int or float."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    )


def _parsed(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:  # malformed JSON or malformed UTF-8
        return None
    return row if isinstance(row, dict) else None
