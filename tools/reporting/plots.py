"""The figures of a run's report.

Each is a function from a `RunDirectory` to inline SVG, or to "" if its data is missing. This module
only draws; it neither reads nor writes files. Driven by `tools.report`.
"""

from __future__ import annotations

import io
import itertools
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tools.reporting.ends import ENDS
from tools.reporting.run_directory import Row, RunDirectory, is_number

INK, MUTED, GRID = "#1d2733", "#5d6b7a", "#e6eaee"
BLUE, TEAL, AMBER, RED, VIOLET = "#3d5bd9", "#12876f", "#e3a11f", "#d5482b", "#8a4bb0"
STYLE: Any = {  # matplotlib types its keys as literals
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK,
    "axes.labelcolor": MUTED, "axes.edgecolor": "#b9c2cc",
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 9, "axes.titlecolor": INK,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.9,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "xtick.major.size": 3, "ytick.major.size": 0,
    "legend.frameon": False, "legend.fontsize": 8.5,
    "lines.linewidth": 1.9, "lines.solid_capstyle": "round", "svg.fonttype": "path",
}  # fmt: skip
GROUPS_SHOWN = 8
HELD_OUT = {"eval/accuracy": "accuracy", "eval/reward_mean": "mean reward"}
WAITS = {
    "wait/learner_s": "learner, for groups",
    "wait/pull_s": "learner, from request to receipt",
}


def outcome(run: RunDirectory) -> str:
    """Held-out and training reward, over learner steps and over wall time."""
    if not run.series(run.held_out)[0] and not run.series("reward/mean")[0]:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, (by_step, by_time) = _figure(1, 2, height=3.1, sharey=True)
        minute = {
            row["step"]: seconds / 60
            for row, seconds in zip(run.metrics, run.seconds(), strict=True)
        }
        rewards, accuracies = run.series("reward/mean"), evaluations(run)
        for axis, clock in ((by_step, lambda step: step), (by_time, lambda step: minute[step])):
            x, y = [clock(step) for step in rewards[0]], rewards[1]
            axis.plot(x, y, color=BLUE, alpha=0.28, linewidth=1)
            axis.plot(
                x,
                _smooth(y),
                color=BLUE,
                label="reward of the trained groups (and its running mean)",
            )
        by_step.plot(
            [step for step, _, _ in accuracies],
            [value for _, _, value in accuracies],
            "o-",
            color=TEAL,
            markersize=4.5,
        )
        by_time.plot(
            [minute[row] for _, row, _ in accuracies],
            [value for _, _, value in accuracies],
            "o-",
            color=TEAL,
            markersize=4.5,
            label=f"{HELD_OUT[run.held_out]} on held-out prompts",
        )
        values = rewards[1] + [value for _, _, value in accuracies]
        if min(values) >= 0 and max(values) <= 1:
            by_step.set_ylim(0, 1.02)
        by_step.set(title="Over learner steps", xlabel="learner step")
        by_time.set(title="Over wall time", xlabel="minutes since the run began")
        _legend_above(figure, *by_time.get_legend_handles_labels())
        return _svg(figure, "Held-out and training reward over learner steps and over wall time")


def lengths(run: RunDirectory) -> str:
    """Quantile bands of generated and selected lengths over learner steps."""
    kinds = [kind for kind in ("generated", "selected") if run.series(f"length/{kind}_p50")[0]]
    if not kinds:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(1, 2, height=3.1, sharey=True)
        for axis, kind, color, title in zip(
            axes,
            ("generated", "selected"),
            (AMBER, BLUE),
            ("Generated responses", "Selected responses"),
            strict=True,
        ):
            quantiles = {
                name: run.series(f"length/{kind}_{name}")
                for name in ("mean", "p50", "p90", "p99", "max")
            }
            for (low, high), alpha in zip(
                itertools.pairwise(("p50", "p90", "p99", "max")), (0.38, 0.22, 0.1), strict=True
            ):
                (x, below), (also_x, above) = quantiles[low], quantiles[high]
                if x and x == also_x:
                    axis.fill_between(
                        x,
                        below,
                        above,
                        color=color,
                        alpha=alpha,
                        linewidth=0,
                        label=f"{low} to {high}",
                    )
            axis.plot(*quantiles["p50"], color=color, label="median")
            axis.plot(
                *quantiles["mean"], color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label="mean"
            )
            axis.set(title=title, xlabel="learner step")
        _log_lengths(
            axes[0], [value for kind in kinds for value in run.series(f"length/{kind}_max")[1]]
        )
        axes[0].set_ylabel("sampled tokens in a response")
        handles, labels = axes[kinds[0] == "selected"].get_legend_handles_labels()
        _legend_above(figure, handles, labels)
        return _svg(
            figure, "Quantiles of generated and selected response lengths over learner steps"
        )


