"""Charts made of characters: stacked columns, growing bars and sparklines.

Pure functions that know nothing about runs. Each returns lines of exactly the requested width.
Driven by `tools.monitor.views`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import log
from typing import NamedTuple

from rich.text import Text

EIGHTHS = " ▁▂▃▄▅▆▇█"


class Ink(NamedTuple):
    """How one layer of a chart is drawn: in colour, or as a letter if there is no colour."""

    color: str  # "#rrggbb"
    letter: str

    def shaded(self) -> Ink:
        """A slightly darker copy, which distinguishes a bar from its neighbour."""
        parts = (int(self.color[place : place + 2], 16) * 3 // 4 for place in (1, 3, 5))
        return Ink("#" + "".join(f"{part:02x}" for part in parts), self.letter)


class Bar(NamedTuple):
    length: int
    ink: Ink


def fitted(text: Text, width: int) -> Text:
    """A copy that is exactly `width` cells wide."""
    copy = text.copy()
    copy.truncate(max(width, 0), overflow="ellipsis", pad=True)
    return copy


def printable(text: str) -> str:
    """External text without control characters, so that it cannot send escape sequences."""
    return "".join(character if character.isprintable() else "·" for character in text)


def nice_ceiling(value: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, ..., for a scale that does not change with every token."""
    ceiling = 8
    while ceiling < value:
        ceiling = ceiling * 3 // 2 if ceiling & (ceiling - 1) == 0 else ceiling * 4 // 3
    return ceiling


def stacked_columns(
    layers: Sequence[Sequence[int]], inks: Sequence[Ink], width: int, height: int, color: bool
) -> list[Text]:
    """Stack the counts `layers[k][bin]`, first layer at the bottom. The highest fills `height`."""
    columns = list(zip(*layers, strict=True))
    merged = -(-len(columns) // max(width, 1)) or 1
    columns = [
        [sum(layer) for layer in zip(*columns[start : start + merged], strict=True)]
        for start in range(0, len(columns), merged)
    ]
    pitch = width // max(len(columns), 1)
    solid = pitch - 1 if pitch > 2 else pitch
    highest = max((sum(column) for column in columns), default=0)
    scale = height / highest if highest else 0.0
    lines = []
    for row in reversed(range(height)):
        line = Text()
        for column in columns:
            character, style = _cell(column, inks, row, scale, color)
            line.append(character * solid, style)
            line.append(" " * (pitch - solid))
        lines.append(fitted(line, width))
    return lines


def _cell(
    column: Sequence[int], inks: Sequence[Ink], row: int, scale: float, color: bool
) -> tuple[str, str]:
    """The character of one cell, `row` rows above the bottom, and its style.

    The lower layer in the cell is the foreground, and the layer above it is the background.
    """
    tops, top = [], 0.0
    for count in column:
        top += count * scale
        tops.append(top)
    if 0 < top < 0.125 and row == 0:  # keep one rollout among thousands visible
        tops[next(layer for layer, count in enumerate(column) if count)] = top = 0.125
    inside = [
        layer
        for layer, edge in enumerate(tops)
        if column[layer] and edge > row and edge - column[layer] * scale < row + 1
    ]
    if not inside:
        return " ", ""
    if not color:
        middle = next((layer for layer in inside if tops[layer] >= row + 0.5), None)
        return (
            (inks[middle].letter, "")
            if middle is not None
            else (inks[inside[0]].letter, "")
            if row == 0
            else (" ", "")
        )
    eighths = [round(8 * (min(tops[layer], row + 1) - row)) for layer in inside]
    # A layer thinner than an eighth is not drawn; the next one is.
    visible = next((index for index, top in enumerate(eighths) if top), 0)
    lower, above = inks[inside[visible]], inside[visible + 1 :]
    if eighths[visible] >= 8 or not above:
        return EIGHTHS[max(eighths[visible], 1)], lower.color
    return EIGHTHS[eighths[visible]], f"{lower.color} on {inks[above[0]].color}"


def bars_per_line(color: bool) -> int:
    """In colour a line of half blocks holds two bars."""
    return 2 if color else 1


def growing_bars(bars: Sequence[Bar], scale: int, mark: int, width: int, color: bool) -> list[Text]:
    """Horizontal bars, two per line in colour and one without.

    `scale` is the length that fills `width`. A vertical line is drawn across at length `mark`.
    """
    per_line = bars_per_line(color)
    inks = [bar.ink.shaded() if place % per_line else bar.ink for place, bar in enumerate(bars)]
    lengths = [
        min(width, max(1, round(bar.length * width / scale))) if bar.length else 0 for bar in bars
    ]
    mark_at = min(width - 1, round(mark * width / scale)) if mark else -1
    lines = []
    for start in range(0, len(bars), per_line):
        cells = []
        pair = list(zip(inks, lengths, strict=True))[start : start + per_line]
        for place in range(width):
            filled = [ink if place < length else None for ink, length in pair]
            cells.append(_bar_cell(filled, place == mark_at, color))
        lines.append(_joined(cells))
    return lines


def _bar_cell(filled: Sequence[Ink | None], marked: bool, color: bool) -> tuple[str, str]:
    upper, lower = filled[0], filled[1] if len(filled) > 1 else None
    if marked:
        return "│", "bright_white" if color else ""
    if upper is None and lower is None:
        return " ", ""
    if not color:
        return (upper.letter if upper else " "), ""
    if upper and lower:
        return "▀", f"{upper.color} on {lower.color}"
    return ("▀", upper.color) if upper else ("▄", lower.color if lower else "")


def race_track(bars: Sequence[Bar], scale: int, mark: int, width: int, color: bool) -> Text:
    """All bars on one line, each as a dot at its end. A longer bar hides a shorter one."""
    cells: list[tuple[str, str]] = [("·", "bright_black" if color else "")] * width
    if mark:
        cells[min(width - 1, mark * width // scale)] = ("│", "bright_white" if color else "")
    for bar in sorted(bars):
        if bar.length:
            cells[min(width - 1, bar.length * width // scale)] = (
                ("●", bar.ink.color) if color else (bar.ink.letter, "")
            )
    return _joined(cells)


def _joined(cells: Sequence[tuple[str, str]]) -> Text:
    """Join adjacent cells of one style into one span, because the cost of drawing is per span."""
    runs = groupby(cells, key=lambda cell: cell[1])
    return Text.assemble(
        *(("".join(character for character, _ in run), style) for style, run in runs)
    )


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as block heights, from the lowest to the highest, in `width` characters."""
    if not values:
        return " " * width
    picked = (
        [values[index * len(values) // width] for index in range(width)]
        if len(values) > width
        else list(values)
    )
    low, high = min(picked), max(picked)
    marks = (
        EIGHTHS[1 + round(7 * (value - low) / (high - low))] if high > low else EIGHTHS[1]
        for value in picked
    )
    return "".join(marks).ljust(width)


def counts_in_log_bins(values: Sequence[int], low: int, high: int, bins: int) -> list[int]:
    """The number of `values` in each of `bins` bins of equal ratio from `low` to `high`."""
    low = max(low, 1)
    span = max(log(high / low), 1e-9)
    counts = [0] * bins
    for value in values:
        counts[max(0, min(bins - 1, int(bins * log(max(value, 1) / low) / span)))] += 1
    return counts
