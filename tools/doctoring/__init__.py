"""Checks of an installation and a machine, and the sizing of a run. Driven by `tools.doctor`."""
