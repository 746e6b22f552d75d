"""Faults on purpose: the processes of a run under a seeded schedule, and the recount afterwards."""
