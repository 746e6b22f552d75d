"""An append-only log of records in numbered files, which a crash at any moment leaves readable.

A segment, `000001.log`, is a preamble, a checkpoint record that its owner supplies, and the records
after it. A restart needs only the newest segment. Older ones are history, which the owner may drop.
`segment_files` defines the format and reads it. Never looks into a payload. One process appends,
which holds the `RunLock`.

Guarantees: a record that was written outlives the process. It is durable once `synced_seq` reaches
its number, and every later `open` then finds it. Records that were not durable may be lost, the
newest first and never one between others. Numbers ascend by one, and no surviving number is given
out twice. If a write fails, the log is as it was before, without the records that waited for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

from buffer.records.files import DISK, Disk, atomic_write, write_all
from buffer.records.segment_files import (
    CHECKPOINT,
    CLOSED,
    FRAME_BYTES,
    RECORD,
    Record,
    Segment,
    frame,
    frame_key,
    newest_segment,
    preamble,
    remove_unfinished,
    segment_path,
    segment_sizes,
)

_POLL_S = 0.001  # while another thread syncs


@dataclass(frozen=True)
class Recovered:
    """The result of `open`: the newest checkpoint, and the records after it in order."""

    checkpoint: bytes
    records: list[Record]
    cut_bytes: int  # size of a torn end, which was cut off


class SegmentLog:
    """A log that is open for appending. It must be used by one thread only."""

    def __init__(
        self,
        folder: Path,
        *,
        fsync_s: float,
        clock: Callable[[], float],
        executor: Executor | None,
        disk: Disk,
    ) -> None:
        self.folder = folder
        self.fsync_s = fsync_s
        self.sizes: dict[int, int] = {}  # bytes by segment number, ascending
        self.number = 0  # number of the newest segment, to which records are appended
        self.next_seq = 0
        self._waiting: list[bytes] = []  # parts of records that are not yet in the file
        self.waiting_bytes = 0
        self.num_waiting = 0  # records
        self.synced_seq = -1  # all records up to this one are durable
        self._clock, self._executor, self._disk = clock, executor, disk
        self._handle = -1
        self._key = 0
        self._sync_at: float | None = None  # when the window of the oldest unsynced record ends
        # The sync under way, and the last record that it makes durable.
        self._syncing: tuple[Future[None], int] | None = None
        self._closed_at = -1  # `next_seq` when it was last closed
        self._broken: OSError | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        first_checkpoint: bytes = b"",
        fsync_s: float = 0.05,
        clock: Callable[[], float] = time.monotonic,
        executor: Executor | None = None,
        disk: Disk = DISK,
    ) -> tuple[SegmentLog, Recovered]:
        """Open the log in `folder`, or start one there with `first_checkpoint`.

        `fsync_s` is the window of group commit: `poll` syncs once the oldest record that is not
        durable has waited that long, and 0 syncs in each `append`. With `executor` (one thread is
        enough), `poll` syncs there and does not block. Raises `ValueError`, which names the file
        and the offset, if the log is damaged.
        """
        log = cls(folder, fsync_s=fsync_s, clock=clock, executor=executor, disk=disk)
        disk.make_folder(folder)
        remove_unfinished(folder, disk)
        newest = newest_segment(folder, disk)
        if newest is None:
            log._start_segment(1, first_checkpoint, 0.0)
            return log, Recovered(checkpoint=first_checkpoint, records=[], cut_bytes=0)
        log._continue(newest)
        return log, Recovered(
            checkpoint=newest.checkpoint.payload,
            records=newest.records,
            cut_bytes=newest.size - newest.end,
        )

    @property
    def num_bytes(self) -> int:
        """Size of all segments, including the records that wait to be written."""
        return sum(self.sizes.values()) + self.waiting_bytes

    @property
    def segment_bytes(self) -> int:
        """Size of the newest segment, including the records that wait to be written."""
        return self.sizes[self.number] + self.waiting_bytes

    def append(self, payload: bytes, time_s: float) -> int:
        """Write a record and return its number.

        The record survives a kill at once, and a power cut once it is synced. Raises `OSError` if
        it could not be written; the log is then as it was before.
        """
        seq = self.add(time_s, payload)
        self.write()
        return seq

    def add(self, time_s: float, *payload: bytes) -> int:
        """Take a record, which the next `write` or sync puts into the file. Returns its number.

        Its payload may come in parts. With a window of 0 it is durable at once.
        """
        self._check_usable()
        seq = self.next_seq
        head = frame(self._key, RECORD, seq, seq - 1 - self.synced_seq, time_s, *payload)
        self._waiting += (head, *payload)
        self.waiting_bytes += FRAME_BYTES + sum(map(len, payload))
        self.num_waiting += 1
        self.next_seq += 1
        if self._sync_at is None:
            self._sync_at = self._clock() + self.fsync_s
        if self.fsync_s == 0:
            self.sync()
        return seq

    def write(self) -> None:
        """Put all records into the file, so that they survive a kill.

        Raises `OSError` if they could not be written; none of them is in the log then.
        """
        if not self.num_waiting:
            return
        waiting, self._waiting, self.waiting_bytes = self._waiting, [], 0
        num_records, self.num_waiting = self.num_waiting, 0
        try:
            self._write(b"".join(waiting))
        except OSError:
            self.next_seq -= num_records
            raise

    def poll(self) -> int:
        """Sync if the window has passed. Returns `synced_seq`.

        Messages that wait for records up to that number may now be sent.
        """
        if self._syncing is not None and self._syncing[0].done():
            self._end_sync()
        if self._syncing is None and self._sync_at is not None and self._clock() >= self._sync_at:
            self._begin_sync(self._executor)
        return self.synced_seq

    def next_poll_s(self) -> float | None:
        """Seconds until `poll` has something to do; None if all is durable."""
        if self._syncing is not None:
            return _POLL_S
        return None if self._sync_at is None else max(0.0, self._sync_at - self._clock())

    def sync(self) -> None:
        """Make every record durable before returning."""
        if self._syncing is not None:
            self._end_sync()
        if self._sync_at is not None:
            self._begin_sync(None)

    def rotate(self, checkpoint: bytes, time_s: float) -> int:
        """Start the next segment, from which a restart will begin, and return its number.

        `checkpoint` must hold the owner's state after the last record. If it cannot be written, the
        log continues in the present segment.
        """
        self.sync()
        self._start_segment(self.number + 1, checkpoint, time_s)
        return self.number

    def drop_before(self, number: int) -> None:
        """Remove the segments below `number`. The newest always stays."""
        for old in [old for old in self.sizes if old < min(number, self.number)]:
            self._disk.remove(segment_path(self.folder, old))
            self._disk.sync_folder(self.folder)  # one at a time, so that a power cut leaves no gap
            del self.sizes[old]

    def retain(self, max_bytes: int) -> None:
        """Remove the oldest segments until the log has at most `max_bytes`. The newest stays."""
        excess, number = self.num_bytes - max_bytes, min(self.sizes)
        while excess > 0 and number < self.number:
            excess -= self.sizes[number]
            number += 1
        self.drop_before(number)

    def close(self) -> None:
        """Make everything durable, and mark the end, so that later damage is noticed.

        May be called twice.
        """
        if self._handle < 0:
            return
        try:
            if self._broken is None:
                self.sync()
                if self._closed_at != self.next_seq:
                    unsynced = self.next_seq - 1 - self.synced_seq
                    self._write(frame(self._key, CLOSED, self.next_seq, unsynced, 0.0))
                    self._disk.sync(self._handle)
        finally:
            self._disk.close(self._handle)
            self._handle = -1

    def _continue(self, newest: Segment) -> None:
        self.sizes = segment_sizes(self.folder, self._disk) | {newest.number: newest.end}
        for number in [number for number in self.sizes if number > newest.number]:
            self._disk.remove(segment_path(self.folder, number))  # its checkpoint is incomplete
            del self.sizes[number]
        self.number, self.next_seq = newest.number, newest.next_seq
        self._handle = self._disk.open(segment_path(self.folder, newest.number))
        self._key = newest.key
        self._closed_at = newest.next_seq if newest.closed else -1
        if newest.end < newest.size:
            self._disk.truncate(self._handle, newest.end)
        self._disk.sync(self._handle)
        self._disk.sync_folder(self.folder)
        self.synced_seq = self.next_seq - 1

    def _start_segment(self, number: int, checkpoint: bytes, time_s: float) -> None:
        self._check_usable()
        path, start = segment_path(self.folder, number), preamble(number)
        key = frame_key(start)
        data = start + frame(key, CHECKPOINT, self.next_seq, 0, time_s, checkpoint) + checkpoint
        try:
            atomic_write(path, data, disk=self._disk)
            handle = self._disk.open(path)
        except OSError as error:
            if path.name in self._disk.names(self.folder):
                self._broken = error  # a restart would begin there, so nothing may follow here
            raise
        if self._handle >= 0:
            self._disk.close(self._handle)
        self._handle, self._key, self.number = handle, key, number
        self.sizes[number] = len(data)

    def _write(self, data: bytes) -> None:
        self._check_usable()
        try:
            write_all(self._disk, self._handle, data)
        except OSError as error:
            try:
                self._disk.truncate(self._handle, self.sizes[self.number])
            except OSError:
                self._broken = error  # later records would follow a partial one
            raise
        self.sizes[self.number] += len(data)

    def _begin_sync(self, executor: Executor | None) -> None:
        self._check_usable()
        self.write()
        self._sync_at = None
        future: Future[None]
        if executor is None:
            future = Future()
            try:
                future.set_result(self._disk.sync(self._handle))
            except OSError as error:
                future.set_exception(error)
        else:
            future = executor.submit(self._disk.sync, self._handle)
        self._syncing = (future, self.next_seq - 1)
        if executor is None:
            self._end_sync()

    def _end_sync(self) -> None:
        assert self._syncing is not None
        future, seq = self._syncing
        self._syncing = None
        try:
            future.result()
        except OSError as error:
            self._broken = error  # the kernel may have dropped pages that it could not write
            raise
        self.synced_seq = seq

    def _check_usable(self) -> None:
        assert self._handle >= 0 or self.number == 0, f"log {self.folder} is closed"
        if self._broken is not None:
            raise OSError(
                self._broken.errno,
                f"log {self.folder} accepts no more records since a write failed "
                f"({self._broken.strerror}); "
                f"a restart continues from the last whole record",
            )
