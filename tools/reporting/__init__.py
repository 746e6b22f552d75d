"""Reads a run's directory and draws its contents. Driven by `tools.report`."""
