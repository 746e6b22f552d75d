"""The buffer's files in a run's directory: metrics, ledger, samples.

One writer appends whole lines and flushes them at each step. After a kill, `repair` makes the files
whole again. The checkpoints beside them belong to the learner, and `report.html` to `tools.report`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from buffer.records.files import atomic_write, cut_torn_line
from darts.events import GroupRecord

Row = dict[str, Any]


class RunFiles:
    """Appends to the files of one run. `folder` must exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metrics = (folder / "metrics.jsonl").open("a")
        self._groups = (folder / "groups.jsonl").open("a")
        self._samples = (folder / "samples.jsonl").open("a")

    def group(self, record: GroupRecord) -> None:
        row = asdict(record)
        for rollout in row["rollouts"]:
            rollout["engine"] = rollout.pop("engine_id")
            del rollout["oldest_version"]
        _write(self._groups, row)

    def sample(self, row: Row) -> None:
        _write(self._samples, row)

    def metrics(self, row: Row) -> None:
        _write(self._metrics, row)
        self.flush()

    def groups_bytes(self) -> int:
        """Size of groups.jsonl, in bytes."""
        self.flush()
        return self._groups.tell()

    def flush(self) -> None:
        """A reader that sees the row of a step sees its groups and samples too."""
        for file in (self._groups, self._samples, self._metrics):
            file.flush()

    def close(self) -> None:
        for file in (self._metrics, self._groups, self._samples):
            file.close()


def repair(folder: Path, groups_bytes: int) -> list[Row]:
    """Make a killed run's files whole. Returns the rows of metrics.jsonl.

    groups.jsonl is cut back to `groups_bytes`, since a replay of the event log writes the rest. A
    row of metrics or a sample is kept if its line is whole.
    """
    cut_groups(folder, groups_bytes)
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut_torn_line(folder / name)
    return read_rows(folder)


def read_rows(folder: Path) -> list[Row]:
    """The rows of metrics.jsonl."""
    return _read(folder / "metrics.jsonl")


def cut_groups(folder: Path, num_bytes: int) -> None:
    """Cut groups.jsonl back to `num_bytes`, if it has more."""
    groups = folder / "groups.jsonl"
    if groups.exists() and groups.stat().st_size > num_bytes:
        os.truncate(groups, num_bytes)


def withdraw_rows(folder: Path, num_steps: int, num_sampled: int) -> list[Row]:
    """Cut metrics back to the first `num_steps` steps, and samples to the first `num_sampled`.

    Returns the rows of metrics.
    """
    kept: dict[str, list[Row]] = {}
    for name, most in (("metrics.jsonl", num_steps), ("samples.jsonl", num_sampled)):
        rows = _read(folder / name)
        kept[name] = [row for row in rows if row["step"] < most]
        if len(kept[name]) < len(rows):
            _rewrite(folder / name, kept[name])
    return kept["metrics.jsonl"]


def groups_after(folder: Path, num_steps: int, groups_per_step: int) -> tuple[int, list[int]]:
    """The size of the first `num_steps` steps in groups.jsonl, and the visits after them."""
    num_bytes = num_shipped = 0
    visits: set[int] = set()
    for line in _whole_lines(folder / "groups.jsonl"):
        row = json.loads(line)
        if num_shipped == num_steps * groups_per_step:
            visits.add(row["visit"])
        else:
            num_bytes += len(line.encode())
            num_shipped += row["end"] == "shipped"
    return num_bytes, sorted(visits)


def no_such_run(folder: Path) -> str:
    """An error text about a run that cannot be resumed, with the names of those that can."""
    runs = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
    known = ", ".join(runs) if runs else "none"
    return f"run.resume=true: there is no run {folder} (runs in {folder.parent}: {known})"


def _write(file: Any, row: Row) -> None:
    file.write(json.dumps(row) + "\n")


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def _rewrite(path: Path, rows: list[Row]) -> None:
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
