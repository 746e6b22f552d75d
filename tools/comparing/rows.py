"""The rows of a comparison: a live run in the format of a simulation, and averages over seeds.

Pure, except that live runs are read from their files. Driven by `tools.compare`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from buffer.records.row_segments import begins_at
from tools.comparing.page import KIND, columns
from tools.reporting.intervals import half_width
from tools.reporting.run_directory import EVALUATIONS, Row, RunDirectory


def summarise(run: RunDirectory) -> Row:
    """A finished and judged run in the format of a simulation's summary, without the first step.

    `curve` has one entry per judged checkpoint: the seconds until it was saved, its held-out
    reward, the number of steps, and the tokens generated for training by then.
    """
    if len(run.metrics) < 2:
        raise ValueError(
            f"{run.path}: {len(run.metrics)} steps recorded; a comparison needs at least two"
        )
    if first := max(begins_at(run.metrics), begins_at(run.groups)):
        raise ValueError(
            f"{run.path}: its records begin at step {first}; a comparison needs all of them, so "
            "raise buffer.keep_row_bytes"
        )
    seconds, last = run.seconds(), run.metrics[-1]
    selected = sorted(
        r["tokens"]
        for group in run.trained_groups()
        for r in group["rollouts"]
        if r["end"].startswith("selected")
    )
    took_s = seconds[-1] - seconds[0]
    judged = [json.loads(line) for line in (run.path / EVALUATIONS).read_text().splitlines()]
    return {
        "step_s": took_s / (len(seconds) - 1),
        "emulated": run.emulated,
        **{name: last[name] for name in last if name.startswith("tokens/")},
        "busy_frac": _mean(run, "engine/busy_frac"),
        "wait_frac": sum(run.series("wait/learner_s")[1][1:]) / took_s,
        "lag_mean": _mean(run, "lag/mean"),
        "lag_max": max(run.series("lag/max")[1]),
        "generated_mean": _mean(run, "length/generated_mean"),
        "length_mean": fmean(selected),
        "length_p50": selected[len(selected) // 2],
        "length_p99": selected[int(0.99 * len(selected))],
        "reward": _mean(run, "reward/mean"),
        "budget": _mean(run, "darts/budget_mean"),
        "curve": [
            [
                seconds[row["step"] - 1] - seconds[0],
                row["reward_mean"],
                row["step"],
                run.metrics[row["step"] - 1].get("tokens/generated", float("nan")),
            ]
            for row in judged
        ],
        "judged_reward": judged[-1]["reward_mean"],
        "judged_length_mean": judged[-1]["length_mean"],
        "judged_length_p99": judged[-1]["length_p99"],
        **_of_kinds(judged[-1]),
        "trained_s": took_s,
    }


def _of_kinds(judged: Row) -> Row:
    """The rewards and lengths of each kind of held-out prompt, by the names of their columns."""
    names = {"reward_mean": "reward", "length_mean": "length mean"}
    return {
        f"{KIND}{names[measure]} of {kind}": value
        for name, value in judged.items()
        for kind, slash, measure in [name.rpartition("/")]
        if slash and measure in names
    }


def _mean(run: RunDirectory, name: str) -> float:
    values = run.series(name)[1]
    return fmean(values) if values else float("nan")


def add_cost_to_reach(
    seeds: Sequence[int], results: list[Row], margin: float, reach: float = 0.0
) -> None:
    """Add seconds, steps and tokens until a run first reaches the held-out reward `reach`.

    With `reach` = 0 this is the final one of the reference, the first result with the same seed.
    `reach_s` counts until the reward is reached, `near_s` until it is within `margin`; between two
    checkpoints, both are interpolated. A value is absent if this never happens.
    """
    targets: dict[int, float] = {}
    for seed, row in zip(seeds, results, strict=True):
        target = targets.setdefault(seed, reach or row["judged_reward"])
        if reached := _first_at(row["curve"], target):
            row["reach_s"], _, row["reach_steps"], row["tokens/to_reach"] = reached
        if near := _first_at(row["curve"], target - margin):
            row["near_s"] = near[0]


def _first_at(curve: Sequence[Sequence[float]], reward: float) -> list[float]:
    """The point at which a curve first has the reward, or [] if it has less throughout.

    Nothing was judged before the first checkpoint, so that no point lies before it.
    """
    for before, after in pairwise([curve[0], *curve]):
        if after[1] >= reward:
            share = (reward - before[1]) / (after[1] - before[1]) if before[1] < reward else 1.0
            return [a + share * (b - a) for a, b in zip(before, after, strict=True)]
    return []


# Table --------------------------------------------------------------------------------------------


def table(by_variant: dict[str, list[Row]], margin: float) -> list[Row]:
    """One row per variant: means over seeds with 95 % intervals, and the verdict.

    `half_widths` has half of the width of an interval by column, if there are several seeds.
    """
    reference = next(iter(by_variant.values()))
    shown = columns([result for results in by_variant.values() for result in results])
    rows = []
    for name, results in by_variant.items():
        row: Row = {"variant": name, "half_widths": {}}
        for column in shown:
            values = [result[column] for result in results if column in result]
            if len(values) == len(results):
                row[column] = fmean(values)
                row["half_widths"][column] = half_width(values)
        ratios = [
            base["step_s"] / result["step_s"]
            for base, result in zip(reference, results, strict=True)
        ]
        row["time_ratio"], row["time_ratio_range"] = fmean(ratios), [min(ratios), max(ratios)]
        row["half_widths"]["time_ratio"] = half_width(ratios)
        row["verdict"] = verdict(row, rows[0] if rows else row, margin)
        rows.append(row)
    return rows


def verdict(row: Row, reference: Row, margin: float) -> str:
    """The speedup, or the reason why none is claimed."""
    if row is reference:
        return "reference"
    half = row["half_widths"]["time_ratio"]
    ratio = f"{row['time_ratio']:.2f}x" + (f" ± {half:.2f}" if half else "")
    if "judged_reward" not in row or "judged_reward" not in reference:
        return f"{ratio} in time; held-out reward not modelled"
    difference = row["judged_reward"] - reference["judged_reward"]
    if difference < -margin:
        return f"no speedup claimed: held-out reward {difference:+.3f}"
    if half and abs(row["time_ratio"] - 1.0) <= half:
        return f"no speedup claimed: {ratio} in time does not tell the seeds' spread from a gain"
    better = f", held-out reward {difference:+.3f}" if difference > margin else ""
    return f"{ratio} speedup{better}"
