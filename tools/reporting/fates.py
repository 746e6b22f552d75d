"""The labels and colours of a rollout's end, shared by the live monitor and the report."""

from __future__ import annotations

from typing import NamedTuple


class Fate(NamedTuple):
    label: str
    short: str  # if there is no room for the label
    on_paper: str  # colour on a light page
    on_screen: str  # colour in a terminal
    letter: str  # if there is no colour


# In this order: trained on, generated in full but left out, stopped early.
FATES = {
    "selected_short": Fate("selected, short", "short", "#12876f", "#2fbf9b", "s"),
    "selected_long": Fate("selected, long", "long", "#3d5bd9", "#6f8cff", "L"),
    "discarded": Fate("discarded", "disc", "#e3a11f", "#eeb02e", "d"),
    "truncated": Fate("truncated", "trunc", "#d5482b", "#f0604d", "t"),
    "cancelled": Fate("cancelled", "cancel", "#9aa3ad", "#7f8a97", "c"),
    "lost": Fate("lost", "lost", "#8a4bb0", "#b57edc", "x"),
}
