"""A long run of small steps, and the growth of the buffer's memory, descriptors and files.

Samples all three while the run goes on, and compares the first tenth of the steps with the last.
Judges only growth; `tools.chaos` judges what a run under faults does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from buffer.records.row_segments import begins_at, read_rows
from buffer.wire.client import MonitorLink
from tools.faults.host import LoggedProcess
from tools.launching.supervision import Run

SAMPLE_S = 1.0


class Sample(NamedTuple):
    step: int
    resident_bytes: int
    num_descriptors: int
    file_bytes: int  # of all files of the run


class Tenths(NamedTuple):
    """Medians over the first and the last tenth of a run's steps."""

    first: Sample
    last: Sample


@dataclass
class Limits:
    """Largest growth from the first tenth to the last."""

    memory_bytes: int
    descriptors: int
    disk_bytes: int


@dataclass
class Soak:
    """Samples a run's buffer. Give `turn` to `Cluster.run`."""

    folder: Path
    link: MonitorLink
    samples: list[Sample] = field(default_factory=list)
    _step: int = 0
    _next_s: float = 0.0

    def turn(self, run: Run) -> str:
        state = self.link.receive(0)
        if state is not None:
            self._step = max(self._step, state.step)
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + SAMPLE_S
            process = run.members[0].process
            assert isinstance(process, LoggedProcess)
            self._sample(process.pid)
        return ""

    def _sample(self, pid: int) -> None:
        try:
            process = psutil.Process(pid)
            resident, num_descriptors = process.memory_info().rss, process.num_fds()
        except psutil.Error:
            return  # it has ended
        self.samples.append(Sample(self._step, resident, num_descriptors, _size(self.folder)))


def _size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a segment that was removed just now
            size += path.stat().st_size if path.is_file() else 0
    return size


def tenths(samples: list[Sample], num_steps: int) -> Tenths:
    """Raises `ValueError` if a tenth has no sample."""

    def part(belongs: Callable[[int], bool]) -> Sample:
        of_part = [sample for sample in samples if belongs(sample.step)]
        if not of_part:
            raise ValueError(
                f"steps={num_steps}: no sample falls into a tenth of the run; raise steps"
            )
        return Sample(*(round(median(column)) for column in zip(*of_part, strict=True)))

    return Tenths(
        part(lambda step: 0 < step <= num_steps / 10),
        part(lambda step: step >= num_steps * 9 / 10),
    )


def growth(found: Tenths, limits: Limits) -> list[str]:
    """One sentence for each quantity that grew by more than its limit."""
    first, last = found
    grown = [
        ("memory", last.resident_bytes - first.resident_bytes, limits.memory_bytes, "bytes"),
        (
            "descriptors",
            last.num_descriptors - first.num_descriptors,
            limits.descriptors,
            "descriptors",
        ),
        ("files", last.file_bytes - first.file_bytes, limits.disk_bytes, "bytes"),
    ]
    return [
        f"the buffer's {name} grew by {by:,} {unit}, above {most:,}"
        for name, by, most, unit in grown
        if by > most
    ]


def table(found: Tenths) -> str:
    first, last = found
    mib = 2**20
    return "\n".join(
        [
            f"{'':<22}{'first tenth':>14}{'last tenth':>14}",
            f"{'step':<22}{first.step:>14,}{last.step:>14,}",
            f"{'memory, MiB':<22}{first.resident_bytes / mib:>14,.1f}"
            f"{last.resident_bytes / mib:>14,.1f}",
            f"{'descriptors':<22}{first.num_descriptors:>14}{last.num_descriptors:>14}",
            f"{'files, MiB':<22}{first.file_bytes / mib:>14,.1f}{last.file_bytes / mib:>14,.1f}",
        ]
    )


def missing_steps(folder: Path, num_steps: int) -> list[str]:
    """A sentence for each file of rows that lacks a step after the first one that it still has.

    Such a file keeps its newest rows, so the oldest ones must be gone.
    """
    faults: list[str] = []
    for name in ("metrics.jsonl", "groups.jsonl", "samples.jsonl"):
        steps = [step for step, _ in groupby(row["step"] for row in read_rows(folder / name))]
        first = begins_at({"step": step} for step in steps)
        if steps != list(range(first, num_steps)):
            faults.append(f"{name} has not every step from {first:,} to {num_steps - 1:,} in order")
        if not first:
            faults.append(f"{name} still has its first row, so its bound was not tested")
    return faults
