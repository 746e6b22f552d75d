"""Typed configuration: one schema for every process of a run, strict about what it accepts."""
