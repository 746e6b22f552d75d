"""`python -m tools.track runs/<name>`: log a run to experiment trackers, live or afterwards.

    run's files ──new rows, every POLL_S──> one thread per tracker ──> its own library

    waits for      with --follow: new rows, until a signal
    unblocked by   a signal: then it logs the rows that there are, and ends within CLOSE_S

Reads only files, so that no tracker can slow a run, and a run of last week can be logged as well. A
tracker that fails is opened again. <run>/trackers/ records how far each tracker is, and a later
call continues there. `tools.launch` runs it with --follow if `run.trackers` names any.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn, cast

from omegaconf import OmegaConf

from buffer.processes.stop_request import StopRequest
from buffer.records.files import atomic_write
from configs.command import run_command
from configs.errors import ExitStatus, one_line
from configs.schema import Config
from tools.export import run_config
from tools.reporting.run_directory import Row, is_number
from tools.reporting.trackers import TRACKERS, Identity, Step, Tracker

POLL_S = 1.0
RETRY_S = 10.0
CLOSE_S = 20.0  # for a tracker's library to finish; the rest is uploaded by a later call
STATES = "trackers"


class NewLines:
    """Reads the JSON lines that a file has gained since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.restart()

    def restart(self) -> None:
        self._inode, self._offset = 0, 0

    def read(self) -> tuple[bool, list[Row]]:
        """Whether the lines are counted from the start of the file again, and the new lines.

        The first call does that, and a run that takes steps back, since it writes the file again.
        """
        if not self._path.exists():
            return False, []
        with self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            again = inode != self._inode or file.seek(0, os.SEEK_END) < self._offset
            self._inode, self._offset = inode, 0 if again else self._offset
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")
        self._offset += len(whole[0]) + len(whole[1])
        return again, [json.loads(line) for line in whole[0].split(b"\n") if line]


