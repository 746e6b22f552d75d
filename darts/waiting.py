"""Which side of a run waits for the other, in words.

Reads the core and never changes it.
"""

from __future__ import annotations

from darts.core import Core


def describe(core: Core) -> str:
    """One line, or "" if neither side waits."""
    if core.requested_step is not None:
        return f"learner waits for {_missing(core)}"
    if core.admission_paused:
        return "actors wait for the learner: the trajectory store is full"
    if core.num_pending and core.policy_version >= 0 and not core.run_ended and _has_idle(core):
        return (
            f"actors wait for the learner: {core.num_outstanding} groups outstanding "
            f"at version {core.policy_version}"
        )
    return ""


def _missing(core: Core) -> str:
    if groups := core.outstanding.seated():
        return f"group {groups[0].group_id} (lag bound), {len(groups)} due in total"
    if not core.engines.by_id:
        return "actors: no engine has joined"
    wanted = core.config.groups_per_step
    missing = core.outstanding.num_missing - core.num_ready
    return f"actors: {missing} of {wanted} groups missing"


def _has_idle(core: Core) -> bool:
    return any(engine.has_room for engine in core.engines.by_id.values())
