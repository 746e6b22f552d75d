"""A segmented log on a real disk: a killed writer, a failing disk, and payloads that look like
records.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from buffer.records.files import Disk
from buffer.records.segment_files import RECORD, Segment, frame, newest_segment, read_segments
from buffer.records.segments import SegmentLog

ROOT = Path(__file__).parents[3]

WRITER = """
import sys
from pathlib import Path
from buffer.records.segments import SegmentLog

log, _ = SegmentLog.open(Path(sys.argv[1]))
for number in range(10**9):
    log.append(b"%d" % number, float(number))
    print(number, flush=True)
    if number % 100 == 99:
        log.rotate(b"%d" % (number + 1), float(number))
"""


class FailingDisk(Disk):
    """A real disk on which the operations in `fails` raise EIO."""

    def __init__(self) -> None:
        self.fails: set[str] = set()

    def sync(self, handle: int) -> None:
        self._check("sync")
        super().sync(handle)

    def sync_folder(self, folder: Path) -> None:
        self._check("sync_folder")
        super().sync_folder(folder)

    def write(self, handle: int, data: bytes | memoryview) -> int:
        if "write" in self.fails:
            super().write(handle, bytes(data)[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(handle, data)

    def truncate(self, handle: int, size: int) -> None:
        self._check("truncate")
        super().truncate(handle, size)

    def _check(self, operation: str) -> None:
        if operation in self.fails:
            raise OSError(errno.EIO, "Input/output error")


def payloads(folder: Path) -> list[bytes]:
    return [record.payload for segment in read_segments(folder) for record in segment.records]


def test_a_killed_writer_loses_no_written_record(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "log")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(250):
            newest = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        newest = max([newest, *(int(line) for line in writer.stdout.read().split())])
    log, found = SegmentLog.open(tmp_path / "log")
    first = int(found.checkpoint)
    assert [int(r.payload) for r in found.records] == list(range(first, log.next_seq))
    assert log.next_seq in (newest + 1, newest + 2)  # it may have died before it could print
    assert [int(p) for p in payloads(tmp_path / "log")] == list(range(log.next_seq))
    assert sorted(os.listdir(tmp_path / "log")) == [f"{number:06d}.log" for number in log.sizes]


def test_a_full_disk_leaves_only_complete_records(tmp_path: Path) -> None:
    disk = FailingDisk()
    log, _ = SegmentLog.open(tmp_path, disk=disk)
    log.append(b"first", 0.0)
    disk.fails = {"write"}
    with pytest.raises(OSError, match="No space left"):
        log.append(b"lost", 0.0)
    with pytest.raises(OSError, match="No space left"):
        log.rotate(b"lost", 0.0)
    disk.fails = set()
    assert log.append(b"second", 0.0) == 1
    assert payloads(tmp_path) == [b"first", b"second"]
    assert os.listdir(tmp_path) == ["000001.log"]


@pytest.mark.parametrize("operations", [{"sync"}, {"write", "truncate"}])
def test_a_log_refuses_records_after_a_disk_failure_and_can_be_reopened(
    tmp_path: Path, operations: set[str]
) -> None:
    disk = FailingDisk()
    log, _ = SegmentLog.open(tmp_path, fsync_s=0, disk=disk)
    log.append(b"first", 0.0)
    disk.fails = operations
    with pytest.raises(OSError):
        log.append(b"second", 0.0)
    disk.fails = set()
    with pytest.raises(OSError, match="accepts no more records"):
        log.append(b"third", 0.0)
    assert log.synced_seq == 0
    log.close()
    log, found = SegmentLog.open(tmp_path)
    assert [r.payload for r in found.records][:1] == [b"first"]
    assert log.append(b"next", 0.0) == len(found.records)


def test_nothing_is_written_after_a_segment_that_a_restart_would_skip(tmp_path: Path) -> None:
    disk = FailingDisk()
    log, _ = SegmentLog.open(tmp_path, disk=disk)
    disk.fails = {"sync_folder"}  # the new segment exists, but might not after a power cut
    with pytest.raises(OSError, match="Input/output error"):
        log.rotate(b"new", 0.0)
    disk.fails = set()
    with pytest.raises(OSError, match="accepts no more records"):
        log.append(b"lost at a restart", 0.0)


def test_a_failed_sync_in_another_thread_promises_nothing(tmp_path: Path) -> None:
    disk = FailingDisk()
    with ThreadPoolExecutor(1) as executor:
        log, _ = SegmentLog.open(tmp_path, fsync_s=0.001, executor=executor, disk=disk)
        log.append(b"first", 0.0)
        disk.fails = {"sync"}
        with pytest.raises(OSError, match="Input/output error"):
            while True:
                log.poll()
        assert log.synced_seq == -1


def test_a_record_appended_during_a_sync_waits_for_the_next_sync(
    tmp_path: Path,
) -> None:
    now = [0.0]
    with ThreadPoolExecutor(1) as executor:
        log, _ = SegmentLog.open(tmp_path, fsync_s=1.0, clock=lambda: now[0], executor=executor)
        log.append(b"first", 0.0)
        assert log.next_poll_s() == 1.0
        now[0] = 1.0
        log.poll()
        log.append(b"second", 1.0)
        executor.submit(lambda: None).result()  # the sync has ended
        assert log.poll() == 0
        assert log.next_poll_s() == 1.0
        log.sync()
        assert log.synced_seq == 1 and log.next_poll_s() is None


def test_a_payload_is_never_mistaken_for_a_record(tmp_path: Path) -> None:
    forged = frame(7, RECORD, 100, 0, 0.0, b"all before me was durable")
    for number, key in enumerate([7, _key(tmp_path / "another")]):
        folder = tmp_path / str(number)
        log, _ = SegmentLog.open(folder)
        log.append(frame(key, RECORD, 100, 0, 0.0, b"forged") + forged, 0.0)
        (file,) = folder.iterdir()
        content = bytearray(file.read_bytes())
        content[-1] ^= 1  # torn
        file.write_bytes(content)
        _, found = SegmentLog.open(folder)
        assert found.records == [] and found.cut_bytes > 0


def test_damage_is_reported_with_file_and_offset(tmp_path: Path) -> None:
    log, _ = SegmentLog.open(tmp_path, fsync_s=0)
    offset = log.segment_bytes
    for index in range(3):
        log.append(b"record %d" % index, 0.0)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[offset + 35] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is damaged at byte {offset}: "):
        SegmentLog.open(tmp_path)
    assert file.read_bytes() == content


def test_a_segment_that_ends_within_its_checkpoint_is_skipped(tmp_path: Path) -> None:
    log, _ = SegmentLog.open(tmp_path, first_checkpoint=b"old")
    log.append(b"kept", 0.0)
    log.rotate(b"a new checkpoint", 0.0)
    log.close()
    newest = tmp_path / "000002.log"
    newest.write_bytes(newest.read_bytes()[:60])
    log, found = SegmentLog.open(tmp_path)
    assert found.checkpoint == b"old" and [r.payload for r in found.records] == [b"kept"]
    assert os.listdir(tmp_path) == ["000001.log"]
    assert log.append(b"next", 0.0) == 1


def test_a_file_of_another_kind_or_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "000001.log").write_bytes(b"something else, and long enough to be a segment. " * 3)
    with pytest.raises(ValueError, match="not of this version"):
        SegmentLog.open(tmp_path)
    SegmentLog.open(tmp_path / "other")
    (tmp_path / "000001.log").unlink()
    (tmp_path / "other" / "000001.log").rename(tmp_path / "000002.log")
    with pytest.raises(ValueError, match="not written as segment 2"):
        SegmentLog.open(tmp_path)


def _key(folder: Path) -> int:
    SegmentLog.open(folder)
    segment = newest_segment(folder)
    assert isinstance(segment, Segment)
    return segment.key
