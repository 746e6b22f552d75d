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
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn, cast

from omegaconf import OmegaConf

from buffer.processes.stop_request import StopRequest
from buffer.records.files import atomic_write
from configs.command import run_command
from configs.errors import ExitStatus, one_line
from configs.schema import Config
from tools.export import run_config
from tools.reporting.new_rows import NewSteps
from tools.reporting.trackers import TRACKERS, Identity, Tracker

POLL_S = 1.0
RETRY_S = 10.0
CLOSE_S = 20.0  # for a tracker's library to finish; the rest is uploaded by a later call
STATES = "trackers"


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
        steps = NewSteps(self._folder, state.get("next_step", 0))
        with closing(tracker):
            self._remember(tracker, steps)
            say(f"{self.name}: logging to {tracker.where}")
            last = False
            while not last:
                last = self.finish.wait(POLL_S)
                read = steps.read()
                if steps.num_removed:
                    say(
                        f"{self.name}: the records begin at step {steps.first_step}; "
                        f"{steps.num_removed} steps before it were removed "
                        "(buffer.keep_row_bytes) and cannot be logged"
                    )
                for step in read:
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
