"""Every reader of a run reads all segments, and tells where the records begin if some are gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from buffer.data.outstanding_prompts import Cursor
from buffer.records.event_log import BufferState, Checkpoint, EventLog
from buffer.records.row_log import RowLog
from buffer.records.row_segments import older_segments, read_rows
from configs.schema import Config
from darts.checkpoint import save
from darts.config import CoreConfig
from darts.core import Core
from tools import replay
from tools.comparing.rows import summarise
from tools.faults.recount import recount
from tools.faults.soak import missing_steps
from tools.monitor.playback import Frames
from tools.reporting.new_rows import NewSteps
from tools.reporting.run_directory import RunDirectory

GROUPS, STEPS = 2, 12


class Run:
    """Writes the rows of a run of small segments, of which it keeps `keep_bytes`."""

    def __init__(self, folder: Path, keep_bytes: int = 1 << 30) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.keep_bytes, self.step = keep_bytes, 0
        names = ("groups", "samples", "metrics")
        self.logs = [RowLog(folder / f"{name}.jsonl") for name in names]

    def end_steps(self, num_steps: int, time_s: float = 0.0) -> None:
        groups, samples, metrics = self.logs
        for step in range(self.step, self.step + num_steps):
            for number in range(GROUPS):
                groups.append(
                    {
                        "step": step, "group_id": GROUPS * step + number, "prompt_id": "p",
                        "opened_version": step, "shipped_version": step, "budget": 1,
                        "end": "shipped", "visit": GROUPS * step + number,
                        "rollouts": [{"tokens": 10 * step + number, "end": "selected_short"}],
                    }
                )  # fmt: skip
            samples.append(
                {"step": step, "prompt_id": "p", "tokens": step, "end": "selected_short",
                 "response": "r"}
            )  # fmt: skip
            metrics.append({"step": step, "time_s": time_s + step, "reward/mean": 0.5})
            for log in self.logs:
                log.rotate(300, self.keep_bytes, needed_step=step)
        self.step += num_steps

    def rewind(self, step: int) -> None:
        for log in self.logs:
            log.cut(step)
        self.step = step


@pytest.fixture
def removed(tmp_path: Path) -> Path:
    """A run whose older half is gone."""
    Run(tmp_path / "r", keep_bytes=1500).end_steps(STEPS)
    first = RunDirectory.read(tmp_path / "r").groups[0]["step"]
    assert 0 < first < STEPS - 2
    return tmp_path / "r"


def logged(steps: NewSteps) -> list[tuple[int, list[int]]]:
    """The steps that a tracker would log, and their lengths."""
    read = [(step.number, list(step.lengths)) for step in steps.read()]
    if read:
        steps.next_step = read[-1][0] + 1
    return read


def expected(*numbers: int) -> list[tuple[int, list[int]]]:
    return [(step, [10 * step, 10 * step + 1]) for step in numbers]


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_a_follower_reads_every_step_once_across_segments(tmp_path: Path, at_once: int) -> None:
    run, steps = Run(tmp_path), NewSteps(tmp_path, 0)
    found = logged(steps)
    for _ in range(0, 30, at_once):
        run.end_steps(at_once)
        found += logged(steps)
    assert len(older_segments(tmp_path / "metrics.jsonl")) > 3
    assert found == expected(*range(30))


@pytest.mark.parametrize("back", range(9))
def test_a_follower_reads_steps_again_that_were_taken_back(tmp_path: Path, back: int) -> None:
    """At any position of the cut, in a segment or between two of them."""
    for before in range(9, 13):
        folder = tmp_path / str(before)
        run, steps = Run(folder), NewSteps(folder, 0)
        run.end_steps(before)
        logged(steps)
        run.rewind(before - back)
        run.end_steps(back + 2, time_s=1000.0)
        assert logged(steps) == expected(*range(before - back, before + 2)), before


def test_a_follower_that_is_too_late_tells_the_steps_that_it_missed(tmp_path: Path) -> None:
    run, steps = Run(tmp_path, keep_bytes=800), NewSteps(tmp_path, 0)
    run.end_steps(2)
    assert [number for number, _ in logged(steps)] == [0, 1]
    run.end_steps(30)
    (first, _), *_ = found = logged(steps)
    assert first > 2 and [number for number, _ in found] == list(range(first, 32))
    assert (steps.first_step, steps.num_removed) == (first, first - 2)
    run.end_steps(1)
    assert logged(steps) == expected(32) and steps.num_removed == 0


def test_readers_join_segments_into_one_history(tmp_path: Path) -> None:
    Run(tmp_path).end_steps(STEPS)
    run = RunDirectory.read(tmp_path)
    assert [row["step"] for row in run.metrics] == list(range(STEPS)) and run.num_steps == STEPS
    assert [row["group_id"] for row in run.groups] == list(range(GROUPS * STEPS))
    assert not any("begin" in problem for problem in run.problems)
    assert [len(state.groups) for state in Frames(run)] == [GROUPS] * STEPS


def test_a_report_tells_the_step_at_which_records_begin(removed: Path) -> None:
    run = RunDirectory.read(removed)
    first = {name: list(read_rows(removed / name))[0]["step"] for name in NAMES}
    assert [problem for problem in run.problems if "begin" in problem] == [
        f"{name}: its records begin at step {first[name]}; those of earlier steps were removed "
        "(buffer.keep_row_bytes)."
        for name in NAMES
        if first[name]
    ]
    assert run.num_steps == STEPS


def test_a_played_run_begins_with_its_first_record(removed: Path) -> None:
    run = RunDirectory.read(removed)
    run.metrics = [row for row in run.metrics if row["step"] > run.groups[0]["step"]]
    states = Frames(run)
    assert [len(state.groups) for state in states] == [GROUPS] * len(run.metrics)
    assert f"begin at step {run.metrics[0]['step']}" in states[0].waiting
    assert "begin" not in states[1].waiting


def test_a_comparison_needs_all_records(removed: Path) -> None:
    with pytest.raises(ValueError, match="records begin at step [1-9]"):
        summarise(RunDirectory.read(removed))


def test_a_recount_and_a_soak_name_the_files_that_lack_rows(removed: Path) -> None:
    config = Config()
    config.run.steps = STEPS
    assert any("groups.jsonl begins at step" in fault for fault in recounted(removed, config))
    assert "groups.jsonl" not in "".join(missing_steps(removed, STEPS))
    Run(removed.parent / "whole").end_steps(STEPS)
    assert any(
        "groups.jsonl still has its first row" in fault
        for fault in missing_steps(removed.parent / "whole", STEPS)
    )
    lost = [row for row in read_rows(removed / "groups.jsonl") if row["step"] != STEPS - 2]
    for segment in older_segments(removed / "groups.jsonl").values():
        segment.unlink()
    (removed / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lost))
    assert any("groups.jsonl has not every" in fault for fault in missing_steps(removed, STEPS))


def recounted(folder: Path, config: Config) -> list[str]:
    (folder / "events").mkdir()
    return recount(folder, config, folder / "trained.jsonl")


def test_a_replay_tells_the_step_at_which_the_log_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CoreConfig(groups_per_step=1, group_size=2, redundancy="none")
    log, _ = EventLog.open(tmp_path, config, fsync_s=1000)
    for step in (3, 5):
        state = BufferState(
            step=step, cursor=Cursor(0, [], []), tokens={}, num_skipped=0, policy=None, learner=None
        )
        checkpoint = Checkpoint(config=config, core=save(Core(config)), buffer=state)
        log.rotate(checkpoint, 0.0, keep_bytes=1 << 30)
    assert replay.compare(tmp_path) == 0
    assert "begin at" not in capsys.readouterr().out
    log.log.drop_before(2)
    assert replay.compare(tmp_path) == 0
    assert "the records begin at step 3" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the records begin at step 3"):
        replay.tell(tmp_path, 0, None)
    log.close()


NAMES = ("metrics.jsonl", "groups.jsonl", "samples.jsonl")
