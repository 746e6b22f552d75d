"""An engine's hello, compared with the core's table: is it the process that the core knows, and
which rollouts do the two have?

Pure functions, which change nothing. Driven by `buffer.engine_side`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from buffer.wire.messages import EngineHello
from darts import events as ev
from darts.core import Core
from darts.state.groups import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled:
    """Rollouts by what is to be done about them, each in one list."""

    resend: list[int]  # it goes on: the engine sends the tokens that the buffer lacks
    launch: list[int]  # its launch was lost
    cancel: list[int]  # it was cancelled, which the engine may not have heard
    stopped: list[int]  # it was cancelled, and the engine has none of it
    forget: list[int]  # it is over, or went to another engine


def reconcile(in_flight: Mapping[int, bool], listed: Collection[int]) -> Reconciled:
    """`in_flight`: the core's rollouts on this engine, and whether each runs or is cancelled.
    `listed`: those that the engine has.
    """
    running = [rollout_id for rollout_id, runs in in_flight.items() if runs]
    cancelled = [rollout_id for rollout_id, runs in in_flight.items() if not runs]
    return Reconciled(
        resend=[i for i in running if i in listed],
        launch=[i for i in running if i not in listed],
        cancel=[i for i in cancelled if i in listed],
        stopped=[i for i in cancelled if i not in listed],
        forget=[i for i in listed if i not in in_flight],
    )


def is_same_process(incarnation: str, hello: EngineHello, core: Core) -> bool:
    """Whether it is the process that the core knows under this name.

    A restarted buffer knows no incarnations (""). Then it is the same if its policy is: a new
    process starts without one, and nothing is launched on it before it has loaded one.
    """
    engine = core.engines.by_id[hello.engine_id]
    return incarnation in ("", hello.incarnation) and (
        engine.engine_type == hello.engine_type
        and engine.slots == hello.slots
        and engine.version <= hello.policy_version <= core.policy_version
    )


def launch_again(rollout: Rollout) -> ev.Launch:
    """The decision that launched it; its tokens so far are held under its own number."""
    group = rollout.group
    return ev.Launch(
        rollout_id=rollout.rollout_id,
        group_id=group.group_id,
        prompt_id=group.prompt.prompt_id,
        visit=group.prompt.visit,
        index=rollout.index,
        draw=rollout.draw,
        purpose=group.purpose,
        engine_id=rollout.engine_id,
        continues=None,
    )
