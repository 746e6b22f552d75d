"""`python -m tools.figures`: draw the worked examples of docs/method.md, and print their tables.

Writes docs/figures/selection.svg and docs/figures/lag-bound.svg, the same bytes on every machine,
so that a test can tell when the method and its documentation no longer agree. Owns the drawing;
`tools.reporting.worked_examples` drives the core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from configs.command import run_command
from tools.reporting.svg import Svg
from tools.reporting.worked_examples import (
    GroupBar,
    LagExample,
    RolloutBar,
    SelectionExample,
    lag_example,
    selection_example,
)

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "figures"
COLOURS = {
    "selected_short": "#12876f",
    "selected_long": "#3d5bd9",
    "discarded": "#e3a11f",
    "cancelled": "#9aa3ad",
}
VERSION_COLOURS = ("#3d5bd9", "#12876f", "#b0570f", "#7a4fb5", "#5d6b7a")
FAINT, LINE, MUTED = "#e2e7ec", "#c3cbd3", "#5d6b7a"
LEFT, ROW, BAR = 78, 26, 16


def draw_selection(example: SelectionExample) -> str:
    """One bar per rollout, coloured by its end; a dashed outline shows the tokens saved."""
    width, scale, top = 760, 1.55, 60
    bottom = top + ROW * len(example.bars)
    svg = Svg(width, bottom + 44, "Selection of one group: four of eight rollouts are trained on")
    for index, (end, colour) in enumerate(COLOURS.items()):
        svg.rect(LEFT + 140 * index, 14, 12, 12, fill=colour)
        svg.text(LEFT + 18 + 140 * index, 24, end.replace("_", " "))
    _axis(svg, top, bottom, scale, range(0, 411, 50), "time, in decoded tokens")
    full = sorted(bar.start + bar.length for bar in example.bars if bar.end != "cancelled")[3]
    _marker(svg, LEFT + full * scale, top, bottom, f"{full}: four have finished")
    _marker(svg, LEFT + example.decided * scale, top, bottom, f"{example.decided}: group is ready")
    for number, bar in enumerate(example.bars):
        _rollout(svg, top + ROW * number + 5, number, bar, scale)
    return svg.render()


def _rollout(svg: Svg, y: int, number: int, bar: RolloutBar, scale: float) -> None:
    x, decoded = LEFT + bar.start * scale, bar.tokens * scale
    svg.text(LEFT - 10, y + 12, f"rollout {number}", text_anchor="end")
    if bar.end == "cancelled":
        rest = (bar.length - bar.tokens) * scale
        svg.rect(x + decoded, y, rest, BAR, fill="none", stroke=LINE, stroke_dasharray="4 3")
    svg.rect(x, y, decoded, BAR, fill=COLOURS[bar.end])
    svg.text(x + decoded - 6, y + 12, str(bar.tokens), text_anchor="end", fill="#ffffff")


def draw_lag(example: LagExample) -> str:
    """One bar per group, pale while it waits in the buffer, below the learner's lane."""
    width, scale, top = 760, 3.7, 66
    bars = {number: bar for number, bar in example.bars.items() if bar.shipped}
    bottom = top + ROW * (len(bars) + 1)
    svg = Svg(width, bottom + 44, "Six groups outstanding at a lag bound of 2")
    legend = "solid: being generated; pale: waiting in the buffer; v1 to v4: publications"
    svg.text(LEFT, 24, legend)
    _axis(svg, top, bottom, scale, range(0, 161, 20), "time")
    for step in example.steps[1:]:
        _marker(svg, LEFT + step.requested * scale, top, bottom, f"v{step.version}")
    _learner(svg, top + 5, example, scale)
    for row, (number, bar) in enumerate(bars.items(), start=1):
        _group(svg, top + ROW * row + 5, number, bar, scale)
    return svg.render()


def _learner(svg: Svg, y: int, example: LagExample, scale: float) -> None:
    """The learner waits for each batch, then trains on it until it publishes."""
    svg.text(LEFT - 10, y + 12, "learner", text_anchor="end")
    for step, after in zip(example.steps, [*example.steps[1:], None], strict=True):
        requested, served = LEFT + step.requested * scale, LEFT + step.served * scale
        svg.rect(requested, y, served - requested, BAR, fill=FAINT)
        if served > requested:
            svg.text(requested + 4, y + 12, "waits", fill=MUTED)
        if after is not None:
            svg.rect(served, y, LEFT + after.requested * scale - served, BAR, fill=MUTED)
            svg.text(served + 4, y + 12, "step", fill="#ffffff")


def _group(svg: Svg, y: int, number: int, bar: GroupBar, scale: float) -> None:
    colour = VERSION_COLOURS[bar.min_version]
    opened, finished, shipped = (LEFT + t * scale for t in (bar.opened, bar.finished, bar.shipped))
    svg.text(LEFT - 10, y + 12, f"group {number}", text_anchor="end")
    svg.rect(finished, y, shipped - finished, BAR, fill=colour, fill_opacity=0.25)
    svg.rect(opened, y, finished - opened, BAR, fill=colour)
    svg.text(opened + 4, y + 12, f"from {bar.min_version}", fill="#ffffff")
    svg.text(shipped + 5, y + 12, f"lag {bar.lag}")


def _axis(svg: Svg, top: int, bottom: int, scale: float, ticks: range, label: str) -> None:
    for tick in ticks:
        x = LEFT + tick * scale
        svg.line(x, top, x, bottom, stroke=FAINT)
        svg.text(x, bottom + 16, str(tick), text_anchor="middle", fill=MUTED)
    svg.text(LEFT, bottom + 34, label, fill=MUTED)


def _marker(svg: Svg, x: float, top: int, bottom: int, label: str) -> None:
    svg.line(x, top - 8, x, bottom, stroke=MUTED, stroke_dasharray="3 3")
    svg.text(x, top - 14, label, text_anchor="middle", fill=MUTED)


def figures() -> dict[str, str]:
    """The contents of every generated figure, by file name."""
    return {
        "selection.svg": draw_selection(selection_example()),
        "lag-bound.svg": draw_lag(lag_example()),
    }


def run(given: argparse.Namespace) -> None:
    for name, drawing in figures().items():
        (FOLDER / name).write_text(drawing)
        print(FOLDER / name)
    print(selection_example().table(), lag_example().table(), sep="\n\n")


def main() -> NoReturn:
    run_command(
        "Draw the worked examples of docs/method.md into docs/figures, and print their tables.",
        run,
        arguments=lambda parser: None,
    )


if __name__ == "__main__":
    main()
