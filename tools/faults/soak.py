"""A long run of small steps, and the growth of the buffer's memory, descriptors and files.

Samples all three while the run goes on, and compares the first tenth of the steps with the last.
Judges only growth; `tools.chaos` judges what a run under faults does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from buffer.wire.client import MonitorLink
from tools.faults.cluster import LoggedProcess
from tools.launching.supervision import Run

SAMPLE_S = 1.0
# The run's lasting records have lines for each step, so their growth is a rate, which is printed.
PER_STEP = ("metrics.jsonl", "groups.jsonl", "samples.jsonl")


class Sample(NamedTuple):
    step: int
    resident_bytes: int
    num_descriptors: int
    row_bytes: int  # of the files in `PER_STEP`
    other_bytes: int  # of all other files of the run


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
        sizes = dict(_sizes(self.folder))
        rows = sum(size for path, size in sizes.items() if path.name in PER_STEP)
        other = sum(sizes.values()) - rows
        self.samples.append(Sample(self._step, resident, num_descriptors, rows, other))


def _sizes(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                yield path, path.stat().st_size
        except FileNotFoundError:
            continue  # a segment that was removed just now


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
        ("files", last.other_bytes - first.other_bytes, limits.disk_bytes, "bytes"),
    ]
    return [
        f"the buffer's {name} grew by {by:,} {unit}, above {most:,}"
        for name, by, most, unit in grown
        if by > most
    ]


def table(found: Tenths) -> str:
    first, last = found
    per_step = (last.row_bytes - first.row_bytes) / max(1, last.step - first.step)
    mib = 2**20
    return "\n".join(
        [
            f"{'':<22}{'first tenth':>14}{'last tenth':>14}",
            f"{'step':<22}{first.step:>14,}{last.step:>14,}",
            f"{'memory, MiB':<22}{first.resident_bytes / mib:>14,.1f}"
            f"{last.resident_bytes / mib:>14,.1f}",
            f"{'descriptors':<22}{first.num_descriptors:>14}{last.num_descriptors:>14}",
            f"{'files, MiB':<22}{first.other_bytes / mib:>14,.1f}{last.other_bytes / mib:>14,.1f}",
            f"{', '.join(PER_STEP)} grow by {per_step:,.0f} bytes per step, without a bound",
        ]
    )


def missing_steps(folder: Path, num_steps: int) -> list[str]:
    """A sentence if metrics.jsonl does not hold every step once, in order."""
    with (folder / "metrics.jsonl").open() as file:
        steps = [json.loads(line)["step"] for line in file]
    if steps == list(range(num_steps)):
        return []
    return [f"metrics.jsonl has {len(steps):,} rows, not steps 0 to {num_steps - 1:,} in order"]
