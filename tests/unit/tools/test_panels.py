"""The plots of the report: their values for the page's script, and the script in a browser."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tools.reporting.page import page_of
from tools.reporting.panels import Panels, log_lengths, smooth, without_start
from tools.reporting.plots import FIGURES
from tools.reporting.run_directory import RunDirectory

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Plots(HTMLParser):
    """The values of the plots of a page, and all of its ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.plots: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "svg":
            self.plots.append(json.loads(values["data-plot"] or ""))
        if values.get("id"):
            self.ids.append(str(values["id"]))


def panels() -> Panels:
    drawn = Panels("example", "One", "Two")
    for panel in (0, 1):
        drawn.line(panel, [0, 1, 2, 3, 4], [0, 1, 4, 9, 16], "squares <b>", "#112233")
        drawn.line(panel, [0, 4], [10, 10], "tens", "#445566", marker="o")
        drawn.axes[panel].set_xlabel("number")
    return drawn


def test_a_plot_carries_its_values_and_draws_every_series() -> None:
    page = Plots(panels().render())
    assert [plot["id"] for plot in page.plots] == ["example-0", "example-1"]
    squares, tens = page.plots[0]["series"]
    assert (squares["name"], squares["x"], squares["y"]) == (
        "squares <b>",
        [0, 1, 2, 3, 4],
        [0, 1, 4, 9, 16],
    )
    assert set(squares["ids"] + tens["ids"]) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_the_box_of_a_plot_is_that_of_its_axes() -> None:
    """A pointer's place becomes a value by the box and the limits of each axis."""
    drawn = panels()
    left, top, right, bottom = Plots(drawn.render()).plots[0]["box"]
    assert 0 < left < 60 and 0 < top < 20
    assert right > 300 and 140 < bottom < 185  # of 338 x 194


def test_panels_with_the_same_series_share_a_legend() -> None:
    assert panels().render().count('class="legend"') == 1
    drawn = panels()
    drawn.level(1, 5, "a bound")
    assert drawn.render().count('class="legend"') == 2


def test_long_series_are_thinned_and_the_scale_is_told() -> None:
    drawn = Panels("long", "Lengths")
    drawn.line(0, range(1, 10_001), range(1, 10_001), "length", "#112233")
    log_lengths(drawn.axes[0], [1, 10_000])
    plot = Plots(drawn.render()).plots[0]
    assert plot["y"]["log"] and not plot["x"]["log"]
    assert len(plot["series"][0]["x"]) <= 1500 and plot["series"][0]["x"][:2] == [1, 8]


@pytest.mark.parametrize(("first", "high"), [(50.0, 3.75), (4.0, 4.2)])
def test_the_start_of_a_run_does_not_set_the_scale(first: float, high: float) -> None:
    drawn = Panels("start", "Waits")
    drawn.line(0, range(4), [first, 1.0, 3.0, 0.0], "wait", "#112233")
    without_start(drawn.axes[0], [first, 1.0, 3.0, 0.0])
    assert drawn.axes[0].get_ylim()[1] == pytest.approx(high)


def test_a_running_mean_keeps_the_number_of_values_and_a_constant() -> None:
    assert smooth([2.0] * 40) == pytest.approx([2.0] * 40)
    assert smooth([1.0, 2.0]) == [1.0, 2.0]
    assert smooth([0.0, 3.0, 6.0, 9.0])[1] == pytest.approx(3.0)


def test_the_areas_of_tokens_carry_their_own_values_and_not_their_sums() -> None:
    uses = ("trained", "without_signal", "discarded", "cancelled")
    rows = [
        {"step": step, "time_s": 1.0 * step, "tokens/generated": 400.0 * step}
        | {f"tokens/{use}": 100.0 * step for use in uses}
        for step in range(3)
    ]
    run = RunDirectory(Path("r"), metrics=rows)
    series = Plots(FIGURES["tokens"](run)).plots[0]["series"]
    assert [one["y"] for one in series] == [[0, 100, 200]] * 4 + [[0, 400, 800]]


PROBE = """
<script>
{
const out = {errors: []}
window.onerror = message => out.errors.push(message)
const svg = document.querySelector("svg"), plot = JSON.parse(svg.dataset.plot)
const [left, top, right, bottom] = plot.box, middle = (left + right) / 2
const tip = () => document.querySelector(".tip").textContent
function point(type, x, y) {
  const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM())
  svg.dispatchEvent(new PointerEvent(type, {clientX: at.x, clientY: at.y}))
}
const path = () => svg.getElementById(plot.series[0].ids[0]).querySelector("path")
point("pointermove", middle, (top + bottom) / 2); out.hover = tip()
point("pointerdown", left + 1, bottom - 50)
point("pointermove", middle, bottom - 50); point("pointerup", middle, bottom - 50)
out.zoomed = Number(path().getAttribute("transform").match(/\\((\\S+)/)[1])
point("pointermove", right - 1, bottom - 50); out.after = tip()
point("dblclick", middle, bottom - 50)
out.reset = path().getAttribute("transform")
document.querySelector(".legend button").click()
out.display = [...document.querySelectorAll("svg")].map(
  one => one.getElementById(JSON.parse(one.dataset.plot).series[0].ids[0]).style.display)
point("pointermove", middle, (top + bottom) / 2); out.hidden = tip()
document.body.append(Object.assign(document.createElement("output"),
  {textContent: btoa(JSON.stringify(out))}))
}
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the path")
@pytest.mark.slow
def test_a_browser_shows_values_zooms_and_hides_series(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page_of("p", panels().render()).replace("</body>", f"{PROBE}</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    dom = subprocess.run(
        [*command, f"--user-data-dir={tmp_path}/profile", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    told = json.loads(base64.b64decode(dom.split("<output>")[1].split("</output>")[0]))
    assert told["errors"] == []
    assert told["hover"] == "number 2squares <b>: 4"
    assert told["zoomed"] == pytest.approx(2.0, rel=0.05)
    assert told["after"] == "number 2squares <b>: 4"
    assert told["reset"] == "matrix(1 0 0 1 0 0)"
    assert told["display"] == ["none", "none"]
    assert told["hidden"].endswith("tens: 10")
