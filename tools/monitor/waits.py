"""The monitor's page of waits: who waits and until when, groups without signal, and warnings.

Pure, like the panels. Shown by `tools.monitor.frame` in place of them.
"""

from __future__ import annotations

from rich.text import Text

from buffer.wire.messages import LiveState, WaitView
from tools.monitor.charts import printable
from tools.monitor.views import DIM, TITLE, View, style

BAR = 20  # cells from the start of a wait to its deadline
LATE_FRAC = 0.5  # of a deadline, from which a wait stands out
AMBER, RED = "#eeb02e", "#f0604d"
# Name, metric, format and a remark; of the newest step if that does not say otherwise.
SIGNAL = (
    ("groups without signal", "darts/uniform_frac", "{:.0%}", "all their rewards were equal"),
    ("replaced at their end", "darts/replaced_groups", "{:.0f}", "darts.uniform=drop"),
    ("stopped after their pilot", "darts/stopped_groups", "{:.0f}", "darts.pilot"),
    ("tokens without signal", "tokens/without_signal", "{:,.0f}", "in the whole run"),
)


def waits_page(snapshot: LiveState, view: View, width: int, height: int) -> list[Text]:
    """At most `height` lines; the page is meant to be read, so it has no columns."""
    lines = [
        Text("Waits and their deadlines", style(view, TITLE)),
        Text(f"  {printable(snapshot.waiting) or 'neither side waits for the other'}"),
        *(_wait(wait, view) for wait in sorted(snapshot.waits, key=_share, reverse=True)),
        Text(),
        Text("Signal of the newest step", style(view, TITLE)),
        *_signal(snapshot, view),
        Text(),
        Text("Refused frames and warnings", style(view, TITLE)),
        Text(f"  {snapshot.refused_frames} frames refused", _alarm(snapshot.refused_frames, view)),
        *_warnings(snapshot, view),
    ]
    return lines[:height]


def _share(wait: WaitView) -> float:
    return wait.waited_s / max(wait.limit_s, 1e-9)


def _wait(wait: WaitView, view: View) -> Text:
    full = min(BAR, round(BAR * _share(wait)))
    color = style(view, AMBER if _share(wait) >= LATE_FRAC else DIM)
    line = Text("  ").append("━" * full, color).append("─" * (BAR - full), style(view, DIM))
    line.append(f" {wait.waited_s:>4.0f} of {wait.limit_s:.0f} s  ")
    line.append(printable(wait.what)).append(f"  {wait.key}", style(view, DIM))
    return line


def _signal(snapshot: LiveState, view: View) -> list[Text]:
    known = [entry for entry in SIGNAL if entry[1] in snapshot.metrics]
    if not known:
        return [Text("  no step has been trained yet", style(view, DIM))]
    return [
        Text(f"  {form.format(snapshot.metrics[metric]):>9}  {name:<26}").append(
            note, style(view, DIM)
        )
        for name, metric, form, note in known
    ]


def _warnings(snapshot: LiveState, view: View) -> list[Text]:
    if not snapshot.warnings:
        return [Text("  no warnings", style(view, DIM))]
    return [
        Text(f"  {_ago(snapshot.time_s - at_s):>9} ago  ", style(view, DIM)).append(printable(line))
        for at_s, line in reversed(snapshot.warnings)
    ]


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _alarm(number: int, view: View) -> str:
    return style(view, RED if number else DIM)
