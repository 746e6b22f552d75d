"""Renders the table of a comparison as Markdown, HTML and figures. Driven by `tools.compare`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from tools.reporting.run_directory import Row

COLUMNS = {
    "step_s": "s per step",
    "tokens/generated": "generated",
    "tokens/trained": "trained",
    "tokens/without_signal": "without signal",
    "tokens/discarded": "discarded",
    "tokens/cancelled": "cancelled",
    "busy_frac": "engines busy",
    "wait_frac": "learner waits",
    "lag_mean": "lag mean",
    "lag_max": "lag max",
    "generated_mean": "generated length mean",
    "length_mean": "length mean",
    "length_p50": "p50",
    "length_p99": "p99",
    "judged_length_mean": "held-out length mean",
    "judged_length_p99": "held-out p99",
    "reward": "reward",
    "budget": "budget",
    "pruned_frac": "pruned",
    "short_wrong_frac": "short seats off",
    "long_wrong_frac": "long seat off",
    "judged_reward": "held-out reward",
    "trained_s": "s in total",
    "reach_s": "s to the target held-out reward",
    "reach_steps": "steps to it",
    "tokens/to_reach": "generated until it",
    "near_s": "s to within the margin of it",
}
EMULATED = "\non emulated decode latency"
KIND = "held-out "  # begins the columns of single kinds of prompts


def columns(rows: Sequence[Row]) -> dict[str, str]:
    """The titles of all columns by name, with those of the kinds of prompts that `rows` have."""
    return COLUMNS | {name: name for row in rows for name in row if name.startswith(KIND)}


def _lines(rows: Sequence[Row]) -> list[list[str]]:
    """The cells of the table, titles first."""
    titles = columns(rows)
    return [
        ["variant", *titles.values(), "verdict"],
        *(
            [
                str(row["variant"]),
                *(
                    _shown(name, row.get(name), row["half_widths"].get(name, 0.0))
                    for name in titles
                ),
                str(row["verdict"]),
            ]
            for row in rows
        ),
    ]


def _shown(name: str, value: float | None, half_width: float) -> str:
    if value is None or value != value:
        return "-"
    return _number(name, value) + (f" ± {_number(name, half_width)}" if half_width else "")


def _number(name: str, value: float) -> str:
    if name.startswith("tokens/"):
        return f"{value / 1e6:.3g}M"
    if name.endswith(("_frac", "reward")) or " reward of " in name:
        return f"{value:.3f}"
    return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def markdown(rows: Sequence[Row]) -> str:
    lines = _lines(rows)
    used = [i for i in range(len(lines[0])) if any(line[i] != "-" for line in lines[1:])]
    text = ["| " + " | ".join(line[i] for i in used) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(used), *text[1:]])


PAGE_STYLE = """
body { font:14px system-ui; margin:2em }
table { border-collapse:collapse; font-variant-numeric:tabular-nums }
td, th { padding:4px 10px; border-bottom:1px solid #ddd; text-align:right }
td:first-child, th:first-child { text-align:left }
"""


def html(rows: Sequence[Row], title: str, lead: str) -> str:
    titles, *cells = _lines(rows)
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in cells
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison</title>'
        f"<style>{PAGE_STYLE}</style><h1>{escape(title)}</h1><p>{escape(lead)}</p>"
        f"<table><tr>{head}</tr>{body}</table>"
        '<p><img src="table.png" alt="The same data as bars"></p></html>\n'
    )


def plot_table(rows: Sequence[Row], path: Path, emulated: bool) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [str(row["variant"]) for row in rows]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 0.45 * len(rows) + 1.6), sharey=True, layout="constrained"
    )
    below = [row["time_ratio"] - row["time_ratio_range"][0] for row in rows]
    above = [row["time_ratio_range"][1] - row["time_ratio"] for row in rows]
    left.barh(names, [row["time_ratio"] for row in rows], xerr=[below, above], color="#3d5bd9")
    left.axvline(1.0, color="#1d2733", linewidth=0.8)
    left.set_xlabel(
        f"learner steps per second, relative to {names[0]} (range over seeds)"
        + (EMULATED if emulated else "")
    )
    start = [0.0] * len(rows)
    for use, colour in (
        ("trained", "#12876f"),
        ("without_signal", "#7a5cc4"),
        ("discarded", "#e3a11f"),
        ("cancelled", "#9aa3ad"),
    ):
        values = [row.get(f"tokens/{use}", 0) / 1e6 for row in rows]
        right.barh(names, values, left=start, color=colour, label=use.replace("_", " "))
        start = [a + b for a, b in zip(start, values, strict=True)]
    right.set_xlabel("tokens generated, millions")
    right.legend()
    left.invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_curves(by_variant: dict[str, list[Row]], path: Path, emulated: bool) -> None:
    """Plot held-out reward over time, with one line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for index, (name, results) in enumerate(by_variant.items()):
        for number, result in enumerate(results):
            axes.plot(
                [point[0] for point in result["curve"]],
                [point[1] for point in result["curve"]],
                color=f"C{index}",
                linewidth=1.4,
                marker=".",
                label=name if number == 0 else None,
            )
    axes.set_xlabel(f"seconds of training, after the first step{EMULATED if emulated else ''}")
    axes.set_ylabel("held-out reward at the training temperature")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
