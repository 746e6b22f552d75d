"""Draws the live state in a terminal. Used by `tools.tail_monitor`."""
