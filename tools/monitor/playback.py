"""Plays a run's ledger back as live states, one learner step after the other.

Owns the pace, and reads only the run's directory. The ledger records how each rollout ended, not
how it grew, so a step shows its groups as they ended, and no engines. Driven by
`tools.tail_monitor --play`.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from math import log
from pathlib import Path
from statistics import fmean, pstdev

from buffer.records.metrics import HISTOGRAM_EDGES
from buffer.wire.messages import GroupView, LiveState, PromptView, RolloutView
from tools.reporting.run_directory import Row, RunDirectory, is_number

WINDOW_GROUPS = 64  # number of recent groups in the histogram, the prompts and the lags
STEPS_PER_S = 2.0


class Replay:
    """A finished run as a source of live states, in place of the `MonitorLink` of a live run.

    A `speed` of 1 plays `STEPS_PER_S` learner steps per second.
    """

    def __init__(self, run_dir: Path) -> None:
        self._snapshots = snapshots(RunDirectory.read(run_dir))
        self.speed = 1.0
        self.held = False
        self._next = 0
        self._due_s = time.monotonic()

    def receive(self, timeout_s: float) -> LiveState | None:
        """The state of the next step, or None if none is due within `timeout_s`."""
        now = time.monotonic()
        if self.held or self._next == len(self._snapshots) or self._due_s > now + timeout_s:
            time.sleep(timeout_s)
            return None
        time.sleep(max(0.0, self._due_s - now))
        self._due_s = max(self._due_s, now) + 1 / (STEPS_PER_S * self.speed)
        self._next += 1
        return self._snapshots[self._next - 1]

    def last(self) -> LiveState:
        return self._snapshots[-1]

    def ended(self) -> bool:
        return self._next == len(self._snapshots)

    def close(self) -> None:
        """Does nothing, because no resource is held open."""


def snapshots(run: RunDirectory) -> list[LiveState]:
    """One state per recorded step. Raises `ValueError` without metrics.jsonl or groups.jsonl."""
    if not run.metrics or not run.groups:
        raise ValueError(f"{run.path} cannot be played: {' '.join(run.problems)}")
    frames, first = [], 0
    for row, seconds, last in zip(run.metrics, run.seconds(), _ends_of_steps(run), strict=True):
        frames.append(
            _snapshot(
                run,
                row,
                seconds,
                run.groups[first:last],
                run.groups[max(0, last - WINDOW_GROUPS) : last],
            )
        )
        first = last
    return frames


def _ends_of_steps(run: RunDirectory) -> list[int]:
    """For each row of metrics, the number of ledger rows up to the end of its step.

    The ledger is in order, and every step trains on the same number of groups.
    """
    per_step = run.setting("batch.groups") or max(
        1, round(len(run.trained_groups()) / len(run.metrics))
    )
    shipped = [place + 1 for place, group in enumerate(run.groups) if group["end"] == "shipped"]
    ends = [
        shipped[min((step + 1) * per_step, len(shipped)) - 1] if shipped else 0
        for step in range(len(run.metrics))
    ]
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
    return LiveState(
        time_s=seconds,
        run_name=run.name,
        phase="done" if last_step else "training",
        step=int(row["step"]),
        steps=int(run.setting("run.steps") or len(run.metrics)),
        policy_version=int(row.get("policy_version", 0)),
        max_lag=int(bound) if is_number(bound) else max(spans, default=0),
        waiting=f"the learner waited {row['wait/learner_s']:.1f} s in this step"
        if is_number(row.get("wait/learner_s"))
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
            )
    return list(views.values())


def _rollouts(group: Row) -> list[Row]:
    return [
        rollout
        for rollout in group["rollouts"]
        if isinstance(rollout.get("tokens"), int) and isinstance(rollout.get("end"), str)
    ]
