"""The figures of a run's report about its outcome: rewards, lengths, prompts.

Each is a function from a `RunDirectory` to HTML, or to "" if its data is missing. This module only
draws; it neither reads nor writes files. `FIGURES` has those of `cost_plots`, too. Driven by
`tools.report`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from tools.reporting import cost_plots
from tools.reporting.ends import ENDS
from tools.reporting.panels import (
    AMBER,
    BLUE,
    DASHED,
    INK,
    PALE_BLUE,
    TEAL,
    Panels,
    log_lengths,
    smooth,
)
from tools.reporting.run_directory import Row, RunDirectory, is_number

GROUPS_SHOWN = 8
HELD_OUT = {"eval/accuracy": "accuracy", "eval/reward_mean": "mean reward"}


def outcome(run: RunDirectory) -> str:
    """Held-out and training reward, over learner steps and over wall time."""
    rewards, held_out = run.series("reward/mean"), evaluations(run)
    if not held_out and not rewards[0]:
        return ""
    panels = Panels("outcome", "Over learner steps", "Over wall time")
    minute = {
        row["step"]: seconds / 60 for row, seconds in zip(run.metrics, run.seconds(), strict=True)
    }
    reward, result = "reward of the trained groups", f"{HELD_OUT[run.held_out]}, held-out prompts"
    by_step = ([*rewards[0]], [step for step, _, _ in held_out])
    by_time = ([minute[step] for step in rewards[0]], [minute[row] for _, row, _ in held_out])
    for panel, (of_rewards, of_results) in enumerate((by_step, by_time)):
        panels.line(panel, of_rewards, rewards[1], reward, PALE_BLUE, linewidth=1.2)
        panels.line(panel, of_rewards, smooth(rewards[1]), f"{reward}, running mean", BLUE)
        values = [value for _, _, value in held_out]
        panels.line(panel, of_results, values, result, TEAL, marker="o", markersize=4.5)
    every = rewards[1] + [value for _, _, value in held_out]
    if min(every) >= 0 and max(every) <= 1:
        panels.axes[0].set_ylim(0, 1.02)
    panels.share_y()
    panels.axes[0].set_xlabel("learner step")
    panels.axes[1].set_xlabel("minutes since the run began")
    return panels.render()


def lengths(run: RunDirectory) -> str:
    """Quantile bands of generated and selected lengths over learner steps."""
    kinds = {"generated": AMBER, "selected": BLUE}
    if not any(run.series(f"length/{kind}_p50")[0] for kind in kinds):
        return ""
    panels = Panels("lengths", "Generated responses", "Selected responses")
    names = ("mean", "p50", "p90", "p99", "max")
    for panel, (kind, color) in enumerate(kinds.items()):
        quantiles = {name: run.series(f"length/{kind}_{name}") for name in names}
        if not quantiles["p50"][0]:
            continue
        for (low, high), alpha in zip(
            itertools.pairwise(names[1:]), (0.38, 0.22, 0.1), strict=True
        ):
            (x, below), (also_x, above) = quantiles[low], quantiles[high]
            if x and x == also_x:
                panels.band(panel, x, below, above, f"up to {high}", color, alpha=alpha)
        panels.line(panel, *quantiles["p50"], "median", color)
        panels.line(panel, *quantiles["mean"], "mean", INK, linewidth=1.2, linestyle=DASHED)
    values = [value for kind in kinds for value in run.series(f"length/{kind}_max")[1]]
    for axis in panels.axes:
        log_lengths(axis, values)
        axis.set(xlabel="learner step", ylabel="sampled tokens")
    panels.share_y()
    return panels.render()


def prompts(run: RunDirectory) -> str:
    """Every response of the first and the last trained groups, coloured by its end."""
    groups = run.trained_groups()
    if not groups:
        return ""
    num = min(GROUPS_SHOWN, (len(groups) + 1) // 2)
    panels = Panels("prompts", "The first groups", "The last groups", height=3.2)
    parts = (groups[:num], groups[-num:])
    values = [rollout["tokens"] for part in parts for group in part for rollout in rollouts(group)]
    for panel, part in enumerate(parts):
        _draw_groups(panels, panel, part)
        axis = panels.axes[panel]
        axis.set(xlim=(-0.6, num - 0.4), xlabel="prompt", ylabel="sampled tokens")
        names = [_shortened(str(group["prompt_id"])) for group in part]
        axis.set_xticks(range(len(part)), names, fontsize=6.5)
        log_lengths(axis, values)
    panels.share_y()
    return panels.render()


FIGURES: dict[str, Callable[[RunDirectory], str]] = {
    "outcome": outcome,
    "lengths": lengths,
    "prompts": prompts,
    "tokens": cost_plots.tokens,
    "lag": cost_plots.lag,
    "waits": cost_plots.waits,
    "health": cost_plots.health,
}


def evaluations(run: RunDirectory) -> list[tuple[float, float, float]]:
    """(step of the policy evaluated, step whose row reports it, result), in order.

    The result is `run.held_out`: an accuracy or a mean reward.
    """
    held_out = run.held_out  # once: it reads every row
    rows = [row for row in run.metrics if is_number(row.get(held_out))]
    return [
        (
            row["eval/step"] if is_number(row.get("eval/step")) else row["step"],
            row["step"],
            row[held_out],
        )
        for row in rows
    ]


def rollouts(group: Row) -> list[Row]:
    """The rollouts of a ledger row that have a length and a known end."""
    return [
        rollout
        for rollout in group["rollouts"]
        if rollout.get("end") in ENDS and is_number(rollout.get("tokens"))
    ]


def _draw_groups(panels: Panels, panel: int, groups: list[Row]) -> None:
    """A bar from the shortest to the longest response of each group, and a dot for each."""
    axis = panels.axes[panel]
    dots: dict[str, list[tuple[float, Row]]] = {}
    for place, group in enumerate(groups):
        ended = sorted(rollouts(group), key=lambda rollout: rollout["tokens"])
        if not ended:
            continue
        ends = [max(ended[i]["tokens"], 1) for i in (0, -1)]
        (bar,) = axis.plot([place, place], ends, color="#d3dae1", linewidth=5, zorder=1)
        bar.set_gid(f"prompts-{panel}-bar-{place}")
        for order, rollout in enumerate(ended):
            offset = ((order % 3) - 1) * 0.17  # otherwise similar lengths would overlap
            dots.setdefault(rollout["end"], []).append((place + offset, rollout))
    for end, of_end in dots.items():
        color = ENDS[end].on_paper
        x = [place for place, _ in of_end]
        y = [max(rollout["tokens"], 1) for _, rollout in of_end]
        fill = np.array([color if _right(rollout) else "#ffffff" for _, rollout in of_end])
        artist = axis.scatter(x, y, s=21, facecolor=fill, edgecolor=color, linewidth=1.3, zorder=2)
        texts = [_told(rollout) for _, rollout in of_end]
        panels.add(panel, [artist], ENDS[end].label, color, x=x, y=y, texts=texts)


def _right(rollout: Row) -> bool:
    return is_number(rollout.get("reward")) and rollout["reward"] > 0.5


def _told(rollout: Row) -> str:
    reward = f", reward {rollout['reward']:g}" if is_number(rollout.get("reward")) else ""
    return f"{ENDS[rollout['end']].label}: {rollout['tokens']} tokens{reward}"


def _shortened(prompt_id: str) -> str:
    return prompt_id if len(prompt_id) <= 7 else prompt_id[:6] + "…"
