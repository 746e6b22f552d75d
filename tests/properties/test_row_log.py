"""Rows keep their order, and their newest part, through any order of appends, cuts, rotations, full
disks, kills and power cuts. A run that repeats the steps after its checkpoint has the same rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from buffer.records.row_log import RowLog
from buffer.records.row_segments import Row, older_segments, segment_path
from tests.disks import MemoryDisk, PowerCutError

PATH = Path("/run/groups.jsonl")


def on_disk(disk: MemoryDisk) -> list[Row]:
    """All rows that the files hold, oldest first; the newest file may end in a torn line."""
    segments = [segment_path(PATH, step) for step in older_segments(PATH, disk)]
    data = b"".join(disk.read(path) for path in [*segments, PATH] if path in disk.files)
    return [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


class RowMachine(RuleBasedStateMachine):
    """`rows` is all that was appended, and not cut or removed since."""

    @initialize()
    def start(self) -> None:
        self.disk = MemoryDisk()
        self.rows: list[Row] = []
        self.step = self.checkpoint = self.next_id = self.needed = 0
        self.at_fuse: random.Random | None = None
        self.open()

    def open(self) -> None:
        """Start again from the checkpoint, as a buffer does."""
        try:
            self.log = RowLog(PATH, self.disk)
            self.log.cut(self.checkpoint)
        except PowerCutError:
            return self.stop()
        kept = on_disk(self.disk)
        first = kept[0]["id"] if kept else self.next_id + 1  # a rotation under way may have removed
        before = [row for row in self.rows if row["step"] < self.checkpoint]
        self.rows = [row for row in before if row["id"] >= first]
        assert all(row["step"] < self.needed for row in before if row["id"] < first)
        self.step = self.checkpoint
        self.check()

    def check(self) -> None:
        assert on_disk(self.disk) == self.rows
        assert self.log.first_step == (self.rows[0]["step"] if self.rows else None)

    def act(self, action: Callable[[], None]) -> bool:
        """Whether the process lived through `action`."""
        try:
            action()
        except OSError:
            self.disk.free_bytes = 1 << 40
            self.kill()  # the buffer ends if its disk is full
            return False
        except PowerCutError:
            self.stop()
            return False
        return True

    @rule(num_rows=st.integers(1, 3))
    def end_step(self, num_rows: int) -> None:
        for _ in range(num_rows):
            self.next_id += 1
            row = {"step": self.step, "id": self.next_id}
            self.log.append(row)
            self.rows.append(row)
        if self.act(self.log.flush):
            self.step += 1
            self.check()

    @rule(segment_bytes=st.integers(1, 200), keep_bytes=st.integers(0, 300), back=st.integers(0, 6))
    def rotate(self, segment_bytes: int, keep_bytes: int, back: int) -> None:
        """The bound holds, unless the oldest segment has rows that are needed."""
        self.needed = needed = min(self.checkpoint, self.step - back)
        if self.act(lambda: self.log.rotate(segment_bytes, keep_bytes, needed)):
            kept = on_disk(self.disk)
            removed = self.rows[: len(self.rows) - len(kept)]
            assert all(row["step"] < needed for row in removed)
            self.rows = self.rows[len(removed) :]
            self.check()
            starts = sorted(older_segments(PATH, self.disk))
            if starts and self.disk.files[PATH].data:
                starts.append(json.loads(self.disk.files[PATH].data.splitlines()[0])["step"])
            assert self.log.num_bytes <= keep_bytes or len(starts) < 2 or starts[1] > needed

    @rule()
    def make_checkpoint(self) -> None:
        if self.act(self.log.sync):
            self.checkpoint = self.step

    @rule(back=st.integers(1, 4))
    def rewind(self, back: int) -> None:
        """Steps are taken back, and noted before it so that a restart takes them back again."""
        step = max(0, self.step - back)
        self.checkpoint = min(self.checkpoint, step)
        if self.act(lambda: self.log.cut(step)):
            self.rows = [row for row in self.rows if row["step"] < step]
            self.step = step
            self.check()

    @rule(num_bytes=st.integers(0, 60))
    def fill_disk(self, num_bytes: int) -> None:
        self.disk.free_bytes = num_bytes

    @rule(num_ops=st.integers(0, 8), kills=st.booleans(), seed=st.integers(0, 2**32))
    def light_fuse(self, num_ops: int, kills: bool, seed: int) -> None:
        """After `num_ops` operations, the process is killed or the power is cut."""
        self.disk.fuse, self.at_fuse = num_ops, None if kills else random.Random(seed)

    def stop(self) -> None:
        rng = self.at_fuse
        self.disk = self.disk.after_kill() if rng is None else self.disk.after_power_cut(rng)
        self.open()

    @rule()
    def kill(self) -> None:
        self.disk = self.disk.after_kill()
        self.open()

    @rule(seed=st.integers(0, 2**32))
    def power_cut(self, seed: int) -> None:
        self.at_fuse = random.Random(seed)
        self.stop()

    @rule(back=st.integers(0, 5))
    def read_back(self, back: int) -> None:
        found: list[Row] = []
        step = max(0, self.step - back)
        if self.act(lambda: found.extend(self.log.rows_from(step))):
            assert found == [row for row in self.rows if row["step"] >= step]
            assert self.log.last_row() == (self.rows[-1] if self.rows else {})

    @invariant()
    def the_size_is_counted(self) -> None:
        files = [path for path in self.disk.files if path.suffix == ".jsonl"]
        assert self.log.num_bytes == sum(len(self.disk.files[path].data) for path in files)


TestRows = RowMachine.TestCase
TestRows.settings = settings(
    max_examples=100, stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
