"""A page that compares runs: their outcome on shared axes, and the settings that differ.

Compares at the last step that all of the runs have, so that a run which is still going can be
compared with a finished one. Driven by `python -m tools.report A B`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from statistics import fmean
from typing import Any

from tools.reporting.advice import RunFacts, advise
from tools.reporting.compact import compact, duration
from tools.reporting.page import page_of, section
from tools.reporting.panels import BLUE, INK, RED, TEAL, VIOLET, Panels, log_lengths, without_start
from tools.reporting.plots import HELD_OUT, evaluations
from tools.reporting.run_directory import RunDirectory

COLORS = (BLUE, RED, TEAL, VIOLET, "#e3a11f", INK, "#9aa3ad", "#b0570f")
# These differ between any two runs on one machine and have no effect on its results.
IDENTITY = {"run.name", "run.dir", "run.resume", "run.prometheus_port"}
IDENTITY |= {"buffer.address", "buffer.keys", "weights.address"}
WINDOW = 5  # steps at the end of the comparison, over which single steps are averaged
TOTALS = {
    "tokens/generated": "Tokens generated",
    "tokens/trained": "Tokens trained",
    "tokens/without_signal": "Tokens without signal",
    "tokens/discarded": "Tokens discarded",
    "tokens/cancelled": "Tokens cancelled",
}
LAST_STEPS = {
    "reward/mean": "Reward",
    "length/generated_mean": "Generated length, mean",
    "length/generated_p99": "Generated length, p99",
    "length/selected_mean": "Trained length, mean",
    "darts/budget_mean": "Budget",
    "lag/mean": "Lag, mean",
}
PLOTS = {
    "reward/mean": ("Reward of the trained groups", ""),
    "length/generated_mean": ("Generated length, mean", "sampled tokens"),
    "length/generated_p99": ("Generated length, p99", "sampled tokens"),
    "wait/learner_s": ("Learner waiting, per step", "seconds"),
    "engine/busy_frac": ("Engine slots busy", "share"),
    "lag/mean": ("Lag, mean", "policy versions"),
}


def compare(runs: Sequence[RunDirectory]) -> str:
    """The whole page. Raises `ValueError` for fewer than two runs or a run without metrics."""
    if len(runs) < 2 or len(runs) > len(COLORS):
        raise ValueError(f"{len(runs)} runs: a comparison needs 2 to {len(COLORS)}")
    for run in runs:
        if not run.metrics:
            raise ValueError(f"{run.path} has no rows in metrics.jsonl, so nothing to compare")
    names = labels(runs)
    last = min(int(run.metrics[-1]["step"]) for run in runs)
    same = [_up_to(run, last) for run in runs]
    empty = [run.path for run in same if not run.metrics]
    if empty:
        raise ValueError(f"{empty[0]} has no rows up to step {last}, the last one of another run")
    title = " and ".join(names)
    lead = f"Compared after {last + 1} steps, which all of the runs have."
    if emulated := [name for name, run in zip(names, runs, strict=True) if run.emulated]:
        lead += f" The decode latency of {', '.join(emulated)} is emulated (actors.min_step_ms)."
    body = (
        f'<header><p class="kind">Comparison</p><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(lead)}</p></header>'
        + _settings(runs, names)
        + _table("Outcome", _outcome_note(), names, outcome(same))
        + _plots(same, names)
        + _advice(same, names)
    )
    return page_of(title, body)


def _up_to(run: RunDirectory, step: int) -> RunDirectory:
    metrics = [row for row in run.metrics if row["step"] <= step]
    return replace(run, metrics=metrics, groups=[g for g in run.groups if g["step"] <= step])


def labels(runs: Sequence[RunDirectory]) -> list[str]:
    """The names of the runs, or their folders if two names are equal."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    paths = [str(run.path) for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{paths[0]}: a run is given twice; compare different runs")
    return paths


def different_settings(runs: Sequence[RunDirectory]) -> dict[str, list[Any]]:
    """The keys whose values differ, with the value of each run; None if a run lacks the key."""
    flat = [_flat(run.config) for run in runs]
    every = sorted({key for settings in flat for key in settings} - IDENTITY)
    found = {key: [settings.get(key) for settings in flat] for key in every}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}


def outcome(runs: Sequence[RunDirectory]) -> dict[str, list[float | None]]:
    """The results of the runs and their cost, as rows of numbers."""
    rows: dict[str, list[float | None]] = {}
    key = _held_out_key(runs)
    rows[f"Held-out {HELD_OUT[key]}"] = [_last(run, key) for run in runs]
    for name in ("mean", "p99"):
        rows[f"Held-out length, {name}"] = [_last(run, f"eval/length_{name}") for run in runs]
    rows["Wall time"] = [run.seconds()[-1] for run in runs]
    facts = [RunFacts.of(run) for run in runs]
    rows["Seconds per step, after the first"] = [
        one.step_s if one.steady else None for one in facts
    ]
    rows["Learner waiting, share of time"] = [one.waited for one in facts]
    rows["Engine slots busy, share"] = [one.mean("engine/busy_frac") for one in facts]
    rows |= {name: [_last(run, key) for run in runs] for key, name in TOTALS.items()}
    for key, name in LAST_STEPS.items():
        ends = [run.series(key)[1][-WINDOW:] for run in runs]
        rows[name] = [fmean(values) if values else None for values in ends]
    return {name: row for name, row in rows.items() if any(value is not None for value in row)}


