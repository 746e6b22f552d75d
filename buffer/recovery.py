"""Restores the state of a restarted buffer from its logs.

The event log is replayed into the core from its newest checkpoint, to which the ledger is cut back.
Every decision about a record is performed again, and nothing is sent. Then the tokens of
outstanding rollouts are read from their log. Engines and learner stay in the core's tables, and
have `buffer.peer_timeout_s` to say hello again. Driven once, by `buffer.service`, before its loop.

The decisions must be those that were logged, since peers acted on them. A version of this package
with other rules would decide otherwise, and must not continue the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import msgspec

from buffer.records.event_log import Learner, LoggedEvent, Policy, Rewound, Trained
from buffer.records.token_log import TokenLog
from buffer.run_state import RunState
from buffer.wire import messages as msg
from darts import events as ev
from darts.core import Core
from darts.state.groups import RolloutState

HELD = (RolloutState.RUNNING, RolloutState.FINISHED, RolloutState.TRUNCATED)


def replay(
    run: RunState,
    replayed: Callable[[ev.Event], None],
    perform: Callable[[ev.Decision], None],
    trained: Callable[[Trained], None],
) -> None:
    """Restore the core, the prompts and the records.

    Raises `ValueError` if the core decides otherwise than it did when the log was written.
    """
    run.replaying = True
    announced: msg.SnapshotRef | None = None
    for entry in run.recovered.entries:
        if isinstance(entry, LoggedEvent):
            for decision in _decided_again(run, entry):
                perform(decision)
            replayed(entry.event)
        else:
            match entry.note:
                case Policy(policy):
                    announced = policy
                case Learner() as learner:
                    run.set_learner(learner)
                case Trained() as step:
                    trained(step)
                case Rewound() as step:
                    run.withdraw(step)
        # An entry without the event of its version was lost with the process that logged it.
        if announced is not None and announced.version <= run.core.policy_version:
            run.policy = announced
    run.end_replay()
    run.recovered.entries.clear()


def _decided_again(run: RunState, logged: LoggedEvent) -> Sequence[ev.Decision]:
    event = logged.event
    if isinstance(event, ev.PromptsDrawn):
        run.prompts.restore(prompt.visit for prompt in event.prompts)
    try:
        decisions = run.core.handle(event)
    except ev.ProtocolError:
        decisions = ()  # a peer's mistake, which the core refused the first time, too
    if logged.complete and not agree(logged.decisions, decisions):
        raise ValueError(
            f"{run.folder} was logged by a version of this package that decides otherwise, and "
            "its rollouts would not be those of its records: continue it with that version, or "
            "start a run under another run.name "
            f"(`python -m tools.replay {run.folder}` shows the first difference)"
        )
    return decisions


def agree(logged: Sequence[ev.Decision], decided: Sequence[ev.Decision]) -> bool:
    """Equal, but for the rounding of figures: another machine may have another `log` and `exp`."""
    if [*map(type, logged)] != [*map(type, decided)]:
        return False
    return logged == decided or _rounded(logged) == _rounded(decided)


class _Figure(float):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and math.isclose(self, other, rel_tol=1e-9, abs_tol=1e-12)


def _rounded(decisions: Sequence[ev.Decision]) -> object:
    return json.loads(msgspec.json.encode(decisions), parse_float=_Figure)


def restore_tokens(run: RunState) -> list[ev.Event]:
    """Restore the tokens of outstanding rollouts.

    Returns an event for each rollout whose newest tokens were lost in a power cut.
    """
    expected = _expected_tokens(run.core)
    log, held = TokenLog.open(
        run.folder / "tokens", expected.keys(), fsync_s=run.config.buffer.fsync_s
    )
    run.store.restore(held)
    run.store.log = log
    events: list[ev.Event] = []
    for rollout_id, (group_id, num_tokens) in expected.items():
        if rollout_id not in run.store:
            run.store.open(rollout_id, group_id, None)
        if (num_held := run.store.num_sampled(rollout_id)) < num_tokens:
            events.append(ev.TokensLost(rollout_id, num_held))
    return events


def _expected_tokens(core: Core) -> dict[int, tuple[int, int]]:
    """Rollouts whose tokens are needed: their group, and their sampled tokens in the core."""
    expected: dict[int, tuple[int, int]] = {}
    for group in core.groups.values():
        for rollout in group.rollouts.values():
            if rollout.state in HELD:
                expected[rollout.rollout_id] = (group.group_id, rollout.tokens)
        for planned in group.planned:
            if (lost := planned.continues) is not None:
                expected[lost.rollout_id] = (group.group_id, lost.tokens)
    return expected
