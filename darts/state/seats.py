"""The seats of a group whose rollouts have ended, by the configured policy.

Owns the choice among the rules of `darts.selection`, and the group's generator. Driven by
`darts.core.Core`.
"""

from __future__ import annotations

from random import Random

from darts.config import CoreConfig
from darts.events import Prompt
from darts.selection import select_dual_end, select_efficient, select_random
from darts.sizing.rewards import has_signal
from darts.state.groups import Group


def fill_seats(group: Group, config: CoreConfig) -> None:
    """Set the group's selection, or leave it None if too few rollouts can be selected."""
    seats = group.group_size, group.num_long, config.fill_truncated
    if config.policy == "random":
        rng = generator(group, config.seed)
        group.selection = select_random(group.finished, group.truncated, *seats, rng)
    elif config.by_efficiency:
        group.selection = select_efficient(
            group.finished,
            group.truncated,
            group.group_size,
            config.fill_truncated,
            group.rewards(),
        )
    else:
        group.selection = select_dual_end(group.finished, group.truncated, *seats)
    if group.selection is not None:
        group.is_uniform = not has_signal(group.selected_rewards(), config.min_spread)


def is_audited(prompt: Prompt, config: CoreConfig) -> bool:
    """Whether nothing is cancelled in the group of this visit, drawn by the seed."""
    if not config.audit:
        return False  # without the seeding of a generator, which takes long
    draw = Random(f"audit {config.seed} {prompt.prompt_id} {prompt.visit}").random()
    return draw < config.audit


def generator(group: Group, seed: int) -> Random:
    """The generator that breaks the group's ties and draws its random control.

    It depends on the prompt's visit alone, so no generator has a state that must be saved.
    """
    return Random(f"{seed} {group.prompt.prompt_id} {group.prompt.visit}")
