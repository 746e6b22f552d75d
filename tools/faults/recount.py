"""Recounts a run from its logs alone, and reports every violation of a guarantee.

Reads the event log, groups.jsonl, metrics.jsonl, and the learner's own record of its training. It
trusts none of them: a core makes the decisions again, and tokens are checked against the engine to
which the log assigned the rollout.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from buffer.records.event_log import read_sessions
from buffer.records.row_segments import Row, begins_at, read_rows
from configs.schema import Config
from darts import events as ev
from darts.checkpoint import restore
from darts.core import Core
from tools.faults.sampled import Life, score
from tools.faults.sampled import faults_of as fake_faults
from tools.replay import replay

MAX_SHOWN = 5
EngineCheck = Callable[[Row, list[Life]], Iterator[str]]


@dataclass
class History:
    """The history of a run across all lives of the buffer, from the event log alone."""

    drawn: set[int] = field(default_factory=set)  # visits of training prompts
    launches: dict[int, ev.Launch] = field(default_factory=dict)
    given_up: set[int] = field(default_factory=set)  # visits dropped and not put back
    outstanding: set[int] = field(default_factory=set)  # visits at the end, in groups or queued
    differences: list[str] = field(default_factory=list)

    def lives(self, rollout_id: int) -> list[Life]:
        """The lives of a rollout, oldest first."""
        lives: list[Life] = []
        at: int | None = rollout_id
        while at is not None:
            launch = self.launches[at]
            lives.append(Life(at, launch.engine_id))
            at = launch.continues
        return lives[::-1]


def recount(
    folder: Path, config: Config, record: Path, of_engine: EngineCheck = fake_faults
) -> list[str]:
    """The violations found in a run that has ended; none if all guarantees hold.

    `of_engine` finds the faults of a trained row that its engines cannot have sampled.
    """
    history = read_history(folder / "events")
    rows, groups = (list(read_rows(folder / f"{name}.jsonl")) for name in ("metrics", "groups"))
    trained = read_trained(record)
    if faults := list(_removed(rows, groups, folder / "events")):
        return faults
    faults = list(history.differences)
    steps = [row["step"] for row in rows]
    if steps != list(range(config.run.steps)):
        faults.append(f"metrics.jsonl has the steps {steps}")
    faults += _group_faults(groups, history)
    faults += _step_faults(config, groups, trained)
    for step, row in sorted(trained.items()):
        faults += _token_faults(config, step, row, history, of_engine)
    return faults


def _removed(rows: list[Row], groups: list[Row], events: Path) -> Iterator[str]:
    """A recount needs all records, so it names those that a bound of their size has removed."""
    begins = {
        "metrics.jsonl": begins_at(rows),
        "groups.jsonl": begins_at(groups),
        "the event log": next((session.step for session in read_sessions(events)), 0),
    }
    for name, step in begins.items():
        if step:
            yield f"{name} begins at step {step}, since its older records were removed"


def read_trained(record: Path) -> dict[int, Row]:
    """The training of each step by all ranks together. Of several times, the last one counts.

    A training begins with its first portion.
    """
    shards: dict[tuple[int, int], Row] = {}
    for row in read_rows(record):
        key = row["step"], row["rank"]
        if row["portion"]:
            row = row | {"trajectories": shards[key]["trajectories"] + row["trajectories"]}
        shards[key] = row
    trained: dict[int, Row] = {}
    for (step, _), shard in sorted(shards.items()):
        if step in trained:
            shard = shard | {"trajectories": trained[step]["trajectories"] + shard["trajectories"]}
        trained[step] = shard
    return trained


def read_history(events: Path) -> History:
    """Drive a core through every segment of the event log."""
    history = History()
    for number, session in enumerate(read_sessions(events), 1):
        logged = list(session.events)
        difference = replay(session.config, session.state, logged).difference
        if difference is not None:
            history.differences.append(f"segment {number} replays differently at {difference}")
        core = restore(session.config, session.state) if session.state else Core(session.config)
        for entry in logged:
            _take(history, core, entry.event)
        if not core.run_ended:
            history.outstanding = _visits(core)
    return history


def _take(history: History, core: Core, event: ev.Event) -> None:
    if isinstance(event, ev.PromptsDrawn):
        history.drawn |= {prompt.visit for prompt in event.prompts}
    elif isinstance(event, ev.RunEnded):  # the core drops all of these without a record
        history.outstanding = _visits(core)
    try:
        decisions = core.handle(event)
    except ev.ProtocolError:
        return  # a peer's mistake, refused during the run as well
    for decision in decisions:
        if isinstance(decision, ev.Launch):
            history.launches[decision.rollout_id] = decision
        elif isinstance(decision, ev.Drop) and decision.record.end != "run_ended":
            history.given_up.discard(decision.record.visit)
            if not decision.requeued:
                history.given_up.add(decision.record.visit)


def _visits(core: Core) -> set[int]:
    """Visits of the training prompts in groups or queued."""
    groups = {g.prompt.visit for g in core.groups.values() if g.purpose == "train"}
    return groups | {waiting.prompt.visit for waiting in core.prompts.training}


def _group_faults(groups: list[Row], history: History) -> Iterator[str]:
    """Each group ends once; each visit is trained once, dropped with a reason, or outstanding."""
    yield from _repeated("group", (row["group_id"] for row in groups))
    own = [row for row in groups if row["end"] != "evaluated"]
    shipped = [row["visit"] for row in own if row["end"] == "shipped"]
    yield from _repeated("visit", shipped)
    dropped = {row["visit"] for row in own if row["end"] != "shipped"}
    ended = set(shipped) | (dropped & history.given_up)
    lost = history.drawn - ended - history.outstanding
    yield from _listed("visits were drawn and neither trained, dropped nor outstanding", lost)
    yield from _listed("visits were trained or dropped and never drawn", ended - history.drawn)
    yield from _listed("visits were trained and are outstanding", ended & history.outstanding)


def _step_faults(config: Config, groups: list[Row], trained: dict[int, Row]) -> Iterator[str]:
    """Check that the learner trained on exactly the batches of the ledger, step by step."""
    shipped = [row for row in groups if row["end"] == "shipped"]
    per_step = config.batch.groups
    if len(shipped) != config.run.steps * per_step:
        yield f"{len(shipped)} groups shipped in {config.run.steps} steps of {per_step}"
    for step in range(config.run.steps):
        expected = {
            rollout["rollout_id"]
            for row in shipped[step * per_step : (step + 1) * per_step]
            for rollout in _with_signal(row)
            if not rollout["truncated"]
        }
        found = [t["rollout_id"] for t in trained.get(step, {}).get("trajectories", [])]
        yield from _repeated(f"step {step}: rollout", found)
        yield from _listed(f"rollouts of step {step} were not trained", expected - set(found))
        sentence = f"rollouts were trained in step {step} and are not in its groups"
        yield from _listed(sentence, set(found) - expected)


def _with_signal(row: Row) -> list[Row]:
    """The selected rollouts of a group, or none if their rewards, 0 or 1, are all equal."""
    selected = [r for r in row["rollouts"] if r["end"].startswith("selected")]
    return selected if len({r["reward"] for r in selected}) > 1 else []


def _token_faults(
    config: Config, step: int, row: Row, history: History, of_engine: EngineCheck
) -> Iterator[str]:
    for trajectory in row["trajectories"]:
        rollout_id = trajectory["rollout_id"]
        name = f"step {step}, rollout {rollout_id}"
        if rollout_id not in history.launches:
            yield f"{name} was never launched"
            continue
        for fault in of_engine(trajectory, history.lives(rollout_id)):
            yield f"{name}: {fault}"
        lag = row["policy_version"] - min(version for version, _ in trajectory["versions"])
        if not 0 <= lag <= config.staleness.max_lag:
            yield f"{name}: its lag is {lag}"


def text_faults(decode: Callable[[list[int]], str]) -> EngineCheck:
    """For real engines, whose tokens prove nothing by themselves: lengths, signs and the reward.

    The learner has compared the log-probabilities with those of the weights (`learner.agreement`).
    """

    def faults(row: Row, lives: list[Life]) -> Iterator[str]:
        places = [place for place, is_sampled in enumerate(row["sampled"]) if is_sampled]
        if sum(count for _, count in row["versions"]) != len(places):
            yield f"{len(places)} tokens were sampled, and its versions are {row['versions']}"
        if not all(-math.inf < row["logprobs"][place] <= 0 for place in places):
            yield "a log-probability is not that of a sampled token"
        response = [row["tokens"][place] for place in places]
        if row["reward"] != score("", decode(response), "", {}):
            yield f"its reward {row['reward']} is not that of its response"

    return faults


def _repeated(name: str, ids: Iterable[int]) -> list[str]:
    return [f"{name} {i} occurs {n} times" for i, n in Counter(ids).items() if n > 1]


def _listed(sentence: str, ids: set[int]) -> list[str]:
    some = ", ".join(map(str, sorted(ids)[:MAX_SHOWN]))
    return [f"{len(ids)} {sentence}: {some}"] if ids else []
