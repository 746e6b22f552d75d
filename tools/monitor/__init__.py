"""Drawing the live state in a terminal; used by `tools.tail_monitor`."""
