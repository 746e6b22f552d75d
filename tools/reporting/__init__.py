"""Reading a run's directory and drawing it; used by `tools.report` and `tools.compare`."""
