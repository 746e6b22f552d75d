"""`python -m tools.replay runs/<name>`: replay a recorded event log and compare every decision.

It proves that the decisions of a run follow from its events alone. With `--group N` or
`--prompt ID` it tells the life of a group instead, event by event and decision by decision.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

from buffer.records.event_log import LoggedEvent, read_sessions
from configs.command import run_command
from configs.errors import ExitStatus
from darts import events as ev
from darts.checkpoint import CoreState, restore
from darts.config import CoreConfig
from darts.core import Core
from tools.reporting.group_story import Story


class Difference(NamedTuple):
    """The first event whose decisions differ from the recorded ones."""

    number: int
    event: ev.Event
    recorded: list[ev.Decision]
    replayed: list[ev.Decision]


class Replayed(NamedTuple):
    """The number of events and decisions compared, up to the first difference."""

    num_events: int
    num_decisions: int
    difference: Difference | None


def replay(config: CoreConfig, state: CoreState | None, logged: Iterable[LoggedEvent]) -> Replayed:
    """Drive a core with the recorded events of one segment, up to the first difference."""
    core = Core(config) if state is None else restore(config, state)
    num_events = num_decisions = 0
    for _, event, recorded, complete in logged:
        try:
            replayed = list(core.handle(event))
        except ev.ProtocolError:
            replayed = []  # a peer's mistake, which the core refused during the run as well
        if not complete:
            replayed = replayed[: len(recorded)]
        if replayed != recorded:
            return Replayed(
                num_events, num_decisions, Difference(num_events, event, recorded, replayed)
            )
        num_events += 1
        num_decisions += len(recorded)
    return Replayed(num_events, num_decisions, None)


def compare(path: Path) -> int:
    """Replay every segment of the log in `path` and print the result. Returns the exit status."""
    started = time.perf_counter()
    num_events = num_decisions = 0
    first_step: int | None = None
    for number, session in enumerate(read_sessions(path), 1):
        first_step = session.step if first_step is None else first_step
        result = replay(session.config, session.state, session.events)
        if result.difference is not None:
            place, event, recorded, replayed = result.difference
            print(
                f"error: segment {number}, event {place} {event}\n"
                f"  recorded {recorded}\n  replayed {replayed}",
                file=sys.stderr,
            )
            return ExitStatus.FAILED
        num_events += result.num_events
        num_decisions += result.num_decisions
    rate = num_events / max(time.perf_counter() - started, 1e-9)
    print(f"{num_events} events, {num_decisions} decisions: identical ({rate:,.0f} events/s)")
    if first_step:
        print(removed(first_step))
    return ExitStatus.OK


def removed(first_step: int) -> str:
    """Tell that the log does not reach back to the beginning of the run."""
    return (
        f"the records begin at step {first_step}: buffer.keep_event_bytes bounds the event log, "
        "and older ones were removed"
    )


def tell(path: Path, group_id: int | None, prompt_id: str | None) -> int:
    """Print the life of one group, or of all groups of a prompt. Returns the exit status."""
    num_lines = 0
    story = Story(group_id, prompt_id)
    first_step: int | None = None
    for session in read_sessions(path):
        if first_step is None and (first_step := session.step):
            print(removed(first_step))
        for entry in session.events:
            for line in story.lines(entry):
                num_lines += 1
                print(line)
    if not num_lines:
        wanted = f"group {group_id}" if prompt_id is None else f"prompt {prompt_id}"
        begins = f" ({removed(first_step)})" if first_step else ""
        raise ValueError(
            f"{path} holds nothing about {wanted}{begins}; groups.jsonl lists the groups"
        )
    return ExitStatus.OK


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="directory of a run, such as runs/demo")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--group", type=int, help="tell the life of the group with this number")
    which.add_argument("--prompt", help="tell the life of every group of the prompt with this id")


def run(given: argparse.Namespace) -> int:
    path: Path = given.run / "events"
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: give the directory of a run, such as runs/demo")
    if given.group is not None or given.prompt is not None:
        return tell(path, given.group, given.prompt)
    return compare(path)


def main() -> NoReturn:
    run_command(
        "Make the decisions of a recorded run again and compare them with the recorded ones.",
        run,
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
