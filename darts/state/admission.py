"""Prompts that wait to be opened, with the budgets that a window gave them.

Held-out prompts go first and are bound to a policy version. Training prompts go in the order of
their visits: a prompt that returns stands before all that were drawn after it. So a synchronous run
trains each window in its own step, even if a restart returns some of it. Driven by
`darts.core.Core`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from darts.events import EvaluationRequested, Prompt
from darts.sizing.budgets import Budget, Budgeter
from darts.sizing.latency import LatencyCurve
from darts.sizing.lengths import LengthStats


class Waiting(NamedTuple):
    """A training prompt, and its budget if its window has decided it."""

    prompt: Prompt
    budget: Budget | None


class HeldOut(NamedTuple):
    """An evaluation's prompt, answered `samples` times by a policy no older than `min_version`."""

    prompt: Prompt
    samples: int
    min_version: int


class PromptQueue:
    """Prompts in the order in which they will be opened."""

    def __init__(self) -> None:
        self.training: deque[Waiting] = deque()
        self.held_out: deque[HeldOut] = deque()
        # How often each prompt was dropped and put back, until it ships.
        self.reopens: dict[str, int] = {}

    def add_window(
        self,
        prompts: Sequence[Prompt],
        budgeter: Budgeter,
        pool: LengthStats,
        curve: LatencyCurve | None,
        num_engines: int,
    ) -> None:
        """Queue the prompts by expected length, longest first.

        The longest ones thus start before slots run out. Only prompts of one window are reordered,
        so none starves. Prompts of a step that was withdrawn are drawn again; they go to their
        places among those that wait.
        """
        stats = [budgeter.estimate(prompt.lengths, pool) for prompt in prompts]
        budgets: Sequence[Budget | None] = [None] * len(prompts)
        if budgeter.by_window:
            budgets = budgeter.window(stats, pool, curve, max(1, num_engines))
        order = sorted(range(len(prompts)), key=lambda i: -stats[i].mean_log)
        newest = max((waiting.prompt.visit for waiting in self.training), default=0)
        for i in order:
            if prompts[i].visit >= newest:
                self.training.append(Waiting(prompts[i], budgets[i]))
            else:
                self._insert(Waiting(prompts[i], budgets[i]))

    def add_evaluation(self, event: EvaluationRequested) -> None:
        self.held_out.extend(
            HeldOut(prompt, event.samples, event.min_version) for prompt in event.prompts
        )

    def put_back(self, prompt: Prompt) -> None:
        """Return the prompt of a group that was dropped because of a restart."""
        self._insert(Waiting(prompt, None))

    def reopen(self, prompt: Prompt, max_reopens: int) -> bool:
        """Return the prompt of a group that failed. False if it has no reopening left."""
        reopens = self.reopens.pop(prompt.prompt_id, 0)
        if reopens >= max_reopens:
            return False
        self.reopens[prompt.prompt_id] = reopens + 1
        self.put_back(prompt)
        return True

    def _insert(self, new: Waiting) -> None:
        """Put a prompt before the first one that was drawn later."""
        visits = (waiting.prompt.visit for waiting in self.training)
        later = (place for place, visit in enumerate(visits) if visit >= new.prompt.visit)
        self.training.insert(next(later, len(self.training)), new)

    def forget(self, prompt: Prompt) -> None:
        """Forget the reopenings of a prompt whose group has ended for good."""
        self.reopens.pop(prompt.prompt_id, None)
