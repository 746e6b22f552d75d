"""Follows the rows of a run while it writes them, across segments and across steps taken back.

Never writes, and never counts rows: each has its step. Driven by `tools.track`.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from io import BytesIO
from operator import itemgetter
from pathlib import Path

from buffer.records.row_segments import Row, begins_at, open_segments
from tools.reporting.run_directory import is_number
from tools.reporting.trackers import Step

MOST_STEPS_BACK = 1000  # after more, only steps that are gone at the next call are read again


class NewRows:
    """Reads the rows that a file and its older segments have gained since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0  # of the end of the last line that was read
        self._last = b""
        self.restart()

    def restart(self) -> None:
        """Let the next call read from the oldest row on."""
        self._inode = 0  # of the segment that holds the last line

    def read(self) -> tuple[bool, Iterator[Row]]:
        """Whether the rows begin with the oldest one that is kept, and the rows.

        They do in the first call, and after the run has taken steps back or has removed the segment
        that was read last.
        """
        parts = self._new() if self._inode else None
        again = parts is None
        if parts is None:
            self.restart()
            parts = self._new() or []
        return again, (json.loads(line) for part in parts for line in BytesIO(part))

    def _new(self) -> list[bytes] | None:
        """The whole lines after the last one, or None if that is no longer where it was."""
        parts: list[bytes] = []
        place = None if self._inode else 0  # in the next segment; None: before the last line
        for file in open_segments(self._path):
            inode = os.fstat(file.fileno()).st_ino
            if place is None and inode == self._inode:
                file.seek(self._offset - len(self._last))
                if file.read(len(self._last)) != self._last:
                    return None
                place = self._offset
            if place is None:
                continue  # it was read before
            file.seek(place)
            lines, end, _ = file.read().rpartition(b"\n")
            if end:
                parts.append(lines + end)
                self._inode, self._offset = inode, place + len(parts[-1])
                self._last = lines[lines.rfind(b"\n") + 1 :] + end
            place = 0
        return None if place is None and self._inode else parts


class NewSteps:
    """Reads the steps that a run has recorded since the last call."""

    def __init__(self, folder: Path, first: int) -> None:
        """`first` is the first step to be read, unless the run has taken it back."""
        self.next_step = first
        self.first_step = 0  # whose row was there when the rows were last read from the oldest on
        self.num_removed = 0  # steps that the last call should have read, and the run has removed
        self._known: dict[int, Row] = {}  # the newest rows of metrics
        self._rows = NewRows(folder / "metrics.jsonl")
        self._groups = NewRows(folder / "groups.jsonl")
        self._samples = NewRows(folder / "samples.jsonl")
        self._lengths: defaultdict[int, list[int]] = defaultdict(list)
        self._responses: defaultdict[int, list[Row]] = defaultdict(list)

    def read(self) -> list[Step]:
        again, new = self._rows.read()
        rows = list(new)
        self.num_removed = 0
        if again:
            self._groups.restart()
            self._samples.restart()
            changed = (row["step"] for row in rows if self._known.get(row["step"], row) != row)
            end = rows[-1]["step"] + 1 if rows else 0
            self.next_step = min(self.next_step, next(changed, end), end)
            self.first_step = begins_at(rows)
            self.num_removed = max(0, self.first_step - self.next_step)
        self._known |= {row["step"]: row for row in rows[-MOST_STEPS_BACK:]}
        for old in list(self._known)[:-MOST_STEPS_BACK]:
            del self._known[old]
        self._read_groups()
        self._read_samples()
        return [self._step(row) for row in rows if row["step"] >= self.next_step]

    def _read_groups(self) -> None:
        again, groups = self._groups.read()
        if again:
            self._lengths.clear()
        for group in groups:
            if group["end"] == "shipped":
                of_step = self._lengths[group["step"]]
                of_step += [rollout["tokens"] for rollout in group["rollouts"]]

    def _read_samples(self) -> None:
        again, samples = self._samples.read()
        if again:
            self._responses.clear()
        for sample in samples:
            self._responses[sample["step"]].append(sample)

    def _step(self, row: Row) -> Step:
        number = row["step"]
        values = {name: float(row[name]) for name in row if "/" in name and is_number(row[name])}
        step = Step(number, values, self._lengths[number], extremes(self._responses[number]))
        for kept in (self._lengths, self._responses):
            for old in [one for one in kept if one <= number]:
                del kept[old]
        return step


def extremes(samples: Sequence[Row]) -> list[Row]:
    """The shortest and the longest selected response to each prompt, and the longest cancelled."""
    by_prompt: defaultdict[str, list[Row]] = defaultdict(list)
    for sample in sorted(samples, key=itemgetter("tokens")):
        by_prompt[sample["prompt_id"]].append(sample)
    shown: list[Row] = []
    for group in by_prompt.values():
        selected = [row for row in group if row.get("end") != "cancelled"]
        cancelled = [row for row in group if row.get("end") == "cancelled"]
        shown += [selected[0], selected[-1]] if len(selected) > 1 else selected
        shown += cancelled[-1:]
    return shown
