"""The monitor's screen: a header, panels laid out for the terminal's size, and a footer.

Also owns the effect of each key on the view. Pure: `frame` returns exactly the requested number of
lines and cells. Driven by `tools.tail_monitor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import localtime, strftime

from rich.text import Text

from buffer.wire.messages import LiveState
from tools.monitor.charts import fitted, printable
from tools.monitor.views import (
    DIM,
    TITLE,
    Order,
    Page,
    View,
    as_many_as_fit,
    engines_panel,
    groups_panel,
    lag_panel,
    lengths_panel,
    ordered,
    prompt_panel,
    prompt_title,
    prompts_panel,
    style,
)
from tools.monitor.waits import waits_page

Panel = Callable[[LiveState, View, int, int], list[Text]]
Layout = list[list[tuple[Panel, float]]]

PAGES: dict[str, Page] = {"?": "help", "w": "waits"}
ORDERS: tuple[Order, ...] = ("spread", "budget", "pass_rate")
SILENCE_S = 3.0  # the buffer publishes several times a second
HEADER_METRICS = {
    "held-out reward": ("eval/reward_mean", "{:.3f}"),
    "reward": ("reward/mean", "{:.3f}"),
    "length": ("length/selected_mean", "{:.0f}"),
    "p99": ("length/selected_p99", "{:.0f}"),
    "cancelled": ("darts/cancelled_frac", "{:.0%}"),
    "no signal": ("darts/uniform_frac", "{:.0%}"),
    "budget": ("darts/budget_mean", "{:.1f}"),
    "learner waits": ("wait/learner_frac", "{:.0%}"),
    "busy": ("engine/busy_frac", "{:.0%}"),
    "tokens/s": ("engine/tokens_per_s", "{:.0f}"),
}
NARROW, TALL = 72, 60  # fewer columns and more lines than these: one panel above the other
WIDE = 132  # number of columns at which three panels fit side by side

HELP = """
up, down (k, j)     choose the prompt whose lengths and pattern are shown
left, right (h, l)  choose the group in flight whose rollouts are drawn in full
s                   order the prompts by spread, budget or pass rate
space, + and -      pause a replay, play it faster, play it slower
, .   < >   0 $     a step back or on, a tenth of the replay back or on, its start and end
w                   show or hide the waits with their deadlines, the signal, and warnings
?                   show or hide this page
q                   quit

