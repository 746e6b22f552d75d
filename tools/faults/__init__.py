"""Injects seeded faults into the processes of a run, and recounts the run afterwards."""