def _settings(runs: Sequence[RunDirectory], names: list[str]) -> str:
    differ = different_settings(runs)
    seeds = [run.setting("run.seed") for run in runs]
    if "run.seed" in differ:
        note = f"The seeds differ: {', '.join(map(str, seeds))}."
    else:
        note = f"Every run has seed {seeds[0]}."
    num = len(differ.keys() - {"run.seed"})
    if num > 1:
        note += f" {num} other settings differ, so no difference can be ascribed to one of them."
    rows = "".join(
        f"<tr><td>{escape(key)}</td>"
        + "".join(f"<td>{escape('(no such key)' if v is None else str(v))}</td>" for v in values)
        + "</tr>"
        for key, values in differ.items()
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = f"<table><tr><th></th>{head}</tr>{rows}</table>" if rows else "<p>None differs.</p>"
    return section("Settings that differ", note, body)


def _outcome_note() -> str:
    return (
        f"Rewards, lengths, budget and lag are means over the last {WINDOW} steps. The change is "
        "relative to the first run. One run per setting does not show how much of it is chance; "
        "tools.compare repeats runs with several seeds."
    )


def _table(title: str, note: str, names: list[str], rows: dict[str, list[float | None]]) -> str:
    head = f'<th class="n">{escape(names[0])}</th>'
    head += "".join(
        f'<th class="n">{escape(name)}</th><th class="n">change</th>' for name in names[1:]
    )
    body = ""
    for name, values in rows.items():
        cells = f'<td class="n">{_shown(name, values[0])}</td>'
        for value in values[1:]:
            change = _change(values[0], value)
            cells += f'<td class="n">{_shown(name, value)}</td><td class="n">{change}</td>'
        body += f"<tr><td>{escape(name)}</td>{cells}</tr>"
    return section(title, note, f"<table><tr><th></th>{head}</tr>{body}</table>")


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return duration(value) if name.startswith("Wall time") else compact(value)


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None or before == 0:
        return "-"
    return f"{100 * (after - before) / abs(before):+.1f} %".replace("-", "−")


def _plots(runs: Sequence[RunDirectory], names: list[str]) -> str:
    body = _held_out(runs, names) + _by_step(runs, names)
    return section("Over the runs", "The same axes for all runs; each step as it was.", body)


def _held_out_key(runs: Sequence[RunDirectory]) -> str:
    """Accuracy if every run has it; else the mean reward, which an accuracy is, too."""
    return max(run.held_out for run in runs)


def _evaluated_steps(run: RunDirectory) -> dict[float, float]:
    """An evaluation belongs to the step of its policy, as in the report of one run."""
    return {row: step for step, row, _ in evaluations(run)}


def _minutes(run: RunDirectory) -> dict[float, float]:
    seconds = zip(run.metrics, run.seconds(), strict=True)
    return {row["step"]: second / 60 for row, second in seconds}


def _tokens(run: RunDirectory) -> dict[float, float]:
    return dict(zip(*run.series("tokens/generated"), strict=True))


CLOCKS = {  # the place on the axis of what the row of a step reports
    "learner step": _evaluated_steps,
    "minutes since the run began": _minutes,
    "tokens generated": _tokens,
}


def _held_out(runs: Sequence[RunDirectory], names: list[str]) -> str:
    """Held-out results over steps, wall time and tokens."""
    if not any(evaluations(run) for run in runs):
        return ""
    titles = (f"Held-out {HELD_OUT[_held_out_key(runs)]}" for _ in CLOCKS)
    panels = Panels("held-out", *titles, columns=3, width=3.8)
    for panel, (clock, at) in enumerate(CLOCKS.items()):
        for run, name, color in zip(runs, names, COLORS, strict=False):
            found = at(run)
            shown = [(found[row], value) for _, row, value in evaluations(run) if row in found]
            x, y = [place for place, _ in shown], [value for _, value in shown]
            panels.line(panel, x, y, name, color, marker="o", markersize=4)
        panels.axes[panel].set_xlabel(clock)
    panels.share_y()
    return panels.render()


def _by_step(runs: Sequence[RunDirectory], names: list[str]) -> str:
    shown = [key for key in PLOTS if any(run.series(key)[0] for run in runs)]
    if not shown:
        return ""
    panels = Panels("by-step", *(PLOTS[key][0] for key in shown), columns=3, width=3.8)
    for panel, key in enumerate(shown):
        axis = panels.axes[panel]
        for run, name, color in zip(runs, names, COLORS, strict=False):
            panels.line(panel, *run.series(key), name, color, linewidth=1.4)
        values = [run.series(key)[1] for run in runs]
        if key.startswith("length/"):
            log_lengths(axis, [value for of_run in values for value in of_run])
        elif key.startswith("wait/"):
            without_start(axis, [max(step) for step in zip(*values, strict=False)], " s")
        axis.set(xlabel="learner step", ylabel=PLOTS[key][1])
    return panels.render()


def _advice(runs: Sequence[RunDirectory], names: list[str]) -> str:
    rows = ""
    for run, name in zip(runs, names, strict=True):
        told = [f"{one.observation} {one.action}" for one in advise(RunFacts.of(run))]
        items = "".join(f"<p>{escape(text)}</p>" for text in told) or "<p>None.</p>"
        rows += f'<tr><td class="tag"><b>{escape(name)}</b></td><td>{items}</td></tr>'
    return section("Advice", "For each run by itself.", f"<table>{rows}</table>")


def _last(run: RunDirectory, key: str) -> float | None:
    values = run.series(key)[1]
    return values[-1] if values else None


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat
