"""Processes of a run, whatever they do: children, what they leave behind, and requests to stop. Linux only."""
