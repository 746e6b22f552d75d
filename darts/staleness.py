"""How stale a trajectory may get: admission pacing, and the hard bound it makes feasible. Pure functions.

A group's *floor* is the policy version of its engine when it opened; every rollout of the group is sampled by that version
or a newer one, so a group handed over at learner version v has lag at most v - floor. Its *deadline* is floor + max_lag.

Why the bound can always be kept: a group opens only if all outstanding groups, itself included, fit into the hand-overs
that remain up to its deadline. Taking the earliest deadline first, each step's batch then has room for every group that
is due, and a batch whose due groups are not ready waits for them (or drops them): see `Core`.
Differs from counting admissions against the learner's version, as published elsewhere: an engine that has not yet swapped
opens groups that are stale from the start, so its own version is what counts.
"""

from __future__ import annotations


def handovers_left(
    floor: int,
    learner_version: int,
    steps_left: int,
    max_lag: int,
    groups_per_step: int,
    steps_per_version: int,
) -> int:
    """Groups that can still be handed over while a group with this floor is within `max_lag`.

    steps_left: batches that the learner will still take before it publishes its next version.
    """
    later_versions = floor + max_lag - learner_version
    if later_versions < 0:
        return 0
    return groups_per_step * (steps_left + later_versions * steps_per_version)


def is_due(floor: int, learner_version: int, steps_left: int, max_lag: int) -> bool:
    """Whether the next publication pushes a group past the bound, unless the batch about to be handed over has it."""
    return steps_left <= 1 and floor + max_lag <= learner_version


def is_stale(floor: int, learner_version: int, max_lag: int) -> bool:
    """Whether handing the group over now would break the bound."""
    return learner_version - floor > max_lag