class NewSteps:
    """Reads the steps that a run has recorded since the last call."""

    def __init__(self, folder: Path, groups_per_step: int, first: int) -> None:
        """`first` is the first step to be read, unless the run has taken it back."""
        self.next_step = first
        self._groups_per_step = groups_per_step
        self._rows = NewLines(folder / "metrics.jsonl")
        self._groups = NewLines(folder / "groups.jsonl")
        self._samples = NewLines(folder / "samples.jsonl")
        self._num_groups = 0  # trained, in the part of groups.jsonl that was read
        self._lengths: defaultdict[int, list[int]] = defaultdict(list)
        self._responses: defaultdict[int, list[Row]] = defaultdict(list)

    def read(self) -> list[Step]:
        again, rows = self._rows.read()
        if again:
            self._groups.restart()
            self._samples.restart()
            self._num_groups = 0
            self._lengths.clear()
            self._responses.clear()
            self.next_step = min(self.next_step, rows[-1]["step"] + 1 if rows else 0)
        self._read_groups()
        for sample in self._samples.read()[1]:
            self._responses[sample["step"]].append(sample)
        return [self._step(row) for row in rows if row["step"] >= self.next_step]

    def _read_groups(self) -> None:
        for group in self._groups.read()[1]:
            if group["end"] == "shipped":
                of_step = self._lengths[self._num_groups // self._groups_per_step]
                of_step += [rollout["tokens"] for rollout in group["rollouts"]]
                self._num_groups += 1

    def _step(self, row: Row) -> Step:
        number = row["step"]
        values = {name: float(row[name]) for name in row if "/" in name and is_number(row[name])}
        step = Step(number, values, self._lengths[number], extremes(self._responses[number]))
        for kept in (self._lengths, self._responses):
            for old in [one for one in kept if one <= number]:
                del kept[old]
        return step


def extremes(samples: Sequence[Row]) -> list[Row]:
    """The shortest and the longest response to each prompt."""
    by_prompt: defaultdict[str, list[Row]] = defaultdict(list)
    for sample in samples:
        by_prompt[sample["prompt_id"]].append(sample)
    ends = []
    for group in by_prompt.values():
        group.sort(key=itemgetter("tokens"))
        ends += [group[0], group[-1]] if len(group) > 1 else group
    return ends


class Mirror:
    """Logs a run to one tracker, in a thread of its own."""

    def __init__(self, name: str, folder: Path, config: Config) -> None:
        self.name = name
        self.finish = threading.Event()  # set it to log the rows that there are, and end
        self.complaint = ""  # why the tracker has not got all rows
        self._folder, self._config = folder, config
        self._state = folder / STATES / f"{name}.json"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def has_ended(self, within_s: float = 0.0) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                self._log_all()
                self.complaint = ""
                return
            except Exception as error:  # of any library: the other trackers go on, and the run
                if one_line(error) != self.complaint:
                    self.complaint = one_line(error)
                    say(
                        f"{self.name} failed, and is tried again in {RETRY_S:g} s: {self.complaint}"
                    )
            if self.finish.wait(RETRY_S):
                return

    def _log_all(self) -> None:
        """Log steps until the last one of the run, or until `finish` is set."""
        state = json.loads(self._state.read_text()) if self._state.exists() else {}
        run = self._config.run
        settings = OmegaConf.to_container(OmegaConf.structured(self._config))
        known = state.get("known", "")
        tracker = TRACKERS[self.name](
            Identity(self._folder, run.project, run.name, cast(dict[str, Any], settings), known)
        )
        steps = NewSteps(self._folder, self._config.batch.groups, state.get("next_step", 0))
        with closing(tracker):
            self._remember(tracker, steps)
            say(f"{self.name}: logging to {tracker.where}")
            last = False
            while not last:
                last = self.finish.wait(POLL_S)
                for step in steps.read():
                    tracker.log(step)
                    steps.next_step = step.number + 1
                    self._remember(tracker, steps)

    def _remember(self, tracker: Tracker, steps: NewSteps) -> None:
        state = {"known": tracker.known, "next_step": steps.next_step}
        atomic_write(self._state, json.dumps(state))


def track(folder: Path, names: Sequence[str], follow: bool) -> int:
    """Log the steps of a run, with `follow` until a signal arrives. Returns the exit status."""
    with StopRequest(lambda: None) as request:
        while follow and not (folder / "config.yaml").exists() and not request.requested:
            time.sleep(POLL_S)  # a run that has just been started
        config = run_config(folder)
        names = names or config.run.trackers
        if unknown := [name for name in names if name not in TRACKERS]:
            raise ValueError(f"there is no tracker {unknown[0]}; there are {', '.join(TRACKERS)}")
        if not names:
            raise ValueError(f"{folder} names no run.trackers: give some of {', '.join(TRACKERS)}")
        (folder / STATES).mkdir(exist_ok=True)
        mirrors = [Mirror(name, folder, config) for name in names]
        while follow and not request.requested:
            time.sleep(0.1)
        for mirror in mirrors:
            mirror.finish.set()
        deadline = time.monotonic() + CLOSE_S
        missing = [m for m in mirrors if not m.has_ended(max(0.0, deadline - time.monotonic()))]
    for mirror in missing:
        mirror.complaint = mirror.complaint or f"it did not end within {CLOSE_S:g} s"
    complaints = [f"{mirror.name}: {mirror.complaint}" for mirror in mirrors if mirror.complaint]
    if complaints:
        say(
            f"not everything was logged ({'; '.join(complaints)}); "
            f"`python -m tools.track {folder}` logs the rest"
        )
    return ExitStatus.FAILED if complaints else ExitStatus.OK


def say(text: str) -> None:
    print(f"tracker: {text}", flush=True)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="directory of a run, finished or not")
    parser.add_argument(
        "trackers",
        nargs="*",
        default=[],  # so that it is not called required
        help=f"some of {', '.join(TRACKERS)} (default: run.trackers of the run)",
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="wait for the run to start, and log every new step until Ctrl-C",
    )


def main() -> NoReturn:
    run_command(
        "Log the metrics, length histograms, sample responses and settings of a run to experiment "
        "trackers. Steps that were logged by an earlier call are not logged again.",
        lambda given: track(given.run, given.trackers, given.follow),
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
