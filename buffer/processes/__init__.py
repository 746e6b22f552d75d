"""The processes of a run: children, their leftovers, and requests to stop. Linux only."""
