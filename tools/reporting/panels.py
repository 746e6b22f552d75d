"""Panels of one figure: static SVG drawn by matplotlib, with its values for the page's script.

Owns the look of every plot and the legend, which is HTML, so that it can be read on a phone and
its entries can hide their series. `interaction.js` shows values and zooms; without it, the page has
the same plots. Driven by `tools.reporting.plots`, `cost_plots` and `differences`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tools.reporting.compact import compact

INK, MUTED, GRID = "#1d2733", "#5d6b7a", "#e6eaee"
BLUE, TEAL, AMBER, RED, VIOLET = "#3d5bd9", "#12876f", "#e3a11f", "#d5482b", "#8a4bb0"
PALE_BLUE = "#aebbf0"
DASHED = (0, (4, 2))
STYLE: Any = {  # matplotlib types its keys as literals
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK,
    "axes.labelcolor": MUTED, "axes.edgecolor": "#b9c2cc", "axes.labelsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.9,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "xtick.major.size": 3, "ytick.major.size": 0,
    "lines.linewidth": 1.9, "lines.solid_capstyle": "round", "svg.fonttype": "none",
}  # fmt: skip
MOST_POINTS = 1500  # of a series, that a pointer can read
TOO_HIGH = 2.0  # a first step above this multiple of all others does not set the scale


class Panels:
    """One panel per title, beside each other if the page is wide enough.

    `kind` names the figure in ids, and must be unique on a page.
    """

    def __init__(
        self, kind: str, *titles: str, height: float = 2.7, columns: int = 2, width: float = 4.7
    ) -> None:
        self.kind, self.titles, self.columns = kind, titles, columns
        self._figures = [
            Figure(figsize=(width, height), layout=ConstrainedLayoutEngine()) for _ in titles
        ]
        with matplotlib.rc_context(STYLE):
            self.axes: list[Axes] = [figure.subplots() for figure in self._figures]
        self._series: list[list[dict[str, Any]]] = [[] for _ in titles]
        self._legends: list[dict[str, str]] = [{} for _ in titles]

    def line(
        self,
        panel: int,
        x: Sequence[float],
        y: Sequence[float],
        name: str,
        color: str,
        *,
        read: Sequence[float] | None = None,
        **style: Any,
    ) -> None:
        """A line. `read` are the values that a pointer shows, if they are not `y`."""
        (line,) = self.axes[panel].plot(x, y, color=color, **style)
        self.add(panel, [line], name, color, x=x, y=y if read is None else read)

    def band(
        self,
        panel: int,
        x: Sequence[float],
        low: Sequence[float],
        high: Sequence[float],
        name: str,
        color: str,
        *,
        alpha: float,
        read: Sequence[float] | None = None,
    ) -> None:
        area = self.axes[panel].fill_between(x, low, high, color=color, alpha=alpha, linewidth=0)
        shade = f"{color}{round(255 * min(1.0, alpha + 0.1)):02x}"
        self.add(panel, [area], name, shade, x=x, y=high if read is None else read)

    def level(self, panel: int, value: float, name: str) -> None:
        """A dashed horizontal line, such as a bound."""
        line = self.axes[panel].axhline(value, color=INK, linestyle=DASHED, linewidth=1.2)
        self.add(panel, [line], name, INK)

    def add(
        self,
        panel: int,
        artists: Sequence[Artist],
        name: str,
        color: str,
        *,
        x: Sequence[float] = (),
        y: Sequence[float] = (),
        texts: Sequence[str] = (),
    ) -> None:
        """Let the page hide `artists` under `name`, and show their values or their `texts`."""
        ids = []
        for artist in artists:
            ids.append(f"{self.kind}-{panel}-{len(self._series[panel])}-{len(ids)}")
            artist.set_gid(ids[-1])
        step = max(1, -(-len(x) // MOST_POINTS))
        series: dict[str, Any] = {"name": name, "color": color, "ids": ids}
        series["x"] = [_rounded(value) for value in x[::step]]
        series["y"] = [_rounded(value) for value in y[::step]]
        if texts:
            series["texts"] = list(texts)
        self._series[panel].append(series)
        self._legends[panel].setdefault(name, color)

    def share_y(self) -> None:
        low = min(axis.get_ylim()[0] for axis in self.axes)
        high = max(axis.get_ylim()[1] for axis in self.axes)
        for axis in self.axes:
            axis.set_ylim(low, high)

    def render(self) -> str:
        """HTML of the figure: its legend, then its panels, each with a heading."""
        shared = len(self.axes) > 1 and all(one == self._legends[0] for one in self._legends)
        panels = "".join(
            f'<div class="panel"><h3>{escape(title)}</h3>'
            f"{'' if shared else _legend(self._legends[panel])}{self._svg(panel)}</div>"
            for panel, title in enumerate(self.titles)
        )
        legend = _legend(self._legends[0]) if shared else ""
        return (
            f'<div class="figure">{legend}'
            f'<div class="panels" style="--columns:{self.columns}">{panels}</div></div>'
        )

    def _svg(self, panel: int) -> str:
        figure, axis = self._figures[panel], self.axes[panel]
        if axis.get_xlabel() == "learner step":
            whole_numbers(axis.xaxis)  # a short run has no step 0.5
        stream = io.StringIO()
        # The same run gives the same bytes, and ids do not collide within one page.
        style = STYLE | {"svg.hashsalt": f"{self.kind}-{panel}"}
        with matplotlib.rc_context(style):
            figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
        place = axis.get_position()
        width, height = 72 * figure.get_figwidth(), 72 * figure.get_figheight()
        box = [place.x0 * width, (1 - place.y1) * height, place.x1 * width]
        box.append((1 - place.y0) * height)
        plot = {
            "id": f"{self.kind}-{panel}",
            "box": [_rounded(edge) for edge in box],
            "x": _scale(axis.xaxis, axis.get_xlim()),
            "y": _scale(axis.yaxis, axis.get_ylim()),
            "series": self._series[panel],
        }
        text = _own_ids(stream.getvalue())
        data = escape(json.dumps(plot, separators=(",", ":")))
        label = escape(self.titles[panel])
        head = f'<svg role="img" aria-label="{label}" data-plot="{data}" '
        return text[text.index("<svg") :].replace("<svg ", head, 1)


def without_start(axis: Axes, values: Sequence[float], unit: str = "") -> None:
    """Scale to the steps after the first if the start of the run is far above all of them."""
    rest = max(values[1:], default=0.0)
    if rest > 0 and values[0] > TOO_HIGH * rest:
        axis.set_ylim(0, 1.25 * rest)
        note = f"first step: {compact(values[0])}{unit}"
        axis.annotate(
            note, (0.99, 0.99), xycoords="axes fraction", ha="right", va="top", color=MUTED
        )


def smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean over a fifteenth of the run, at least three values."""
    width = max(3, len(values) // 15) | 1
    if len(values) < width:
        return list(values)
    ones = np.ones(width)
    weights = np.convolve(np.ones(len(values)), ones, mode="same")
    return (np.convolve(values, ones, mode="same") / weights).tolist()


def log_lengths(axis: Axes, values: Sequence[float]) -> None:
    axis.set_yscale("log", base=2)
    smallest = min((value for value in values if value > 0), default=1)
    axis.set_ylim(bottom=max(smallest * 0.5, 0.8) if axis.get_ylim()[0] <= 1 else None)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def whole_numbers(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(integer=True))


def compact_ticks(axis: Axis, most: int = 6) -> None:
    axis.set_major_locator(MaxNLocator(most))
    axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))


def _legend(entries: dict[str, str]) -> str:
    if len(entries) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" data-name="{escape(name)}"><i style="background:{color}"></i>'
        f"{escape(name)}</button>"
        for name, color in entries.items()
    )
    return f'<div class="legend">{buttons}</div>'


def _own_ids(svg: str) -> str:
    """Without metadata, and without the ids that every figure of matplotlib has."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'id="[xy]tick_\d+"', 'class="tick"', svg)
    return re.sub(
        r' id="(figure|patch|axes|matplotlib\.axis|text|line2d|\w+Collection)_\d+"', "", svg
    )


def _scale(axis: Axis, limits: tuple[float, float]) -> dict[str, Any]:
    return {
        "low": _rounded(limits[0]),
        "high": _rounded(limits[1]),
        "log": axis.get_scale() == "log",
        "name": axis.get_label_text(),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
