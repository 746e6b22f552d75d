"""How a rollout's end is shown, the same in the live monitor and in the report. Owns nothing else."""

from __future__ import annotations

from typing import NamedTuple


class Fate(NamedTuple):
    label: str
    short: str  # where there is no room for the label
    on_paper: str  # colour on a light page
    on_screen: str  # colour in a terminal
    letter: str  # where there is no colour


# Trained on first, then paid for and left out, then stopped before it was paid for.
FATES = {
    "selected_short": Fate("selected, short", "short", "#12876f", "#2fbf9b", "s"),
    "selected_long": Fate("selected, long", "long", "#3d5bd9", "#6f8cff", "L"),
    "discarded": Fate("discarded", "disc", "#e3a11f", "#eeb02e", "d"),
    "truncated": Fate("truncated", "trunc", "#d5482b", "#f0604d", "t"),
    "cancelled": Fate("cancelled", "cancel", "#9aa3ad", "#7f8a97", "c"),
    "lost": Fate("lost", "lost", "#8a4bb0", "#b57edc", "x"),
}
