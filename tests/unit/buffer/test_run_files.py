"""The files of a run after a power cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from buffer.records.journal import Journal
from buffer.records.run_files import RunFiles

ROW = '{"step": %d}\n'


@pytest.mark.parametrize("rest", ['{"step": 2', "\0" * 30, "\0" * 9 + "\n" + ROW % 3, "[1]\n"])
def test_rows_are_cut_at_the_first_line_that_is_not_whole(tmp_path: Path, rest: str) -> None:
    whole = ROW % 0 + ROW % 1
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text(whole + rest)
    assert RunFiles(tmp_path).metrics.last_row() == {"step": 1}
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    assert (tmp_path / "samples.jsonl").read_text() == whole


def test_the_run_keeps_its_id_if_a_power_cut_loses_the_newest_commits(tmp_path: Path) -> None:
    """Engines and learner that remember another id are refused."""
    path, copy = tmp_path / "journal.sqlite", tmp_path / "after" / "journal.sqlite"
    copy.parent.mkdir()
    with Journal(path) as journal:
        run_id = journal.run_id()
        copy.write_bytes(path.read_bytes())  # without journal.sqlite-wal
    with Journal(copy) as journal:
        assert journal.run_id() == run_id
