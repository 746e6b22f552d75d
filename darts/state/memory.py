"""The pools of length and reward statistics, and the statistics of a prompt after each group.

Owns the pools, which serve as priors for prompts without history. A prompt's own statistics belong
to the journal and come back with its next draw. Driven by `darts.core.Core`.
"""

from __future__ import annotations

from dataclasses import replace

from darts import events as ev
from darts.config import CoreConfig
from darts.sizing import lengths, moving_average, rewards
from darts.state.groups import Group

# A group that was complete ends a series of stops, and one that was dropped early leaves it as is.
COMPLETE: tuple[ev.GroupEnd, ...] = ("shipped", "uniform")


class Memory:
    """Statistics of all prompts together, for drivers and rules to read."""

    def __init__(self, config: CoreConfig) -> None:
        ema = config.variance == "ema"
        self.lengths = moving_average.POOL_PRIOR if ema else lengths.POOL_PRIOR
        self.rewards = rewards.POOL_PRIOR

    def learn(self, group: Group, end: ev.GroupEnd, config: CoreConfig) -> list[ev.Decision]:
        """Learn from a training group, and return the statistics to keep.

        Rewards are kept only for pilots, the one rule that reads them.
        """
        decisions = self._learn_lengths(group, config)
        if config.pilot:
            decisions += self._learn_rewards(group, end)
        return decisions

    def _learn_lengths(self, group: Group, config: CoreConfig) -> list[ev.Decision]:
        prompt = group.prompt
        if config.variance == "ema":
            ended = group.ended_lengths()
            if len(ended) < 2:
                return []
            stats = moving_average.update(prompt.lengths, ended, config.alpha)
            self.lengths = moving_average.update_pool(self.lengths, stats)
        else:
            finished, bounds = group.observed_lengths()
            if not finished and not bounds:
                return []
            stats = lengths.update(prompt.lengths, finished, bounds, self.lengths)
            self.lengths = lengths.update_pool(self.lengths, stats)
        group.prompt = replace(prompt, lengths=stats)
        return [
            ev.RememberLengths(prompt.prompt_id, stats),
            ev.RememberLengths("", self.lengths),
        ]

    def _learn_rewards(self, group: Group, end: ev.GroupEnd) -> list[ev.Decision]:
        prompt, responses = group.prompt, group.responses()
        num_stops = prompt.rewards.num_stops if prompt.rewards else 0
        if end == "no_signal":
            num_stops += 1
        elif end in COMPLETE:
            num_stops = 0
        stats = rewards.update(prompt.rewards, responses, num_stops)
        self.rewards = rewards.update_pool(self.rewards, responses)
        group.prompt = replace(prompt, rewards=stats)
        return [ev.RememberRewards(prompt.prompt_id, stats)]
