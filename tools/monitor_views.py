"""What the monitor shows of a snapshot: one function per panel, and `frame`, which lays them out for a terminal's size.

Pure: (Snapshot, View, width, height) -> that many lines of that width. Reads no clock, socket or keyboard.
Driven by `tools.tail_monitor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from time import localtime, strftime
from typing import Literal

from rich.text import Text

from buffer.messages import GroupView, PromptView, Snapshot
from tools.fates import FATES
from tools.monitor_charts import (
    Bar,
    Ink,
    counts_in_log_bins,
    fitted,
    growing_bars,
    nice_ceiling,
    printable,
    race_track,
    sparkline,
    stacked_columns,
)

Order = Literal["spread", "budget", "pass_rate"]
ORDERS: tuple[Order, ...] = ("spread", "budget", "pass_rate")
Panel = Callable[[Snapshot, "View", int, int], list[Text]]
Layout = list[list[tuple[Panel, float]]]

RIGHT, WRONG = Ink("#2fbf9b", "+"), Ink("#f0604d", "-")
RUNNING, ENDED = Ink("#4cc3f7", ">"), Ink("#d7dee6", "=")
STATE_INKS = {name: Ink(fate.on_screen, fate.letter) for name, fate in FATES.items()} | {"running": RUNNING}
DIM, TITLE = "bright_black", "bold"
SILENCE_S = 3.0  # the buffer publishes several times a second
HEADER_METRICS = {
    "accuracy": ("eval/accuracy", "{:.3f}"), "reward": ("reward/mean", "{:.3f}"), "length": ("length/selected_mean", "{:.0f}"),
    "p99": ("length/selected_p99", "{:.0f}"), "cancelled": ("darts/cancelled_frac", "{:.0%}"), "budget": ("darts/budget_mean", "{:.1f}"),
    "learner waits": ("wait/learner_frac", "{:.0%}"), "busy": ("engine/busy_frac", "{:.0%}"), "tokens/s": ("engine/tokens_per_s", "{:.0f}"),
}  # fmt: skip
WIDE = 132  # columns from which three panels fit side by side

HELP = """
up, down (k, j)     choose a prompt: its lengths and its pattern are shown
left, right (h, l)  choose the group in flight whose rollouts are drawn in full
s                   order the prompts by spread, budget or pass rate
space, + and -      a replay: hold, faster, slower
?                   this page, and back
q                   quit

