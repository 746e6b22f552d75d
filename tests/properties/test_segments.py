"""A log keeps its promises through any order of appends, syncs, rotations, drops, full disks,
kills and power cuts.
"""

from __future__ import annotations

import random
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from buffer.records.segment_files import read_segments
from buffer.records.segments import SegmentLog
from tests.disks import MemoryDisk, PowerCutError

FOLDER = Path("/run/events")
WINDOW_S = 0.05
PAYLOADS = st.binary(max_size=40) | st.just(b"\xd4\xa7" * 20)  # the second looks like frames


class LaterExecutor(Executor):
    """Runs submitted calls when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[None], object, tuple[object, ...]]] = []

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[override]
        future = _Eager(self)
        self.waiting.append((future, fn, args))
        return future

    def run(self) -> None:
        while self.waiting:
            future, fn, args = self.waiting.pop(0)
            try:
                future.set_result(fn(*args))
            except OSError as error:
                future.set_exception(error)


class _Eager(Future):
    """Waiting for its result runs it, as there is no other thread."""

    def __init__(self, executor: LaterExecutor) -> None:
        super().__init__()
        self._executor = executor

    def result(self, timeout=None):
        self._executor.run()
        return super().result(timeout)


class LogMachine(RuleBasedStateMachine):
    """`history[seq]` is the record with that number. A checkpoint holds the number of the record
    that follows it, as text.
    """

    @initialize(fsync_s=st.sampled_from([0, WINDOW_S]), threaded=st.booleans())
    def start(self, fsync_s: float, threaded: bool) -> None:
        self.disk, self.now, self.fsync_s = MemoryDisk(), 0.0, fsync_s
        self.executor = LaterExecutor() if threaded else None
        self.history: list[tuple[float, bytes]] = []
        self.promised = -1  # the newest record that was reported as durable
        self.at_fuse: random.Random | None = None
        self.open()

    def open(self) -> None:
        if self.executor:
            self.executor.waiting.clear()
        try:
            self.log, found = SegmentLog.open(
                FOLDER,
                first_checkpoint=b"0",
                fsync_s=self.fsync_s,
                clock=lambda: self.now,
                executor=self.executor,
                disk=self.disk,
            )
        except PowerCutError:
            self.stop()
            return
        first = int(found.checkpoint)
        assert [r.seq for r in found.records] == list(range(first, first + len(found.records)))
        num_records = first + len(found.records)
        assert self.promised < num_records <= len(self.history)
        assert [(r.time_s, r.payload) for r in found.records] == self.history[first:num_records]
        del self.history[num_records:]
        assert self.log.next_seq == num_records
        assert self.log.synced_seq == num_records - 1, "all that was found must be durable"

    @rule(payload=PAYLOADS)
    def append(self, payload: bytes) -> None:
        # First, because a power cut during the append may leave it complete.
        self.history.append((self.now, payload))
        try:
            seq = self.log.append(payload, self.now)
        except OSError:
            self.forget_lost()
        except PowerCutError:
            self.stop()
        else:
            assert seq == len(self.history) - 1
            if self.fsync_s == 0:
                assert self.log.synced_seq == seq

    @rule(payload=PAYLOADS)
    def add(self, payload: bytes) -> None:
        self.history.append((self.now, payload))
        seq = self.cut_or(lambda: self.log.add(self.now, payload))
        assert seq is None or seq == len(self.history) - 1
        if seq is not None:
            assert self.log.num_waiting == 0 if self.fsync_s == 0 else self.log.num_waiting > 0

    @rule()
    def write(self) -> None:
        if self.cut_or(self.log.write, default=True):
            assert self.log.num_waiting == 0

    @property
    def num_written(self) -> int:
        return self.log.next_seq - self.log.num_waiting

    def forget_lost(self) -> None:
        """A full disk: no record that waited is in the log."""
        assert self.log.num_waiting == 0
        del self.history[self.log.next_seq :]

    @rule(elapsed_s=st.sampled_from([0.0, WINDOW_S / 3, 2 * WINDOW_S]))
    def poll(self, elapsed_s: float) -> None:
        self.now += elapsed_s
        wait_s = self.log.next_poll_s()
        newest = self.log.next_seq - 1
        synced = self.cut_or(self.log.poll)
        if synced is not None and self.executor is None and wait_s == 0:
            assert synced == newest, "the window has passed"

    @rule()
    def run_executor(self) -> None:
        if self.executor:
            self.cut_or(self.executor.run)

    @rule()
    def sync(self) -> None:
        if self.cut_or(self.log.sync, default=True):
            assert self.log.synced_seq == self.log.next_seq - 1

    @rule()
    def rotate(self) -> None:
        number = self.log.number
        try:
            assert self.log.rotate(str(self.log.next_seq).encode(), self.now) == number + 1
        except OSError:
            assert self.log.number == number
            self.forget_lost()
        except PowerCutError:
            self.stop()

    @rule(back=st.integers(0, 2))
    def drop(self, back: int) -> None:
        number = self.log.number - back
        if self.cut_or(lambda: self.log.drop_before(number), default=True):
            assert min(self.log.sizes) >= min(number, self.log.number)

    @rule(max_bytes=st.integers(0, 500))
    def retain(self, max_bytes: int) -> None:
        if self.cut_or(lambda: self.log.retain(max_bytes), default=True):
            assert self.log.num_bytes <= max_bytes or len(self.log.sizes) == 1

    @rule(num_bytes=st.integers(0, 60))
    def fill_disk(self, num_bytes: int) -> None:
        self.disk.free_bytes = num_bytes

    @rule()
    def free_disk(self) -> None:
        self.disk.free_bytes = 1 << 40

    @rule(num_steps=st.integers(0, 12), kills=st.booleans(), seed=st.integers(0, 2**32))
    def light_fuse(self, num_steps: int, kills: bool, seed: int) -> None:
        """After `num_steps` operations, the process is killed or the power is cut."""
        self.disk.fuse, self.at_fuse = num_steps, None if kills else random.Random(seed)

    @rule(seed=st.integers(0, 2**32))
    def power_cut(self, seed: int) -> None:
        self.at_fuse = random.Random(seed)
        self.stop()

    def stop(self) -> None:
        rng = self.at_fuse
        self.disk = self.disk.after_kill() if rng is None else self.disk.after_power_cut(rng)
        self.open()

    @rule()
    def kill(self) -> None:
        self.disk = self.disk.after_kill()
        num_records = self.num_written
        self.open()
        assert len(self.history) == num_records, "what was written outlives the process"

    @precondition(lambda self: self.disk.free_bytes > 1000)
    @rule()
    def close_and_open(self) -> None:
        num_records = len(self.history)
        if self.cut_or(self.log.close, default=True):
            self.open()
            assert len(self.history) == num_records

    def cut_or(self, act, default=None):
        """The result of `act`, or None if a power cut or a full disk interrupted it."""
        try:
            result = act()
        except OSError:
            self.forget_lost()
            return None
        except PowerCutError:
            self.stop()
            return None
        self.promised = self.log.synced_seq
        return default if result is None else result

    @invariant()
    def promises_and_sizes_hold(self) -> None:
        assert self.log.next_seq == len(self.history)
        assert self.promised <= self.log.synced_seq
        self.promised = self.log.synced_seq
        assert self.log.sizes == {
            int(path.stem): len(inode.data)
            for path, inode in self.disk.files.items()
            if path.suffix == ".log"
        }

    @invariant()
    def all_kept_segments_read_as_one_history(self) -> None:
        segments = list(read_segments(FOLDER, self.disk))
        first = segments[0].checkpoint.seq
        records = [record for segment in segments for record in segment.records]
        assert [(r.time_s, r.payload) for r in records] == self.history[first : self.num_written]
        assert [int(s.checkpoint.payload) for s in segments] == [s.checkpoint.seq for s in segments]

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.disk.fuse = None
            self.power_cut(1)


TestLog = LogMachine.TestCase
TestLog.settings = settings(
    max_examples=200, stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


@given(
    segments=st.lists(st.lists(PAYLOADS, max_size=6), min_size=1, max_size=3),
    data=st.data(),
)
@settings(max_examples=300)
def test_a_flipped_bit_is_refused_or_changes_nothing(segments, data) -> None:
    disk = MemoryDisk()
    log, _ = SegmentLog.open(FOLDER, first_checkpoint=b"0", disk=disk)
    payloads: list[bytes] = []
    for number, some in enumerate(segments):
        if number:
            log.rotate(str(log.next_seq).encode(), 0.0)
        for payload in some:
            log.append(payload, 0.0)
            payloads.append(payload)
    log.close()
    path = data.draw(st.sampled_from(sorted(disk.files)))
    content = disk.files[path].data
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        _, found = SegmentLog.open(FOLDER, disk=disk)
        assert payloads[: int(found.checkpoint)] + [r.payload for r in found.records] == payloads
        read = [record.payload for s in read_segments(FOLDER, disk) for record in s.records]
        assert read == payloads
    except ValueError as error:
        assert path.name in str(error) and "byte" in str(error)
    else:
        assert path == max(disk.files), "only the newest segment's closing mark may be cut"


@given(num_records=st.integers(1, 6), data=st.data())
@settings(max_examples=200)
def test_a_file_cut_anywhere_keeps_its_beginning(num_records, data) -> None:
    disk = MemoryDisk()
    log, _ = SegmentLog.open(FOLDER, disk=disk)
    ends = [log.segment_bytes]
    for index in range(num_records):
        log.append(bytes([index]) * 5, 0.0)
        ends.append(log.segment_bytes)
    size = data.draw(st.integers(ends[0], ends[-1]))
    (inode,) = disk.files.values()
    del inode.data[size:]
    log, found = SegmentLog.open(FOLDER, disk=disk)
    whole = sum(end <= size for end in ends) - 1
    assert [r.payload for r in found.records] == [bytes([i]) * 5 for i in range(whole)]
    assert found.cut_bytes == size - ends[whole] and log.segment_bytes == ends[whole]
    assert log.append(b"next", 0.0) == whole


def test_a_missing_segment_is_refused_by_name() -> None:
    disk = MemoryDisk()
    log, _ = SegmentLog.open(FOLDER, disk=disk)
    for _ in range(2):
        log.append(b"x", 0.0)
        log.rotate(b"", 0.0)
    log.close()
    del disk.files[FOLDER / "000002.log"]
    with pytest.raises(ValueError, match="lacks 000002.log"):
        SegmentLog.open(FOLDER, disk=disk)


@given(num_steps=st.integers(0, 10), seed=st.integers(0, 2**16))
def test_a_kill_within_a_rotation_and_a_power_cut_after_the_restart(num_steps, seed) -> None:
    disk = MemoryDisk()
    log, _ = SegmentLog.open(FOLDER, first_checkpoint=b"0", disk=disk)
    log.append(b"first", 0.0)
    disk.fuse = num_steps
    try:
        log.rotate(b"1", 0.0)
    except PowerCutError:
        pass
    disk = disk.after_kill()
    log, _ = SegmentLog.open(FOLDER, disk=disk)
    log.append(b"second", 0.0)
    log.sync()
    disk = disk.after_power_cut(random.Random(seed))
    _, found = SegmentLog.open(FOLDER, disk=disk)
    kept = [b"first", b"second"][int(found.checkpoint) :]
    assert [record.payload for record in found.records] == kept