Pattern I   right responses are no longer than wrong ones: ineffective verbosity.
Pattern II  right responses are longer: necessary depth.
Spread      the standard deviation of the log length.
Cut │       the K-th shortest length so far; a longer response gets no short seat.
"""


def frame(snapshot: LiveState, view: View, width: int, height: int) -> list[Text]:
    """The whole screen as exactly `height` lines of exactly `width` cells."""
    head = header(snapshot, view, width)
    body = height - len(head) - 1
    if view.page == "help":
        lines = [Text(line) for line in HELP.splitlines()[1:]]
    elif view.page == "waits":
        lines = waits_page(snapshot, view, width, body)
    elif body < 9 or width < 40:
        lines = titled(lengths_panel, snapshot, view, width, max(body, 0))
    elif width >= WIDE:
        lines = _columns(snapshot, view, width, body, WIDE_LAYOUT)
    elif width < NARROW and body >= TALL:
        lines = _columns(snapshot, view, width, body, STACKED_LAYOUT)
    else:
        lines = _columns(snapshot, view, width, body, NARROW_LAYOUT)
    lines = [*head, *lines, *[Text()] * max(0, body - len(lines))][: height - 1]
    keys = "q quit   ? help   w waits   ↑↓ prompt   ←→ group   s order" + (
        "   space +- speed   , . < > seek" if view.source.startswith("replay") else ""
    )
    return [fitted(line, width) for line in [*lines, Text(keys, style(view, DIM))]][:height]


def pressed(view: View, key: str, snapshot: LiveState) -> View:
    """The view after a key: "up", "down", "left", "right" or a character. Ignores unknown keys."""
    if key in ("up", "k", "down", "j"):
        ids = [prompt.prompt_id for prompt in ordered(snapshot.prompts, view.order)]
        return replace(
            view, prompt_id=_neighbour(ids, view.prompt_id, -1 if key in ("up", "k") else 1, "")
        )
    if key in ("left", "h", "right", "l"):
        group_ids = [group.group_id for group in snapshot.groups]
        return replace(
            view,
            group_id=_neighbour(group_ids, view.group_id, -1 if key in ("left", "h") else 1, -1),
        )
    if key == "s":
        return replace(view, order=ORDERS[(ORDERS.index(view.order) + 1) % len(ORDERS)])
    if key in PAGES:
        return replace(view, page="panels" if view.page == PAGES[key] else PAGES[key])
    return view


def header(snapshot: LiveState, view: View, width: int) -> list[Text]:
    """Three lines: the run and its progress, its newest metrics, and its waits.

    If no state has arrived for some time, the last line says so instead.
    """
    name = Text(f" {printable(snapshot.run_name)}", style(view, "bold reverse"))
    name.truncate(max(width // 3, 4), overflow="ellipsis")
    name.append(" ")
    facts = [Text(view.source, style(view, "#eeb02e"))] if view.source else []
    facts += [
        Text(printable(snapshot.phase), style(view, TITLE)),
        Text(f"step {snapshot.step}/{snapshot.steps}"),
    ]
    if snapshot.evaluated[1] and snapshot.step:  # the third line tells the first one
        facts += [Text("evaluation {} of {} prompts".format(*snapshot.evaluated))]
    if snapshot.policy_version >= 0:
        facts += [Text(f"version {snapshot.policy_version}")]
    facts += [Text(f"lag ≤ {snapshot.max_lag}")]
    facts += [
        Text(f"groups {snapshot.groups_open} open, {snapshot.groups_ready} ready"),
        Text(f"{snapshot.bytes_held / 1e6:.1f} MB held"),
    ]
    if snapshot.refused_frames:
        facts += [Text(f"{snapshot.refused_frames} frames refused", style(view, "#f0604d"))]
    facts += [Text(_clock(snapshot.time_s), style(view, DIM))]
    metrics = [
        Text.assemble((f"{name} ", style(view, DIM)), form.format(snapshot.metrics[key]))
        for name, (key, form) in HEADER_METRICS.items()
        if key in snapshot.metrics
    ]
    if snapshot.phase == "done":
        third = Text(" the run is done", style(view, "#2fbf9b"))
    elif view.silent_s >= SILENCE_S:
        third = Text(
            f" no news for {view.silent_s:.0f} s: this is the last state received",
            style(view, "bold #f0604d"),
        )
    else:
        third = Text(
            f" {printable(snapshot.waiting) or 'nothing is waiting'}",
            style(view, "#eeb02e" if snapshot.waiting else DIM),
        )
    return [
        fitted(line, width)
        for line in (
            as_many_as_fit([name, *facts], width),
            as_many_as_fit([Text(" ") + metrics[0], *metrics[1:]] if metrics else [Text()], width),
            third,
        )
    ]


TITLES: dict[Panel, Callable[[LiveState, View], str]] = {
    lengths_panel: lambda snapshot, view: "Lengths by end",
    groups_panel: lambda snapshot, view: (
        "Groups of this step" if view.source.startswith("replay") else "Groups in flight"
    ),
    prompts_panel: lambda snapshot, view: f"Prompts by {view.order.replace('_', ' ')}",
    prompt_panel: prompt_title,
    lag_panel: lambda snapshot, view: f"Lag of trained responses, bound {snapshot.max_lag}",
    engines_panel: lambda snapshot, view: "Engines",
}
# Columns from left to right. Each lists (panel, share of the height) from top to bottom.
NARROW_LAYOUT: Layout = [
    [(lengths_panel, 8), (prompts_panel, 7), (lag_panel, 5)],
    [(groups_panel, 10), (prompt_panel, 6), (engines_panel, 4)],
]
WIDE_LAYOUT: Layout = [
    [(lengths_panel, 18), (prompts_panel, 28)],
    [(groups_panel, 46)],
    [(prompt_panel, 18), (lag_panel, 12), (engines_panel, 16)],
]
STACKED_LAYOUT: Layout = [
    [
        (lengths_panel, 16),
        (groups_panel, 14),
        (prompts_panel, 12),
        (prompt_panel, 10),
        (engines_panel, 6),
        (lag_panel, 8),
    ]
]


def titled(panel: Panel, snapshot: LiveState, view: View, width: int, height: int) -> list[Text]:
    """A panel with its title above it, as exactly `height` lines."""
    title = TITLES[panel](snapshot, view)
    rule = Text.assemble(
        (title + " ", style(view, TITLE)), ("─" * max(0, width - len(title) - 1), style(view, DIM))
    )
    lines = panel(snapshot, view, width, height - 1)[: max(height - 1, 0)]
    return [fitted(line, width) for line in [rule, *lines, *[Text()] * (height - 1 - len(lines))]][
        :height
    ]


def _columns(
    snapshot: LiveState, view: View, width: int, height: int, layout: Layout
) -> list[Text]:
    gap = 2
    inner = width - gap * (len(layout) - 1)
    widths = [
        inner * (place + 1) // len(layout) - inner * place // len(layout)
        for place in range(len(layout))
    ]
    blocks: list[list[Text]] = []
    for column, column_width in zip(layout, widths, strict=True):
        if view.source.startswith("replay"):  # the ledger does not record engines
            column = [(panel, share) for panel, share in column if panel is not engines_panel]
        total, used, block = sum(share for _, share in column), 0.0, []
        for panel, share in column:
            used += share
            rows = round(height * used / total) - len(block)
            block += titled(panel, snapshot, view, column_width, rows)
        blocks.append(block)
    return [Text(" " * gap).join(row) for row in zip(*blocks, strict=True)]


def _neighbour(ids: list, current: object, step: int, none: object):
    if not ids:
        return none
    place = ids.index(current) if current in ids else 0
    return ids[max(0, min(len(ids) - 1, place + step))]


def _clock(seconds: float) -> str:
    return (
        strftime("%H:%M:%S", localtime(seconds))
        if seconds > 1e8
        else f"{int(seconds // 60)}:{int(seconds % 60):02d}"
    )
