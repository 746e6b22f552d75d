"""The buffer's rows in a run's directory: metrics, ledger, samples.

Owns their names, and the bound of their size. After a kill, all of them are cut back to the steps
that the event log records. The checkpoints beside them belong to the learner, and `report.html` to
`tools.report`.
"""

from __future__ import annotations

from pathlib import Path

from buffer.records.row_log import RowLog
from darts.events import GroupRecord
from darts.step_row import ledger_row


class RunFiles:
    """The rows of one run, open for appending. `folder` must exist."""

    def __init__(self, folder: Path) -> None:
        self.metrics = RowLog(folder / "metrics.jsonl")
        self.groups = RowLog(folder / "groups.jsonl")
        self.samples = RowLog(folder / "samples.jsonl")
        # A reader that sees the row of a step sees its groups and samples too.
        self._logs = (self.groups, self.samples, self.metrics)

    def group(self, record: GroupRecord, step: int) -> None:
        self.groups.append(ledger_row(record, step))

    def flush(self) -> None:
        for log in self._logs:
            log.flush()

    def sync(self) -> None:
        """Make everything so far durable. Call it before the log records that it is there."""
        for log in self._logs:
            log.sync()

    def rotate(self, segment_bytes: int, keep_bytes: int, needed_step: int) -> None:
        """Bound each file. A learner may still come back to `needed_step`."""
        for log in self._logs:
            log.rotate(segment_bytes, keep_bytes, max(0, needed_step - 1))

    def visits_from(self, step: int) -> list[int]:
        """Visits of the groups that ended in `step` or later."""
        return sorted({row["visit"] for row in self.groups.rows_from(step)})

    def first_rewind(self, step: int) -> int:
        """The first step to which a learner may come back, as the run is at `step`.

        All later rows are kept, and so is the row of metrics before them, which has the sums with
        which the run then continues.
        """
        groups, metrics = self.groups.first_step, self.metrics.first_step
        if groups is None:
            return step
        return max(groups, metrics + 1 if metrics else 0)

    def close(self) -> None:
        for log in self._logs:
            log.close()


def no_such_run(folder: Path) -> str:
    """An error text about a run that cannot be resumed, with the names of those that can."""
    runs = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
    known = ", ".join(runs) if runs else "none"
    return f"run.resume=true: there is no run {folder} (runs in {folder.parent}: {known})"
