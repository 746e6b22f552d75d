"""Typed configuration: one strict schema for every process of a run."""
