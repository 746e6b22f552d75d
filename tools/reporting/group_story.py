"""Tells the life of a group in words, from the event log. Used by `tools.replay`."""

from __future__ import annotations

from collections.abc import Iterator

from buffer.records.event_log import LoggedEvent
from darts import events as ev


class Story:
    """Takes every logged event of a session, and yields a line for each that concerns the group."""

    def __init__(self, group_id: int | None, prompt_id: str | None) -> None:
        self._group_id, self._prompt_id = group_id, prompt_id
        self._groups: set[int] = set()
        self._rollouts: dict[int, int] = {}  # rollout -> its group, for the chosen groups
        self._tokens: dict[int, int] = {}  # rollout -> last reported length
        self._engines: dict[str, set[int]] = {}  # engine -> rollouts launched on it

    def lines(self, entry: LoggedEvent) -> Iterator[str]:
        when = f"{entry.time_s:10.3f} s  "
        for line in self._event(entry.event):
            yield when + line
        for decision in entry.decisions:
            for line in self._decision(decision):
                yield when + "  -> " + line

    def _event(self, event: ev.Event) -> Iterator[str]:
        match event:
            case ev.RolloutProgressed(rollout_id, num_tokens) if rollout_id in self._rollouts:
                self._tokens[rollout_id] = num_tokens
                yield f"rollout {rollout_id} has {num_tokens} tokens"
            case ev.RolloutWaits(rollout_id) if rollout_id in self._rollouts:
                yield f"rollout {rollout_id} waits for its environment"
            case ev.RolloutFinished(rollout_id) if rollout_id in self._rollouts:
                how = "ended at its limit" if event.truncated else "finished"
                yield (
                    f"rollout {rollout_id} {how} with {event.num_tokens} tokens, "
                    f"reward {event.reward:g}, oldest token of version {event.oldest_version}"
                )
            case ev.RolloutFailed(rollout_id) if rollout_id in self._rollouts:
                yield f"rollout {rollout_id} failed"
            case ev.RolloutStopped(rollout_id, num_tokens) if rollout_id in self._rollouts:
                late = num_tokens - self._tokens.get(rollout_id, num_tokens)
                yield f"rollout {rollout_id} stopped; {late} tokens were sampled after the cancel"
            case ev.EngineLost(engine_id) if self._engines.get(engine_id):
                yield f"engine {engine_id} was lost"
            case ev.GroupTrained(group_id) if group_id in self._groups:
                yield f"group {group_id} was trained"
            case _:
                return

    def _decision(self, decision: ev.Decision) -> Iterator[str]:
        match decision:
            case ev.OpenGroup() if self._is_wanted(decision.group_id, decision.prompt_id):
                self._groups.add(decision.group_id)
                yield (
                    f"open group {decision.group_id} of prompt {decision.prompt_id} for "
                    f"{decision.purpose} on engine {decision.engine_id}: budget {decision.budget}, "
                    f"long seat by {decision.long_end}"
                )
            case ev.Launch() if decision.group_id in self._groups:
                self._rollouts[decision.rollout_id] = decision.group_id
                self._engines.setdefault(decision.engine_id, set()).add(decision.rollout_id)
                before = decision.continues
                suffix = "" if before is None else f" to replace the lost rollout {before}"
                yield f"launch rollout {decision.rollout_id} on {decision.engine_id}{suffix}"
            case ev.Cancel() if decision.rollout_id in self._rollouts:
                tokens = self._tokens.get(decision.rollout_id, 0)
                reason = decision.reason.replace("_", " ")
                yield f"cancel rollout {decision.rollout_id} at {tokens} tokens ({reason})"
            case ev.Curtail(rollout_id) if rollout_id in self._rollouts:
                tokens = self._tokens.get(rollout_id, 0)
                yield f"end rollout {rollout_id} at {tokens} tokens (relative limit)"
            case ev.Ship(step, record) if record.group_id in self._groups:
                yield (
                    f"ship group {record.group_id} for step {step}: "
                    f"{_selection(record)}{_pilot(record)}"
                )
            case ev.Drop(record, requeued) if record.group_id in self._groups:
                where = "its prompt is put back" if requeued else "its prompt is not tried again"
                end = record.end.replace("_", " ")
                yield f"drop group {record.group_id} ({end}{_pilot(record)}); {where}"
            case ev.Evaluated(record) if record.group_id in self._groups:
                yield f"group {record.group_id} is evaluated"
            case ev.Close(record) if record.group_id in self._groups:
                yield f"close group {record.group_id}"
            case _:
                return

    def _is_wanted(self, group_id: int, prompt_id: str) -> bool:
        return group_id == self._group_id or prompt_id == self._prompt_id


def _pilot(record: ev.GroupRecord) -> str:
    if record.mixed_prob is None:
        return ""
    chance = f"{100 * record.mixed_prob:.0f} %"
    return f"; after a pilot of {record.pilot}, rewards differ with a probability of {chance}"


def _selection(record: ev.GroupRecord) -> str:
    def lengths(end: ev.RolloutEnd) -> str:
        return ", ".join(str(r.tokens) for r in record.rollouts if r.end == end) or "none"

    return f"short {lengths('selected_short')}; long {lengths('selected_long')} tokens"
