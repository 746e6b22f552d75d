"""The panels of the monitor, one function each: (LiveState, View, width, height) -> lines.

A panel returns at most `height` lines. Pure: reads no clock, socket or keyboard. Laid out by
`tools.monitor.frame`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from rich.text import Text

from buffer.wire.messages import GroupView, LiveState, PromptView
from tools.monitor.charts import (
    Bar,
    Ink,
    bars_per_line,
    counts_in_log_bins,
    fitted,
    growing_bars,
    nice_ceiling,
    printable,
    race_track,
    sparkline,
    stacked_columns,
)
from tools.reporting.ends import ENDS

Order = Literal["spread", "budget", "pass_rate"]
Page = Literal["panels", "help", "waits"]


RIGHT, WRONG = Ink("#2fbf9b", "+"), Ink("#f0604d", "-")
RUNNING, ENDED = Ink("#4cc3f7", ">"), Ink("#a7e3c4", "=")
STATE_INKS = {name: Ink(end.on_screen, end.letter) for name, end in ENDS.items()} | {
    "running": RUNNING
}
DIM, TITLE = "bright_black", "bold"


@dataclass(frozen=True)
class View:
    """The choices of the user, and the properties of the terminal."""

    color: bool = True
    prompt_id: str = ""  # "": the first prompt of the table
    group_id: int = -1  # -1: the first group in flight
    order: Order = "spread"
    page: Page = "panels"
    silent_s: float = 0.0  # seconds since the last state
    source: str = ""  # such as "replay ×4"; "" for a live run


def ordered(prompts: list[PromptView], order: Order) -> list[PromptView]:
    """Largest spread or budget first, or lowest pass rate first.

    Ties are ordered by id, so that rows do not jump.
    """
    sign = 1 if order == "pass_rate" else -1
    # A prompt that was drawn again replaces its older row.
    latest = {prompt.prompt_id: prompt for prompt in prompts}
    return sorted(
        latest.values(), key=lambda prompt: (sign * getattr(prompt, order), prompt.prompt_id)
    )


def pattern(prompt: PromptView) -> str:
    """I if E[length | right] <= E[length | wrong], II if not, "" if there is nothing to compare.

    Source: DARTS (arXiv 2605.30859), ineffective verbosity and necessary depth.
    """
    if not prompt.lengths_right or not prompt.lengths_wrong:
        return ""
    return "I" if fmean(prompt.lengths_right) <= fmean(prompt.lengths_wrong) else "II"


def lengths_panel(snapshot: LiveState, view: View, width: int, height: int) -> list[Text]:
    """Recent rollouts by length, stacked by how they ended, with a legend that counts them."""
    names = [name for name in ENDS if name in snapshot.histogram]
    filled = [
        place
        for place, counts in enumerate(
            zip(*(snapshot.histogram[name] for name in names), strict=True)
        )
        if any(counts)
    ]
    if not filled:
        return [Text("no group has closed yet", style(view, DIM))]
    shown = slice(filled[0], filled[-1] + 1)
    layers, inks = (
        [snapshot.histogram[name][shown] for name in names],
        [_ink(name) for name in names],
    )
    present = [
        (ENDS[name], ink, sum(layer))
        for name, layer, ink in zip(names, layers, inks, strict=True)
        if any(layer)
    ]
    texts = [[f"{end.label} {count}" for end, _, count in present]]
    texts += [[f"{end.label.removeprefix('selected, ')} {count}" for end, _, count in present]]
    texts += [
        [f"{end.short} {count}" for end, _, count in present],
        [end.short for end, _, _ in present],
    ]
    legends = [
        _legend([(text, ink) for text, (_, ink, _) in zip(words, present, strict=True)], view)
        for words in texts
    ]
    legend = next((legend for legend in legends if legend.cell_len <= width), legends[-1])
    return [
        legend,
        *stacked_columns(layers, inks, width, height - 2, view.color),
        _axis(snapshot.histogram_edges[shown], len(layers[0]), width, view),
    ]


def groups_panel(snapshot: LiveState, view: View, width: int, height: int) -> list[Text]:
    """Groups in flight, from the chosen one on.

    The first groups are drawn as growing bars while there is room, the others as one track each.
    """
    if not snapshot.groups:
        return [Text("no group is in flight", style(view, DIM))]
    ids = [group.group_id for group in snapshot.groups]
    start = ids.index(view.group_id) if view.group_id in ids else 0
    groups = snapshot.groups[start:] + snapshot.groups[:start]
    bar_lines = [-(-len(group.rollouts) // bars_per_line(view.color)) for group in groups]
    rows, drawn_in_full = min(len(groups), height), 0
    least_tracks = min(len(groups) - 1, 1)
    while (
        drawn_in_full < len(groups)
        and drawn_in_full + 1 + least_tracks + sum(bar_lines[: drawn_in_full + 1]) <= height
    ):
        drawn_in_full += 1
    lines: list[Text] = []
    for place, group in enumerate(groups[:rows]):
        lines.append(_group_line(group, width, view, track=place >= drawn_in_full))
        lines += _bars(group, width, view) if place < drawn_in_full else []
    return lines[:height]


COLUMNS: dict[str, tuple[int, Callable[[PromptView, list[int]], str]]] = {
    "median": (7, lambda prompt, lengths: f"{median(lengths):.0f}" if lengths else "–"),
    "p99": (6, lambda prompt, lengths: f"{_p99(lengths)}" if lengths else "–"),
    "cut": (4, lambda prompt, lengths: f"{prompt.num_cancelled}"),
    "pass": (6, lambda prompt, lengths: f"{prompt.pass_rate:.0%}"),
    "pattern": (8, lambda prompt, lengths: pattern(prompt) or "–"),
    "spread": (7, lambda prompt, lengths: f"{prompt.spread:.2f}"),
    "budget": (7, lambda prompt, lengths: f"{prompt.budget}"),
}  # heading -> width and value; a narrow panel shows the first ones
NUM_LAST = 2  # of the columns, shown if there is room beside the lengths
NAME, MOST_NAME, SPARK = 14, 32, 24  # cells: least and most of a prompt, most of its lengths


def prompts_panel(snapshot: LiveState, view: View, width: int, height: int) -> list[Text]:
    """Recently closed prompts, their lengths on one axis. The chosen row stays visible."""
    shown, left = _fitting(list(COLUMNS)[:-NUM_LAST], width - NAME)
    spark = min(left - 2, SPARK) if left >= 10 else 0
    more, left = _fitting(list(COLUMNS)[-NUM_LAST:], left - (spark + 2 if spark else 0))
    shown |= more
    name = min(NAME + left, MOST_NAME)
    prompts = ordered(snapshot.prompts, view.order)
    lengths = {p.prompt_id: p.lengths_right + p.lengths_wrong for p in prompts}
    everything = [length for values in lengths.values() for length in values]
    low, high = min(everything, default=1), max([1, *everything])
    heading = f"{'prompt':<{name}}" + "".join(f"{key:>{cells}}" for key, cells in shown.items())
    axis = f"{low}" + f"{high}".rjust(spark - len(f"{low}")) if everything else ""
    lines = [Text((heading + (f"  {axis}" if spark else ""))[:width], style(view, DIM))]
    if not prompts:
        return [*lines, Text("no prompt has closed yet", style(view, DIM))]
    chosen = _chosen(prompts, view)
    visible = max(height - 1, 1)
    top = max(0, min(prompts.index(chosen) - visible // 2, len(prompts) - visible))
    for prompt in prompts[top : top + visible]:
        mark = "" if view.color or prompt is not chosen else ">"
        own = lengths[prompt.prompt_id]
        row = fitted(Text(mark + printable(prompt.text or prompt.prompt_id)), name).plain
        row += "".join(f"{COLUMNS[key][1](prompt, own):>{cells}}" for key, cells in shown.items())
        line = Text(row, style(view, "reverse") if prompt is chosen else "")
        if spark and own:  # in reverse, columns and gaps would change places
            line = Text("  ").join(
                [line, Text(sparkline(counts_in_log_bins(own, low, high, spark), spark))]
            )
        lines.append(fitted(line, width))
    return lines


def _fitting(headings: list[str], left: int) -> tuple[dict[str, int], int]:
    """The first columns that fit into `left` cells, with their widths, and the cells then left."""
    shown: dict[str, int] = {}
    for heading in headings:
        cells = COLUMNS[heading][0]
        if cells > left:
            break
        shown[heading], left = cells, left - cells
    return shown, left


def _p99(lengths: list[int]) -> int:
    return sorted(lengths)[-(-99 * len(lengths) // 100) - 1]


def prompt_title(snapshot: LiveState, view: View) -> str:
    """The chosen prompt and its pattern."""
    if not snapshot.prompts:
        return "Prompt"
    prompt = _chosen(ordered(snapshot.prompts, view.order), view)
    kinds = {"I": "pattern I, verbosity", "II": "pattern II, depth", "": "no pattern"}
    name = printable(prompt.text or prompt.prompt_id)
    return f"Prompt {fitted(Text(name), min(len(name), 14)).plain}: {kinds[pattern(prompt)]}"


def prompt_panel(snapshot: LiveState, view: View, width: int, height: int) -> list[Text]:
    """The lengths of the chosen prompt's right and wrong responses."""
    if not snapshot.prompts:
        return [Text("no prompt has closed yet", style(view, DIM))]
    prompt = _chosen(ordered(snapshot.prompts, view.order), view)
    lengths = prompt.lengths_right + prompt.lengths_wrong
    if not lengths:
        return [Text("no response has finished", style(view, DIM))]
    parts = (("right", prompt.lengths_right, RIGHT), ("wrong", prompt.lengths_wrong, WRONG))
    legend = _legend(
        [
            (f"{len(values)} {name}, mean {fmean(values):.0f}", ink)
            for name, values, ink in parts
            if values
        ],
        view,
    )
    bins = max(4, min(24, width // 3))
    low, high = max(min(lengths), 1), max(*lengths, min(lengths) + 1, 2)
    layers = [counts_in_log_bins(values, low, high, bins) for _, values, _ in parts]
    edges = [round(low * (high / low) ** (place / bins)) for place in range(bins + 1)]
    return [
        legend,
        *stacked_columns(layers, [RIGHT, WRONG], width, max(height - 2, 1), view.color),
        _axis(edges, bins, width, view),
    ]


def lag_panel(snapshot: LiveState, view: View, width: int, height: int) -> list[Text]:
    """Lags of recently shipped trajectories. Any lag beyond the bound, which is a bug, is red."""
    if not snapshot.lags:
        return [Text("no trajectory has been shipped yet", style(view, DIM))]
    last = max(snapshot.max_lag, *snapshot.lags)
    counts = [snapshot.lags.count(lag) for lag in range(last + 1)]
    within = [count if lag <= snapshot.max_lag else 0 for lag, count in enumerate(counts)]
    beyond = [count if lag > snapshot.max_lag else 0 for lag, count in enumerate(counts)]
    chart = stacked_columns(
        [within, beyond],
        [Ink("#6f8cff", "#"), Ink("#f0604d", "!")],
        width,
        max(height - 1, 1),
        view.color,
    )
    return [*chart, _axis(list(range(last + 2)), last + 1, width, view, every=True)]


def engines_panel(snapshot: LiveState, view: View, width: int, height: int) -> list[Text]:
    """Per engine: slots in use, speed, version, and its latency per token over the batch size."""
    if not snapshot.engines:
        return [Text("no engine has joined", style(view, DIM))]
    name = min(max(len(engine.engine_id) for engine in snapshot.engines), 16, max(width - 32, 4))
    gauge = max(0, min(width - name - 52, 24))
    lines = []
    for engine in snapshot.engines[: height if len(snapshot.engines) <= height else height - 1]:
        line = fitted(Text(printable(engine.engine_id)), name)
        line.append(f" {f'{engine.in_flight}/{engine.slots}':>7} ")
        if gauge:
            full = round(gauge * min(engine.in_flight / max(engine.slots, 1), 1))
            line.append("━" * full, style(view, RUNNING.color)).append(
                "─" * (gauge - full) + " ", style(view, DIM)
            )
        version = f"v{engine.policy_version}" if engine.policy_version >= 0 else "loading"
        line.append(f"{engine.tokens_per_s:>6.0f}/s {version:<4} ")
        latencies = [latency for _, latency in sorted(engine.curve)]
        spark = max(0, min(12, width - line.cell_len - (22 if gauge else 1)))
        line.append(
            sparkline(latencies, min(spark, len(latencies))) if latencies else "",
            style(view, "#eeb02e"),
        )
        if latencies and gauge:
            line.append(f" {min(latencies):.1f}–{max(latencies):.1f} ms/token", style(view, DIM))
        lines.append(line)
    hidden = len(snapshot.engines) - len(lines)
    return lines + ([Text(f"and {hidden} more", style(view, DIM))] if hidden else [])


def _group_line(group: GroupView, width: int, view: View, track: bool) -> Text:
    states = [rollout.state for rollout in group.rollouts]
    running, cancelled = states.count("running"), states.count("cancelled")
    line = fitted(
        Text(printable(group.text or group.prompt_id), "bold" if not track and view.color else ""),
        min(16, max(width // 4, 4)),
    )
    line.append(
        f" {len(states) - running - cancelled:>2}/{group.budget:<2}" + (" " if track else "")
    )
    if track:
        line.append_text(
            race_track(
                _rollout_bars(group),
                _scale(group),
                group.short_cutoff,
                max(width - line.cell_len, 4),
                view.color,
            )
        )
        return line
    facts = [line]
    if group.short_cutoff:
        facts.append(Text(f"cut {group.short_cutoff}", style(view, "bright_white")))
    if cancelled:
        facts.append(Text(f"{cancelled} cancelled", style(view, ENDS["cancelled"].on_screen)))
    if running:
        facts.append(Text(f"{running} running", style(view, RUNNING.color)))
    scale = f"{_scale(group)} ▏"  # the length that a full bar stands for
    line = fitted(as_many_as_fit(facts, width - len(scale) - 1), width - len(scale))
    return line.append(scale, style(view, DIM))


def _bars(group: GroupView, width: int, view: View) -> list[Text]:
    return growing_bars(
        _rollout_bars(group), _scale(group), group.short_cutoff, width - 1, view.color
    )


def _rollout_bars(group: GroupView) -> list[Bar]:
    return [Bar(rollout.tokens, _ink(rollout.state)) for rollout in group.rollouts]


def _scale(group: GroupView) -> int:
    return nice_ceiling(max([group.short_cutoff, *(rollout.tokens for rollout in group.rollouts)]))


def _axis(edges: list[int], bins: int, width: int, view: View, every: bool = False) -> Text:
    """As many lower edges as fit, each below its column.

    Mirrors how `stacked_columns` merges and spaces its bins.
    """
    merged = -(-bins // max(width, 1)) or 1
    pitch = max(width // max(-(-bins // merged), 1), 1)
    cells = [" "] * width
    free_from = 0
    for place in range(len(edges)):
        at, label = place // merged * pitch, str(edges[place])
        repeated = place > 0 and edges[place] == edges[place - 1]
        if place >= bins or repeated or at < free_from or at + len(label) > width:
            continue
        cells[at : at + len(label)] = label
        free_from = at + len(label) + (1 if every else 3)
    return Text("".join(cells), style(view, DIM))


def _legend(parts: list[tuple[str, Ink]], view: View) -> Text:
    """Each word in the colour of its layer, or after the layer's letter."""
    return Text("  ").join(
        [
            Text(text if view.color else f"{ink.letter} {text}", style(view, ink.color))
            for text, ink in parts
        ]
    )


def as_many_as_fit(parts: list[Text], width: int) -> Text:
    while len(parts) > 1 and sum(part.cell_len + 2 for part in parts) - 2 > width:
        parts = parts[:-1]
    return Text("  ").join(parts)


def _chosen(prompts: list[PromptView], view: View) -> PromptView:
    return next((prompt for prompt in prompts if prompt.prompt_id == view.prompt_id), prompts[0])


def _ink(state: str) -> Ink:
    return STATE_INKS.get(state, ENDED)


def style(view: View, style: str) -> str:
    return style if view.color else ""
