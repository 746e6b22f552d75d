"""`python -m tools.replay runs/<name>`: feeds a recorded event log to the core again and compares every decision.

Proof that a run's decisions follow from its events alone. Exit status 1 names the first event after which they differ.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from buffer.records.event_log import DECISION_TYPES, read_sessions
from configs.command import run_command
from configs.errors import ExitStatus
from darts import events as ev
from darts.config import CoreConfig
from darts.core import Core


class Difference(NamedTuple):
    """The first event whose decisions are not those recorded."""

    number: int
    event: ev.Event
    recorded: list[ev.Decision]
    replayed: list[ev.Decision]


class Replayed(NamedTuple):
    """What was compared. `interrupted`: the log ends within an event's decisions, as a killed buffer leaves it."""

    num_events: int
    num_decisions: int
    difference: Difference | None


def replay(config: CoreConfig, entries: Iterator[ev.Event | ev.Decision]) -> Replayed:
    """Drives a fresh core with the recorded events of one session, up to the first difference."""
    core = Core(config)
    num_events = num_decisions = 0
    for event, recorded, complete in _with_decisions(entries):
        try:
            replayed = list(core.handle(event))
        except ev.ProtocolError:
            replayed = []  # a peer's mistake, recorded like any event: the core refused it then, too
        if not complete:
            replayed = replayed[: len(recorded)]
        if replayed != recorded:
            return Replayed(
                num_events, num_decisions, Difference(num_events, event, recorded, replayed)
            )
        num_events += 1
        num_decisions += len(recorded)
    return Replayed(num_events, num_decisions, None)


def _with_decisions(
    entries: Iterator[ev.Event | ev.Decision],
) -> Iterator[tuple[ev.Event, list[ev.Decision], bool]]:
    """Each event with the decisions that follow it. Of the last one some may be missing (`complete` is False)."""
    decision_types = tuple(DECISION_TYPES.values())
    event: ev.Event | None = None
    decisions: list[ev.Decision] = []
    for entry in entries:
        if isinstance(entry, decision_types):
            decisions.append(entry)
            continue
        if event is not None:
            yield event, decisions, True
        event, decisions = entry, []
    if event is not None:
        yield event, decisions, False


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="directory of a run, such as runs/demo")


def run(given: argparse.Namespace) -> int:
    path: Path = given.run / "events.msgpack"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the directory of a run, such as runs/demo")
    started = time.perf_counter()
    num_events = num_decisions = 0
    for session, (config, entries) in enumerate(read_sessions(path)):
        result = replay(config, entries)
        if result.difference is not None:
            number, event, recorded, replayed = result.difference
            print(
                f"error: session {session}, event {number} {event}\n"
                f"  recorded {recorded}\n  replayed {replayed}",
                file=sys.stderr,
            )
            return ExitStatus.FAILED
        num_events += result.num_events
        num_decisions += result.num_decisions
    rate = num_events / max(time.perf_counter() - started, 1e-9)
    print(f"{num_events} events, {num_decisions} decisions: identical ({rate:,.0f} events/s)")
    return ExitStatus.OK


def main() -> NoReturn:
    run_command(
        "Make the decisions of a recorded run again and compare them with the recorded ones.",
        run,
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
