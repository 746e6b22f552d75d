"""The labels and colours of a rollout's end, shared by the live monitor and the report."""

from __future__ import annotations

from typing import NamedTuple


class ShownEnd(NamedTuple):
    label: str
    short: str  # if there is no room for the label
    on_paper: str  # colour on a light page
    on_screen: str  # colour in a terminal
    letter: str  # if there is no colour


# In this order: trained on, generated in full but left out, stopped early.
ENDS = {
    "selected_short": ShownEnd("selected, short", "short", "#12876f", "#2fbf9b", "s"),
    "selected_long": ShownEnd("selected, long", "long", "#3d5bd9", "#6f8cff", "L"),
    "discarded": ShownEnd("discarded", "disc", "#e3a11f", "#eeb02e", "d"),
    "truncated": ShownEnd("truncated", "trunc", "#d5482b", "#f0604d", "t"),
    "cancelled": ShownEnd("cancelled", "cancel", "#9aa3ad", "#7f8a97", "c"),
    "lost": ShownEnd("lost", "lost", "#8a4bb0", "#b57edc", "x"),
}
