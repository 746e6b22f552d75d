"""Plays a run's ledger back as live states, one learner step after the other.

Owns the pace, and reads only the run's directory. The ledger records how each rollout ended, not
how it grew, so a step shows its groups as they ended, and no engines. Driven by
`tools.tail_monitor --play`.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import log, log2
from pathlib import Path
from statistics import fmean, pstdev
from typing import overload

import msgspec

from buffer.records.held_out import evaluation_of
from buffer.records.metrics import HISTOGRAM_EDGES
from buffer.wire.messages import GroupView, LiveState, PromptView, RolloutView, beginning
from tools.reporting.run_directory import Row, RunDirectory, is_number

WINDOW_GROUPS = 64  # number of recent groups in the histogram, the prompts and the lags
FIRST_STEPS_PER_S = 2.0  # about as fast as this is played at first
SLOWEST, FASTEST = 1 / 16, 2.0**16


class Replay:
    """A finished run as a source of live states, in place of the `MonitorLink` of a live run.

    A `speed` of 1 plays the run as it was recorded, and 2 twice as fast.
    """

    def __init__(self, run_dir: Path) -> None:
        self._frames = Frames(RunDirectory.read(run_dir))
        self.speed = first_speed(self._frames.seconds)
        self.held = False
        self._next = 0
        self._due_s = time.monotonic()

    def receive(self, timeout_s: float) -> LiveState | None:
        """The state of the next step, or None if none is due within `timeout_s`."""
        now = time.monotonic()
        if self.held or self.ended() or self._due_s > now + timeout_s:
            time.sleep(timeout_s)
            return None
        time.sleep(max(0.0, self._due_s - now))
        return self._show(self._next)

    def seek(self, frac: float, steps: int = 0) -> LiveState:
        """Go on by that share of the run and that many steps; a negative one goes back."""
        shown = max(0, self._next - 1)
        place = shown + steps + round(frac * len(self._frames))
        return self._show(max(0, min(len(self._frames) - 1, place)))

    def change_speed(self, factor: float) -> None:
        """Within bounds. The present step keeps the share of its time that it has left."""
        before, now = self.speed, time.monotonic()
        self.speed = min(max(self.speed * factor, SLOWEST), FASTEST)
        self._due_s = now + max(0.0, self._due_s - now) * before / self.speed

    def _show(self, place: int) -> LiveState:
        self._next = place + 1
        seconds = self._frames.seconds
        lasts_s = seconds[self._next] - seconds[place] if self._next < len(seconds) else 0.0
        self._due_s = time.monotonic() + max(0.0, lasts_s) / self.speed
        return self._frames[place]

    def last(self) -> LiveState:
        return self._frames[-1]

    def ended(self) -> bool:
        return self._next == len(self._frames)

    def close(self) -> None:
        """Does nothing, because no resource is held open."""


def first_speed(seconds: Sequence[float]) -> float:
    """A power of two with which the steps follow one another at about `FIRST_STEPS_PER_S`."""
    lasts_s = (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)
    return min(FASTEST, 2.0 ** round(log2(max(1.0, lasts_s * FIRST_STEPS_PER_S))))


class Frames(Sequence[LiveState]):
    """One state per recorded step, made when it is asked for, as a long run has many."""

    def __init__(self, run: RunDirectory) -> None:
        """Raises `ValueError` without metrics.jsonl or groups.jsonl."""
        if not run.metrics or not run.groups:
            raise ValueError(f"{run.path} cannot be played: {' '.join(run.problems)}")
        self._run, self.seconds = run, run.seconds()
        first = bisect_left([group["step"] for group in run.groups], run.metrics[0]["step"])
        evaluations = map(evaluation_of, run.metrics)
        self._evaluations = list(accumulate(evaluations, lambda before, new: new or before))
        self._ends = [first, *_ends_of_steps(run)]
        self._texts = {str(row.get("prompt_id")): str(row.get("prompt", "")) for row in run.samples}

    def __len__(self) -> int:
        return len(self._run.metrics)

    @overload
    def __getitem__(self, place: int) -> LiveState: ...
    @overload
    def __getitem__(self, place: slice) -> list[LiveState]: ...
    def __getitem__(self, place: int | slice) -> LiveState | list[LiveState]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        run, (first, last) = self._run, self._ends[place : place + 2]
        recent = run.groups[max(0, last - WINDOW_GROUPS) : last]
        closed = run.groups[first:last]
        state = _snapshot(run, run.metrics[place], self.seconds[place], closed, recent)
        name, named = self._beginning, msgspec.structs.replace
        metrics = {k: float(v) for k, v in self._evaluations[place].items() if is_number(v)}
        groups = [named(view, text=name(view.prompt_id)) for view in state.groups]
        prompts = [named(view, text=name(view.prompt_id)) for view in state.prompts]
        return named(state, metrics=metrics | state.metrics, groups=groups, prompts=prompts)

    def _beginning(self, prompt_id: str) -> str:
        """Of a prompt's text, which is recorded if responses to it were sampled."""
        return beginning(self._texts.get(prompt_id, ""))