Pattern I   right responses are no longer than wrong ones: verbosity that does not help.
Pattern II  right responses are longer: depth that is needed.
Spread      standard deviation of log length, cancelled responses accounted for.
Cut ┊       the K-th shortest finished length: what is longer cannot be among the short ones.
"""


@dataclass(frozen=True)
class View:
    """What the person at the keyboard chose, and how the terminal is."""

    color: bool = True
    prompt_id: str = ""  # "": the first of the table
    group_id: int = -1  # -1: the first in flight
    order: Order = "spread"
    help: bool = False
    silent_s: float = 0.0  # since the last snapshot
    source: str = ""  # "replay x4", say


def frame(snapshot: Snapshot, view: View, width: int, height: int) -> list[Text]:
    """The whole screen: exactly `height` lines of exactly `width` cells."""
    head = header(snapshot, view, width)
    body = height - len(head) - 1
    if view.help:
        lines = [Text(line) for line in HELP.splitlines()[1:]]
    elif body < 9 or width < 40:
        lines = titled(lengths_panel, snapshot, view, width, max(body, 0))
    elif width >= WIDE:
        lines = _columns(snapshot, view, width, body, WIDE_LAYOUT)
    else:
        lines = _columns(snapshot, view, width, body, NARROW_LAYOUT)
    lines = [*head, *lines, *[Text()] * max(0, body - len(lines))][: height - 1]
    keys = "q quit   ? help   ↑↓ prompt   ←→ group   s order" + ("   space +- speed" if view.source.startswith("replay") else "")
    return [fitted(line, width) for line in [*lines, Text(keys, _style(view, DIM))]][:height]


def pressed(view: View, key: str, snapshot: Snapshot) -> View:
    """The view after a key: "up", "down", "left", "right", or a character. Unknown keys change nothing."""
    if key in ("up", "k", "down", "j"):
        ids = [prompt.prompt_id for prompt in ordered(snapshot.prompts, view.order)]
        return replace(view, prompt_id=_neighbour(ids, view.prompt_id, -1 if key in ("up", "k") else 1, ""))
    if key in ("left", "h", "right", "l"):
        group_ids = [group.group_id for group in snapshot.groups]
        return replace(view, group_id=_neighbour(group_ids, view.group_id, -1 if key in ("left", "h") else 1, -1))
    if key == "s":
        return replace(view, order=ORDERS[(ORDERS.index(view.order) + 1) % len(ORDERS)])
    return replace(view, help=not view.help) if key == "?" else view


def ordered(prompts: list[PromptView], order: Order) -> list[PromptView]:
    """Largest spread or budget first; lowest pass rate first. Ties by id, so that rows do not jump."""
    sign = 1 if order == "pass_rate" else -1
    return sorted(prompts, key=lambda prompt: (sign * getattr(prompt, order), prompt.prompt_id))


def pattern(prompt: PromptView) -> str:
    """I: E[length | right] <= E[length | wrong]; II: the opposite; "": nothing to compare.

    Source: DARTS (arXiv 2605.30859), ineffective verbosity and necessary depth.
    """
    if not prompt.lengths_right or not prompt.lengths_wrong:
        return ""
    return "I" if fmean(prompt.lengths_right) <= fmean(prompt.lengths_wrong) else "II"


def header(snapshot: Snapshot, view: View, width: int) -> list[Text]:
    """Run and progress; the newest metrics; who waits for whom, or for how long nothing has been heard."""
    name = Text.assemble((f" {printable(snapshot.run_name)} ", _style(view, "bold reverse")))
    facts = [Text(printable(snapshot.phase), _style(view, TITLE)), Text(f"step {snapshot.step}/{snapshot.steps}")]
    facts += [Text(f"version {snapshot.policy_version}"), Text(f"lag ≤ {snapshot.max_lag}")]
    facts += [Text(view.source, _style(view, "#eeb02e"))] if view.source else []
    facts += [Text(f"groups {snapshot.groups_open} open, {snapshot.groups_ready} ready"), Text(f"{snapshot.bytes_held / 1e6:.1f} MB held")]
    facts += [Text(_clock(snapshot.time_s), _style(view, DIM))]
    metrics = [
        Text.assemble((f"{name} ", _style(view, DIM)), form.format(snapshot.metrics[key]))
        for name, (key, form) in HEADER_METRICS.items()
        if key in snapshot.metrics
    ]
    if view.silent_s >= SILENCE_S:
        third = Text(f" no news for {view.silent_s:.0f} s: this is the last that was heard", _style(view, "bold #f0604d"))
    else:
        third = Text(f" {printable(snapshot.waiting) or 'nobody waits'}", _style(view, "#eeb02e" if snapshot.waiting else DIM))
    return [fitted(line, width) for line in (_as_many_as_fit([name, *facts], width), _as_many_as_fit([Text(), *metrics], width), third)]


def lengths_panel(snapshot: Snapshot, view: View, width: int, height: int) -> list[Text]:
    """Ends of recent rollouts by length, stacked by fate, with a legend that counts them."""
    names = [name for name in FATES if name in snapshot.histogram]
    layers, inks = [snapshot.histogram[name] for name in names], [_ink(name) for name in names]
    if not layers or not any(map(any, layers)):
        return [Text("no group has closed yet", _style(view, DIM))]
    present = [(FATES[name], ink, sum(layer)) for name, layer, ink in zip(names, layers, inks, strict=True) if any(layer)]
    texts = [[f"{fate.label} {count}" for fate, _, count in present], [f"{fate.short} {count}" for fate, _, count in present]]
    texts += [[fate.short for fate, _, _ in present]]
    legends = [_legend([(text, ink) for text, (_, ink, _) in zip(words, present, strict=True)], view) for words in texts]
    legend = next((legend for legend in legends if legend.cell_len <= width), legends[-1])
    return [
        legend,
        *stacked_columns(layers, inks, width, height - 2, view.color),
        _axis(snapshot.histogram_edges, len(layers[0]), width, view),
    ]


def groups_panel(snapshot: Snapshot, view: View, width: int, height: int) -> list[Text]:
    """Groups in flight: the chosen one and those after it as growing bars while there is room, the others as one track each."""
    if not snapshot.groups:
        return [Text("nothing in flight", _style(view, DIM))]
    ids = [group.group_id for group in snapshot.groups]
    start = ids.index(view.group_id) if view.group_id in ids else 0
    groups = snapshot.groups[start:] + snapshot.groups[:start]
    bar_lines = [len(_bars(group, width, view)) for group in groups]
    rows, drawn_in_full = min(len(groups), height), 0
    least_tracks = min(len(groups) - 1, 1)
    while drawn_in_full < len(groups) and drawn_in_full + 1 + least_tracks + sum(bar_lines[: drawn_in_full + 1]) <= height:
        drawn_in_full += 1
    lines: list[Text] = []
    for place, group in enumerate(groups[:rows]):
        lines.append(_group_line(group, width, view, track=place >= drawn_in_full))
        lines += _bars(group, width, view) if place < drawn_in_full else []
    return lines[:height]


def prompts_panel(snapshot: Snapshot, view: View, width: int, height: int) -> list[Text]:
    """Recently closed prompts; the chosen row stays in sight."""
    spark = min(width - 44, 24) if width >= 54 else 0
    name = max(6, min(width - 28 - (2 + spark if spark else 0), 24))
    heading = f"{'prompt':<{name}}{'spread':>7}{'budget':>7}{'pass':>6}{'pattern':>8}" + ("  lengths" if spark else "")
    lines = [Text(heading[:width], _style(view, DIM))]
    prompts = ordered(snapshot.prompts, view.order)
    if not prompts:
        return [*lines, Text("no prompt has closed yet", _style(view, DIM))]
    chosen = _chosen(prompts, view)
    visible = max(height - 1, 1)
    top = max(0, min(prompts.index(chosen) - visible // 2, len(prompts) - visible))
    for prompt in prompts[top : top + visible]:
        mark = "" if view.color or prompt is not chosen else ">"
        label = fitted(Text(mark + printable(prompt.prompt_id)), name).plain
        row = f"{label}{prompt.spread:>7.2f}{prompt.budget:>7}{prompt.pass_rate:>6.0%}{pattern(prompt) or '–':>8}"
        lengths = prompt.lengths_right + prompt.lengths_wrong
        if spark and lengths:
            row += "  " + sparkline(counts_in_log_bins(lengths, min(lengths), max(lengths), spark), spark)
        lines.append(fitted(Text(row), width))
        if prompt is chosen:
            lines[-1].stylize(_style(view, "reverse"))
    return lines


def prompt_title(snapshot: Snapshot, view: View) -> str:
    """The chosen prompt and its pattern."""
    if not snapshot.prompts:
        return "Prompt"
    prompt = _chosen(ordered(snapshot.prompts, view.order), view)
    kinds = {"I": "pattern I, verbosity", "II": "pattern II, depth", "": "no pattern"}
    return f"Prompt {fitted(Text(printable(prompt.prompt_id)), min(len(prompt.prompt_id), 14)).plain}: {kinds[pattern(prompt)]}"


def prompt_panel(snapshot: Snapshot, view: View, width: int, height: int) -> list[Text]:
    """The chosen prompt's lengths, by right and wrong."""
    if not snapshot.prompts:
        return [Text("no prompt has closed yet", _style(view, DIM))]
    prompt = _chosen(ordered(snapshot.prompts, view.order), view)
    lengths = prompt.lengths_right + prompt.lengths_wrong
    if not lengths:
        return [Text("nothing finished", _style(view, DIM))]
    parts = (("right", prompt.lengths_right, RIGHT), ("wrong", prompt.lengths_wrong, WRONG))
    legend = _legend([(f"{len(values)} {name}, mean {fmean(values):.0f}", ink) for name, values, ink in parts if values], view)
    bins = max(4, min(24, width // 3))
    low, high = max(min(lengths), 1), max(*lengths, min(lengths) + 1, 2)
    layers = [counts_in_log_bins(values, low, high, bins) for _, values, _ in parts]
    edges = [round(low * (high / low) ** (place / bins)) for place in range(bins + 1)]
    return [legend, *stacked_columns(layers, [RIGHT, WRONG], width, max(height - 2, 1), view.color), _axis(edges, bins, width, view)]


def lag_panel(snapshot: Snapshot, view: View, width: int, height: int) -> list[Text]:
    """Lags of recently shipped trajectories; beyond the bound, which must stay empty, in red."""
    if not snapshot.lags:
        return [Text("nothing shipped yet", _style(view, DIM))]
    last = max(snapshot.max_lag, *snapshot.lags)
    counts = [snapshot.lags.count(lag) for lag in range(last + 1)]
    within = [count if lag <= snapshot.max_lag else 0 for lag, count in enumerate(counts)]
    beyond = [count if lag > snapshot.max_lag else 0 for lag, count in enumerate(counts)]
    chart = stacked_columns([within, beyond], [Ink("#6f8cff", "#"), Ink("#f0604d", "!")], width, max(height - 1, 1), view.color)
    return [*chart, _axis(list(range(last + 2)), last + 1, width, view, every=True)]


def engines_panel(snapshot: Snapshot, view: View, width: int, height: int) -> list[Text]:
    """Each engine: slots in use, speed, version, and its latency per token against the batch."""
    if not snapshot.engines:
        return [
            Text(
                "none: " + ("a ledger keeps no engine states" if view.source.startswith("replay") else "no actor has joined"),
                _style(view, DIM),
            )
        ]
    name = min(max(len(engine.engine_id) for engine in snapshot.engines), 16, max(width - 32, 4))
    gauge = max(0, min(width - name - 52, 24))
    lines = []
    for engine in snapshot.engines[: height if len(snapshot.engines) <= height else height - 1]:
        line = fitted(Text(printable(engine.engine_id)), name)
        line.append(f" {f'{engine.in_flight}/{engine.slots}':>7} ")
        if gauge:
            full = round(gauge * min(engine.in_flight / max(engine.slots, 1), 1))
            line.append("━" * full, _style(view, RUNNING.color)).append("─" * (gauge - full) + " ", _style(view, DIM))
        line.append(f"{engine.tokens_per_s:>6.0f}/s v{engine.policy_version:<3} ")
        latencies = [latency for _, latency in sorted(engine.curve)]
        spark = max(0, min(12, width - line.cell_len - (22 if gauge else 1)))
        line.append(sparkline(latencies, min(spark, len(latencies))) if latencies else "", _style(view, "#eeb02e"))
        if latencies and gauge:
            line.append(f" {min(latencies):.1f}–{max(latencies):.1f} ms/token", _style(view, DIM))
        lines.append(line)
    hidden = len(snapshot.engines) - len(lines)
    return lines + ([Text(f"and {hidden} more", _style(view, DIM))] if hidden else [])


TITLES: dict[Panel, Callable[[Snapshot, View], str]] = {
    lengths_panel: lambda snapshot, view: "Lengths by fate",
    groups_panel: lambda snapshot, view: "Groups in flight",
    prompts_panel: lambda snapshot, view: f"Prompts by {view.order.replace('_', ' ')}",
    prompt_panel: prompt_title,
    lag_panel: lambda snapshot, view: f"Lag when trained on, bound {snapshot.max_lag}",
    engines_panel: lambda snapshot, view: "Engines",
}
# Columns from left to right; in each (panel, share of the height), from top to bottom.
NARROW_LAYOUT: Layout = [
    [(lengths_panel, 8), (prompts_panel, 7), (lag_panel, 5)],
    [(groups_panel, 10), (prompt_panel, 6), (engines_panel, 4)],
]
WIDE_LAYOUT: Layout = [
    [(lengths_panel, 18), (prompts_panel, 28)],
    [(groups_panel, 46)],
    [(prompt_panel, 18), (lag_panel, 12), (engines_panel, 16)],
]


def titled(panel: Panel, snapshot: Snapshot, view: View, width: int, height: int) -> list[Text]:
    """A panel below its title; exactly `height` lines."""
    title = TITLES[panel](snapshot, view)
    rule = Text.assemble((title + " ", _style(view, TITLE)), ("─" * max(0, width - len(title) - 1), _style(view, DIM)))
    lines = panel(snapshot, view, width, height - 1)[: max(height - 1, 0)]
    return [fitted(line, width) for line in [rule, *lines, *[Text()] * (height - 1 - len(lines))]][:height]


def _columns(snapshot: Snapshot, view: View, width: int, height: int, layout: Layout) -> list[Text]:
    gap = 2
    inner = width - gap * (len(layout) - 1)
    widths = [inner * (place + 1) // len(layout) - inner * place // len(layout) for place in range(len(layout))]
    blocks: list[list[Text]] = []
    for column, column_width in zip(layout, widths, strict=True):
        total, used, block = sum(share for _, share in column), 0.0, []
        for panel, share in column:
            used += share
            rows = round(height * used / total) - len(block)
            block += titled(panel, snapshot, view, column_width, rows)
        blocks.append(block)
    return [Text(" " * gap).join(row) for row in zip(*blocks, strict=True)]


def _group_line(group: GroupView, width: int, view: View, track: bool) -> Text:
    states = [rollout.state for rollout in group.rollouts]
    running, cancelled = states.count("running"), states.count("cancelled")
    line = fitted(Text(printable(group.prompt_id), "bold" if not track and view.color else ""), min(10, max(width // 4, 4)))
    line.append(f" {len(states) - running - cancelled:>2}/{group.budget:<2} ")
    if track:
        line.append_text(race_track(_rollout_bars(group), _scale(group), group.cut, max(width - line.cell_len, 4), view.color))
        return line
    line.append(f"{running} running ", _style(view, RUNNING.color))
    if cancelled:
        line.append(f"{cancelled} cancelled ", _style(view, FATES["cancelled"].on_screen))
    if group.cut:
        line.append(f"cut {group.cut} ", _style(view, "bright_white"))
    scale = f"{_scale(group)} ▏"  # the length that a full bar stands for
    line = fitted(line, width - len(scale))
    return line.append(scale, _style(view, DIM))


def _bars(group: GroupView, width: int, view: View) -> list[Text]:
    return growing_bars(_rollout_bars(group), _scale(group), group.cut, width - 1, view.color)


def _rollout_bars(group: GroupView) -> list[Bar]:
    return [Bar(rollout.tokens, _ink(rollout.state)) for rollout in group.rollouts]


def _scale(group: GroupView) -> int:
    return nice_ceiling(max([group.cut, *(rollout.tokens for rollout in group.rollouts)]))


def _axis(edges: list[int], bins: int, width: int, view: View, every: bool = False) -> Text:
    """Lower edges below their columns: as many as fit. Mirrors how `stacked_columns` merges and spaces its bins."""
    merged = -(-bins // max(width, 1)) or 1
    pitch = max(width // max(-(-bins // merged), 1), 1)
    cells = [" "] * width
    free_from = 0
    for place in range(0, len(edges)):
        at, label = place // merged * pitch, str(edges[place])
        if place >= bins or at < free_from or at + len(label) > width:
            continue
        cells[at : at + len(label)] = label
        free_from = at + len(label) + (1 if every else 3)
    return Text("".join(cells), _style(view, DIM))


def _legend(parts: list[tuple[str, Ink]], view: View) -> Text:
    """Words in the colour of what they name, or after its letter."""
    return Text("  ").join([Text(text if view.color else f"{ink.letter} {text}", _style(view, ink.color)) for text, ink in parts])


def _as_many_as_fit(parts: list[Text], width: int) -> Text:
    while len(parts) > 1 and sum(part.cell_len + 2 for part in parts) - 2 > width:
        parts = parts[:-1]
    return Text("  ").join(parts)


def _chosen(prompts: list[PromptView], view: View) -> PromptView:
    return next((prompt for prompt in prompts if prompt.prompt_id == view.prompt_id), prompts[0])


def _neighbour(ids: list, current: object, step: int, none: object):
    if not ids:
        return none
    place = ids.index(current) if current in ids else 0
    return ids[max(0, min(len(ids) - 1, place + step))]


def _ink(state: str) -> Ink:
    return STATE_INKS.get(state, ENDED)


def _style(view: View, style: str) -> str:
    return style if view.color else ""


def _clock(seconds: float) -> str:
    return strftime("%H:%M:%S", localtime(seconds)) if seconds > 1e8 else f"{int(seconds // 60)}:{int(seconds % 60):02d}"
