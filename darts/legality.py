"""Checks of peers' reports on rollouts. Each raises `ProtocolError` and changes nothing."""

from __future__ import annotations

import math

from darts.events import ProtocolError, RolloutFinished
from darts.state.groups import Rollout


def check_length(rollout: Rollout, num_tokens: int, max_tokens: int) -> None:
    """Lengths never shrink, and never exceed `max_tokens`."""
    if not rollout.tokens <= num_tokens <= max_tokens:
        raise ProtocolError(
            f"rollout {rollout.rollout_id} reports {num_tokens} tokens: it had "
            f"{rollout.tokens}, and the limit is {max_tokens}"
        )


def check_result(rollout: Rollout, event: RolloutFinished, newest_version: int) -> None:
    """A reward is finite, and no token is older or newer than possible."""
    if not math.isfinite(event.reward):
        raise ProtocolError(
            f"rollout {rollout.rollout_id} finished with reward {event.reward}: "
            "rewards are finite numbers"
        )
    if not rollout.oldest_version <= event.oldest_version <= newest_version:
        raise ProtocolError(
            f"rollout {rollout.rollout_id} claims policy version {event.oldest_version}: it "
            f"was launched at {rollout.oldest_version} and the newest is {newest_version}"
        )