def _ends_of_steps(run: RunDirectory) -> list[int]:
    """For each row of metrics, the number of ledger rows up to the end of its step.

    The ledger is in order of the steps.
    """
    steps = [group["step"] for group in run.groups]
    ends = [bisect_right(steps, row["step"]) for row in run.metrics]
    return [*ends[:-1], len(run.groups)]


def _snapshot(
    run: RunDirectory, row: Row, seconds: float, closed: list[Row], recent: list[Row]
) -> LiveState:
    bound = run.setting("staleness.max_lag")
    spans = [
        group["shipped_version"] - group["opened_version"]
        for group in recent
        if group["end"] == "shipped"
    ]
    last_step = row is run.metrics[-1]
    removed = row is run.metrics[0] and row["step"]
    waited = row.get("wait/learner_s")
    return LiveState(
        time_s=seconds,
        run_name=run.name,
        phase="done" if last_step else "training",
        step=int(row["step"]) + 1,  # the number of steps taken, as in a live state
        steps=int(run.setting("run.steps") or run.num_steps),
        policy_version=int(row.get("policy_version", 0)),
        max_lag=int(bound) if is_number(bound) else max(spans, default=0),
        waiting=f"the records begin at step {removed}: older ones were removed"
        if removed
        else f"the learner waited {waited:.1f} s in this step"
        if is_number(waited)
        else "",
        groups_open=0,
        groups_ready=0,
        bytes_held=0,
        refused_frames=int(row.get("wire/refused_frames", 0)),
        histogram_edges=HISTOGRAM_EDGES,
        histogram=_histogram(recent),
        lags=spans,
        metrics={key: float(value) for key, value in row.items() if is_number(value)},
        groups=[_group_view(group) for group in closed],
        engines=[],
        prompts=_prompt_views(recent),
    )


def _histogram(groups: list[Row]) -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    for group in groups:
        for rollout in _rollouts(group):
            place = max(0, bisect_right(HISTOGRAM_EDGES, rollout["tokens"]) - 1)
            counts.setdefault(rollout["end"], [0] * len(HISTOGRAM_EDGES))[place] += 1
    return counts


def _group_view(group: Row) -> GroupView:
    shorts = [
        rollout["tokens"] for rollout in _rollouts(group) if rollout["end"] == "selected_short"
    ]
    views = [
        RolloutView(
            rollout_id=rollout.get("rollout_id", place),
            tokens=rollout["tokens"],
            state=rollout["end"],
        )
        for place, rollout in enumerate(_rollouts(group))
    ]
    return GroupView(
        group_id=group.get("group_id", 0),
        prompt_id=str(group["prompt_id"]),
        long_end=str(group.get("long_end", "")),
        budget=group["budget"],
        short_cutoff=max(shorts, default=0),
        rollouts=views,
    )


def _prompt_views(groups: list[Row]) -> list[PromptView]:
    views: dict[str, PromptView] = {}
    for group in groups:
        ended = [rollout for rollout in _rollouts(group) if is_number(rollout.get("reward"))]
        right = [rollout["tokens"] for rollout in ended if rollout["reward"] > 0.5]
        wrong = [rollout["tokens"] for rollout in ended if rollout["reward"] <= 0.5]
        if ended:
            logs = [log(max(length, 1)) for length in right + wrong]
            views[str(group["prompt_id"])] = PromptView(
                prompt_id=str(group["prompt_id"]),
                # Without cancelled responses, so lower than the spread that the buffer computes.
                spread=pstdev(logs),
                budget=group["budget"],
                pass_rate=fmean(rollout["reward"] > 0.5 for rollout in ended),
                lengths_right=right,
                lengths_wrong=wrong,
                num_cancelled=sum(r["end"] == "cancelled" for r in _rollouts(group)),
            )
    return list(views.values())


def _rollouts(group: Row) -> list[Row]:
    return [
        rollout
        for rollout in group["rollouts"]
        if isinstance(rollout.get("tokens"), int) and isinstance(rollout.get("end"), str)
    ]
