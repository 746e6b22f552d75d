"""A run's directory as the buffer writes it: config, metrics, ledger, samples, TensorBoard.

One writer, whole lines, flushed per step, so a kill leaves at most one half-written line, which `resume` removes. The
checkpoints beside it belong to the learner, `report.html` to `tools.report`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.extras import import_extra
from darts.events import GroupRecord

Row = dict[str, Any]
Tracker = Callable[[str], Any]  # opens a writer in a folder


class RunFiles:
    """Appends to the files of one run. `folder` must exist; `trackers` come from `load_trackers`."""

    def __init__(self, folder: Path, trackers: Sequence[Tracker] = ()) -> None:
        self.folder = folder
        self._metrics = (folder / "metrics.jsonl").open("a")
        self._groups = (folder / "groups.jsonl").open("a")
        self._samples = (folder / "samples.jsonl").open("a")
        self._trackers = [open_tracker(str(folder / "tb")) for open_tracker in trackers]

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
        for name, value in row.items():
            if "/" in name:
                for tracker in self._trackers:
                    tracker.add_scalar(name, value, row["step"])
        self.flush()

    def flush(self) -> None:
        for file in (self._metrics, self._groups, self._samples):
            file.flush()

    def close(self) -> None:
        for file in (self._metrics, self._groups, self._samples):
            file.close()
        for tracker in self._trackers:
            tracker.close()


def load_trackers(names: Sequence[str]) -> list[Tracker]:
    """The constructors of the trackers in `run.trackers`. Raises ValueError if a package is missing."""
    needed_by = "run.trackers=[tensorboard] ([] does without it)"
    return [import_extra("tensorboard.summary", needed_by, "trackers").Writer for _ in names]


def start(folder: Path, config_yaml: str) -> None:
    """Makes a fresh run's directory. ValueError if a run is there already."""
    if (folder / "config.yaml").exists():
        raise ValueError(
            f"run directory {folder} holds a run already: set run.resume=true to continue it, or choose another run.name"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config_yaml)


def resume(folder: Path, num_steps: int, groups_per_step: int) -> Row:
    """Cuts the records of a killed run back to its first `num_steps` steps. Returns the last metrics row kept, or {}."""
    rows = [row for row in _read(folder / "metrics.jsonl") if row["step"] < num_steps]
    _rewrite(folder / "metrics.jsonl", rows)
    kept, num_shipped = [], 0
    for row in _read(folder / "groups.jsonl"):
        if num_shipped == num_steps * groups_per_step:
            break
        num_shipped += row["end"] == "shipped"
        kept.append(row)
    _rewrite(folder / "groups.jsonl", kept)
    _rewrite(
        folder / "samples.jsonl",
        [row for row in _read(folder / "samples.jsonl") if row["step"] < num_steps],
    )
    return rows[-1] if rows else {}


def checkpoint_step(folder: Path) -> tuple[int, int]:
    """Steps done and policy version of the newest complete checkpoint; (0, -1) where there is none."""
    latest = folder / "checkpoints" / "latest"
    if not latest.exists():
        return 0, -1
    meta = json.loads((latest.parent / latest.read_text().strip() / "meta.json").read_text())
    return int(meta["step"]), int(meta["policy_version"])


def _write(file: Any, row: Row) -> None:
    file.write(json.dumps(row) + "\n")


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _rewrite(path: Path, rows: list[Row]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)