def prompts(run: RunDirectory) -> str:
    """Every response of the first and the last trained groups, coloured by its end."""
    groups = run.trained_groups()
    if not groups:
        return ""
    shown = min(GROUPS_SHOWN, (len(groups) + 1) // 2)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(1, 2, height=3.5, sharey=True)
        for axis, part, title in zip(
            axes,
            (groups[:shown], groups[-shown:]),
            ("The first groups", "The last groups"),
            strict=True,
        ):
            for place, group in enumerate(part):
                _draw_group(axis, place, group)
            axis.set(
                title=title,
                xlim=(-0.6, shown - 0.4),
                xlabel="prompt (filled: reward above ½; hollow: lower, or not scored)",
            )
            axis.set_xticks(
                range(len(part)),
                [_shortened(str(group["prompt_id"])) for group in part],
                fontsize=7.5,
            )
        _log_lengths(
            axes[0],
            [
                rollout["tokens"]
                for group in groups[:shown] + groups[-shown:]
                for rollout in rollouts(group)
            ],
        )
        axes[0].set_ylabel("sampled tokens in a response")
        handles = [
            Line2D([], [], marker="o", linestyle="", color=end.on_paper, label=end.label)
            for end in ENDS.values()
        ]
        _legend_above(figure, handles, [str(handle.get_label()) for handle in handles])
        return _svg(figure, "Response lengths of the first and the last groups, by end")


def tokens(run: RunDirectory) -> str:
    """Cumulative use of the generated tokens, and the redundancy that was spent and cancelled."""
    kinds = {
        "trained": TEAL,
        "without_signal": VIOLET,
        "discarded": AMBER,
        "cancelled": ENDS["cancelled"].on_paper,
    }
    columns = {kind: run.series(f"tokens/{kind}") for kind in kinds}
    steps = columns["trained"][0]
    if not steps or any(column[0] != steps for column in columns.values()):
        return ""
    with matplotlib.rc_context(STYLE):
        figure, (areas, fractions, budgets) = _figure(1, 3, height=2.9, widths=(1.7, 1, 1))
        heights = [columns[kind][1] for kind in kinds]
        areas.stackplot(
            steps,
            heights,
            colors=list(kinds.values()),
            labels=[kind.replace("_", " ") for kind in kinds],
            alpha=0.85,
            linewidth=0,
        )
        areas.plot(
            *run.series("tokens/generated"),
            color=INK,
            linewidth=1.1,
            linestyle=(0, (4, 2)),
            label="generated",
        )
        areas.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        areas.set(title="Cumulative tokens by use", xlabel="learner step")
        areas.legend(loc="upper left", reverse=True)
        for key, color, label in (
            ("cancelled", RED, "rollouts cancelled"),
            ("pruned", VIOLET, "groups pruned"),
            ("uniform", INK, "groups without signal"),
        ):
            x, y = run.series(f"darts/{key}_frac")
            fractions.plot(x, [100 * value for value in y], color=color, linewidth=1.4, label=label)
        fractions.set(
            title="Cancelled, pruned, without signal", xlabel="learner step", ylabel="% of the step"
        )
        fractions.set_ylim(0, max(fractions.get_ylim()[1] * 1.3, 1))  # room for the legend
        fractions.legend(loc="upper left")
        budgets.plot(
            *run.series("darts/budget_mean"), color=BLUE, linewidth=1.4, label="mean budget M′"
        )
        size = run.setting("darts.group_size")
        if is_number(size):
            budgets.axhline(
                size,
                color=INK,
                linestyle=(0, (3, 2)),
                linewidth=1.2,
                label=f"trained on, M = {size}",
            )
        budgets.set(title="Mean budget", xlabel="learner step", ylabel="rollouts per group")
        low, high = budgets.get_ylim()
        budgets.set_ylim(max(0, low - 0.5), high + 0.35 * (high - low))
        budgets.legend(loc="upper left")
        return _svg(figure, "Cumulative tokens by use, and budgets over learner steps")


def lag(run: RunDirectory) -> str:
    """Staleness against its bound: exact per step, and per group from opening to shipping."""
    bound = run.setting("staleness.max_lag")
    spans = [group["shipped_version"] - group["opened_version"] for group in run.trained_groups()]
    if not spans and not run.series("lag/max")[0]:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, (histogram, by_step) = _figure(1, 2, height=2.8)
        edge = max([*spans, bound if is_number(bound) else 0])
        counts = [spans.count(span) for span in range(int(edge) + 1)]
        histogram.bar(range(len(counts)), counts, color=BLUE, width=0.82, alpha=0.85)
        histogram.set(
            title="Trained groups",
            xlabel="versions published from opening to shipping",
            ylabel="groups",
        )
        by_step.plot(*run.series("lag/max"), color=RED, drawstyle="steps-mid", label="largest")
        by_step.plot(*run.series("lag/mean"), color=BLUE, label="mean")
        by_step.set(
            title="Trained trajectories, by their oldest token",
            xlabel="learner step",
            ylabel="lag, policy versions",
        )
        if is_number(bound):
            histogram.axvline(bound + 0.5, color=INK, linestyle=(0, (3, 2)), linewidth=1.2)
            histogram.set_xlim(right=edge + 1.4)
            histogram.text(
                bound + 0.58, max(counts, default=0), f"bound {bound}", va="top", fontsize=8.5
            )
            by_step.axhline(
                bound, color=INK, linestyle=(0, (3, 2)), linewidth=1.2, label=f"bound {bound}"
            )
        by_step.set_ylim(bottom=0)
        histogram.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_step.yaxis.set_major_locator(MaxNLocator(integer=True))
        by_step.legend(loc="best", ncols=3)
        return _svg(figure, "Lag against its bound")


def waits(run: RunDirectory) -> str:
    """Seconds of waiting per step, the share of waiting, and the share of busy engine slots."""
    waiting = sorted(
        {
            key
            for row in run.metrics
            for key in row
            if key.startswith("wait/") and key.endswith("_s")
        }
    )
    if not waiting:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, (seconds, shares) = _figure(1, 2, height=2.8)
        # Both sides of a wait may record it, so these are lines to compare, not parts to add.
        for key, color in zip(
            waiting, itertools.cycle((RED, BLUE, AMBER, VIOLET, TEAL)), strict=False
        ):
            seconds.plot(
                *run.series(key),
                color=color,
                linewidth=1.5,
                label=WAITS.get(key, key[len("wait/") : -len("_s")].replace("_", " ")),
            )
        seconds.set(title="Waiting, per step", xlabel="learner step", ylabel="seconds")
        seconds.set_ylim(0, max(seconds.get_ylim()[1] * 1.25, 0.01))
        seconds.legend(loc="best")
        for key, color, label in (
            ("wait/learner_frac", RED, "learner waiting"),
            ("engine/busy_frac", TEAL, "engine slots busy"),
        ):
            x, y = run.series(key)
            shares.plot(x, [100 * value for value in y], color=color, label=label)
        shares.set(title="Shares of time", xlabel="learner step", ylabel="%", ylim=(0, 104))
        shares.legend(loc="best")
        return _svg(figure, "Waiting times and shares of time")


def health(run: RunDirectory) -> str:
    """Small plots of the metrics that distinguish a healthy run from a failing one."""
    names = {
        "train/loss": "loss", "train/grad_norm": "gradient norm",
        "train/entropy": "entropy, nats per token",
        "train/clip_frac": "tokens clipped", "train/tis_clip_frac": "importance weights capped",
        "train/logprob_diff": "|learner − actor| log-prob",
        "engine/tokens_per_s": "generated tokens/s", "train/tokens_per_s": "trained tokens/s",
        "cancel/freed_p50_ms": "cancel to free slot, median ms",
        "publish/swap_pause_s": "pause for a weight swap, s",
        "verifier/time_s_mean": "verification, s",
        "verifier/queue_mean": "responses waiting for a verifier",
        "memory/learner_peak_bytes": "learner's peak memory, bytes",
        "memory/buffer_peak_bytes": "buffer's peak memory, bytes",
    }  # fmt: skip
    known = [key for key in names if run.series(key)[0]]
    if not known:
        return ""
    with matplotlib.rc_context(STYLE | {"axes.titlesize": 9, "axes.titleweight": "normal"}):
        figure, axes = _figure(-(-len(known) // 4), 4, height=1.75 * -(-len(known) // 4))
        for axis, key in zip(axes, known, strict=False):
            x, y = run.series(key)
            axis.plot(x, y, color=BLUE, alpha=0.28, linewidth=1)
            axis.plot(x, _smooth(y), color=BLUE, linewidth=1.6)
            axis.set_title(names[key])
            axis.yaxis.set_major_locator(MaxNLocator(4))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        for axis in axes[len(known) :]:
            axis.set_visible(False)
        return _svg(figure, "Health of the run over learner steps")


FIGURES = {
    "outcome": outcome,
    "lengths": lengths,
    "prompts": prompts,
    "tokens": tokens,
    "lag": lag,
    "waits": waits,
    "health": health,
}


def evaluations(run: RunDirectory) -> list[tuple[float, float, float]]:
    """(step of the policy evaluated, step whose row reports it, result), in order.

    The result is `run.held_out`: an accuracy or a mean reward.
    """
    rows = [row for row in run.metrics if is_number(row.get(run.held_out))]
    return [
        (
            row["eval/step"] if is_number(row.get("eval/step")) else row["step"],
            row["step"],
            row[run.held_out],
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


def compact(value: float) -> str:
    """1234567 -> '1.23M', three significant digits."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _draw_group(axis: Axes, place: int, group: Row) -> None:
    ended = sorted(rollouts(group), key=lambda rollout: rollout["tokens"])
    if not ended:
        return
    axis.plot(
        [place, place],
        [max(ended[0]["tokens"], 1), max(ended[-1]["tokens"], 1)],
        color="#d3dae1",
        linewidth=5,
        zorder=1,
    )
    for order, rollout in enumerate(ended):
        color = ENDS[rollout["end"]].on_paper
        right = is_number(rollout.get("reward")) and rollout["reward"] > 0.5
        offset = ((order % 3) - 1) * 0.17  # otherwise similar lengths would overlap
        fill = color if right else "white"
        axis.scatter(
            place + offset,
            max(rollout["tokens"], 1),
            s=21,
            facecolor=fill,
            edgecolor=color,
            linewidth=1.3,
            zorder=2,
        )


def _figure(
    rows: int,
    columns: int,
    height: float,
    sharey: bool = False,
    widths: tuple[float, ...] | None = None,
) -> tuple[Figure, list[Axes]]:
    figure = Figure(
        figsize=(10.4, height), layout=ConstrainedLayoutEngine(wspace=0.045, hspace=0.08)
    )
    return figure, list(
        figure.subplots(rows, columns, squeeze=False, sharey=sharey, width_ratios=widths).flat
    )


def _legend_above(figure: Figure, handles: list, labels: list[str]) -> None:
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=len(labels),
        columnspacing=1.6,
        handletextpad=0.5,
    )


def _log_lengths(axis: Axes, values: list[float]) -> None:
    axis.set_yscale("log", base=2)
    axis.set_ylim(
        bottom=max(min((value for value in values if value > 0), default=1) * 0.5, 0.8)
        if axis.get_ylim()[0] <= 1
        else None
    )
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _shortened(prompt_id: str) -> str:
    return prompt_id if len(prompt_id) <= 8 else prompt_id[:6] + "…"


def _smooth(values: list[float]) -> np.ndarray:
    """Centred running mean over a fifteenth of the run, at least three values."""
    width = max(3, len(values) // 15) | 1
    weights = np.convolve(np.ones(len(values)), np.ones(width), mode="same")
    return (
        np.convolve(values, np.ones(width), mode="same") / weights
        if len(values) >= width
        else np.asarray(values)
    )


def _svg(figure: Figure, title: str) -> str:
    stream = io.StringIO()
    # The same run gives the same bytes, and ids do not collide within one page.
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
