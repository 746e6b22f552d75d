"""Reads a run's directory and draws its contents. Used by `tools.report` and `tools.compare`."""
