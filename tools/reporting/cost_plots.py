"""The figures of a run's report about its cost: tokens, lag, waits, health.

Each is a function from a `RunDirectory` to HTML, or to "" if its data is missing. This module only
draws. Driven by `tools.report` through `tools.reporting.plots.FIGURES`.
"""

from __future__ import annotations

import itertools

from tools.reporting.ends import ENDS
from tools.reporting.panels import (
    AMBER,
    BLUE,
    DASHED,
    INK,
    PALE_BLUE,
    RED,
    TEAL,
    VIOLET,
    Panels,
    compact_ticks,
    smooth,
    whole_numbers,
    without_start,
)
from tools.reporting.run_directory import RunDirectory, is_number

USES = {
    "trained": TEAL,
    "without_signal": VIOLET,
    "discarded": AMBER,
    "cancelled": ENDS["cancelled"].on_paper,
}
FRACTIONS = {
    "cancelled": (RED, "rollouts cancelled"),
    "pruned": (VIOLET, "groups pruned"),
    "uniform": (INK, "groups without signal"),
}
WAITS = {
    "wait/learner_s": "learner, for groups",
    "wait/pull_s": "learner, from request to receipt",
}
HEALTH = {
    "train/loss": "Loss", "train/grad_norm": "Gradient norm",
    "train/entropy": "Entropy, nats per token",
    "train/clip_frac": "Tokens clipped", "train/tis_clip_frac": "Importance weights capped",
    "train/logprob_diff": "|learner − actor| log-prob",
    "engine/tokens_per_s": "Generated tokens/s", "train/tokens_per_s": "Trained tokens/s",
    "cancel/freed_p50_ms": "Cancel to free slot, median ms",
    "publish/swap_pause_s": "Pause for a weight swap, s",
    "verifier/time_s_mean": "Verification, s",
    "verifier/queue_mean": "Responses waiting for a verifier",
    "memory/learner_peak_bytes": "Learner's peak memory, bytes",
    "memory/buffer_peak_bytes": "Buffer's peak memory, bytes",
}  # fmt: skip


def tokens(run: RunDirectory) -> str:
    """Cumulative use of the generated tokens, and the redundancy that was spent and cancelled."""
    columns = {kind: run.series(f"tokens/{kind}") for kind in USES}
    columns = {kind: column for kind, column in columns.items() if column[0]}
    steps = run.series("tokens/trained")[0]
    if not steps or any(column[0] != steps for column in columns.values()):
        return ""
    titles = ("Cumulative tokens by use", "Shares of a step", "Mean budget")
    panels = Panels("tokens", *titles, columns=3, width=3.8, height=2.9)
    below = [0.0] * len(steps)
    for kind, (_, values) in columns.items():
        above = [low + value for low, value in zip(below, values, strict=True)]
        name = kind.replace("_", " ")
        panels.band(0, steps, below, above, name, USES[kind], alpha=0.85, read=values)
        below = above
    generated = run.series("tokens/generated")
    panels.line(0, *generated, "generated", INK, linewidth=1.1, linestyle=DASHED)
    compact_ticks(panels.axes[0].yaxis)
    for key, (color, name) in FRACTIONS.items():
        x, y = run.series(f"darts/{key}_frac")
        panels.line(1, x, [100 * value for value in y], name, color, linewidth=1.4)
    panels.axes[1].set(ylabel="% of the step")
    panels.axes[1].set_ylim(0, max(panels.axes[1].get_ylim()[1], 1))
    panels.line(2, *run.series("darts/budget_mean"), "mean budget M′", BLUE, linewidth=1.4)
    size = run.setting("darts.group_size")
    if is_number(size):
        panels.level(2, size, f"trained on, M = {size}")
    panels.axes[2].set(ylabel="rollouts per group")
    panels.axes[2].set_ylim(bottom=max(0, panels.axes[2].get_ylim()[0] - 0.5))
    for axis in panels.axes:
        axis.set_xlabel("learner step")
    return panels.render()


def lag(run: RunDirectory) -> str:
    """Staleness against its bound: exact per step, and per group from opening to shipping."""
    bound = run.setting("staleness.max_lag")
    spans = [group["shipped_version"] - group["opened_version"] for group in run.trained_groups()]
    if not spans and not run.series("lag/max")[0]:
        return ""
    panels = Panels("lag", "Trained groups", "Trained trajectories, by their oldest token")
    histogram, by_step = panels.axes
    edge = int(max([*spans, bound if is_number(bound) else 0]))
    counts = [spans.count(span) for span in range(edge + 1)]
    bars = histogram.bar(range(len(counts)), counts, color=BLUE, width=0.82, alpha=0.85)
    panels.add(0, list(bars), "groups", BLUE, x=range(len(counts)), y=counts)
    histogram.set(xlabel="versions published from opening to shipping", ylabel="groups")
    panels.line(1, *run.series("lag/max"), "largest", RED, drawstyle="steps-mid")
    panels.line(1, *run.series("lag/mean"), "mean", BLUE)
    by_step.set(xlabel="learner step", ylabel="lag, policy versions")
    if is_number(bound):
        line = histogram.axvline(bound + 0.5, color=INK, linestyle=DASHED, linewidth=1.2)
        panels.add(0, [line], f"bound {bound}", INK)
        panels.level(1, bound, f"bound {bound}")
    by_step.set_ylim(bottom=0)
    whole_numbers(histogram.xaxis)
    whole_numbers(by_step.yaxis)
    return panels.render()


def waits(run: RunDirectory) -> str:
    """Seconds of waiting per step, the share of waiting, and the share of busy engine slots."""
    names = {key for row in run.metrics for key in row if key.startswith("wait/")}
    waiting = sorted(key for key in names if key.endswith("_s") and run.series(key)[0])
    if not waiting:
        return ""
    panels = Panels("waits", "Waiting, per step", "Shares of time")
    seconds, shares = panels.axes
    colors = itertools.cycle((RED, BLUE, AMBER, VIOLET, TEAL))
    # Both sides of a wait may record it, so these are lines to compare, not parts to add.
    for key, color in zip(waiting, colors, strict=False):
        name = WAITS.get(key, key[len("wait/") : -len("_s")].replace("_", " "))
        panels.line(0, *run.series(key), name, color, linewidth=1.5)
    seconds.set(xlabel="learner step", ylabel="seconds")
    seconds.set_ylim(0, max(seconds.get_ylim()[1], 0.01))
    by_step = zip(*(run.series(key)[1] for key in waiting), strict=False)
    without_start(seconds, [max(values) for values in by_step], " s")
    for key, color, name in (
        ("wait/learner_frac", RED, "learner waiting"),
        ("engine/busy_frac", TEAL, "engine slots busy"),
    ):
        x, y = run.series(key)
        panels.line(1, x, [100 * value for value in y], name, color)
    shares.set(xlabel="learner step", ylabel="%", ylim=(0, 104))
    return panels.render()


def health(run: RunDirectory) -> str:
    """Small plots of the metrics that distinguish a healthy run from a failing one."""
    known = {key: name for key, name in HEALTH.items() if run.series(key)[0]}
    if not known:
        return ""
    panels = Panels("health", *known.values(), height=2.0, width=3.6, columns=3)
    for panel, key in enumerate(known):
        x, y = run.series(key)
        panels.line(panel, x, y, "each step", PALE_BLUE, linewidth=1.2)
        panels.line(panel, x, smooth(y), "running mean", BLUE, linewidth=1.6)
        axis = panels.axes[panel]
        axis.set_xlabel("learner step")
        compact_ticks(axis.yaxis, 4)
        without_start(axis, y)
    return panels.render()
