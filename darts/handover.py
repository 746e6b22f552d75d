"""Training groups between opening and hand-over: how many are outstanding, which are ready, which are due.

Owns the tables behind the lag bound; `darts.staleness` has the arithmetic and why it suffices. Driven by `darts.core.Core`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from darts import staleness
from darts.groups import Group, GroupState


class Handover:
    """Outstanding groups by floor, earliest deadline first. `learner_version` and `steps_left` are the learner's clock."""

    def __init__(self, max_lag: int, groups_per_step: int, steps_per_version: int) -> None:
        self.max_lag, self.groups_per_step, self.steps_per_version = (
            max_lag,
            groups_per_step,
            steps_per_version,
        )
        self.learner_version = -1
        self.steps_left = 0  # batches that the learner still takes before it publishes
        self.num_outstanding = 0  # opened, and not yet handed over
        self.num_ready = 0  # of those, with their selection decided
        self._by_floor: dict[int, dict[int, Group]] = {}
        self._ready: list[
            tuple[int, int, Group]
        ] = []  # heap of (floor, id, group); the dropped ones are passed over

    def published(self, version: int) -> None:
        self.learner_version, self.steps_left = version, self.steps_per_version

    def has_room(self, floor: int) -> bool:
        """Whether one more group of this floor can still be handed over within the bound, after all that are outstanding."""
        left = staleness.handovers_left(
            floor,
            self.learner_version,
            self.steps_left,
            self.max_lag,
            self.groups_per_step,
            self.steps_per_version,
        )
        return self.learner_version >= 0 and self.num_outstanding < left

    def add(self, group: Group) -> None:
        self._by_floor.setdefault(group.floor, {})[group.group_id] = group
        self.num_outstanding += 1
        if group.state is GroupState.READY:
            self.ready(group)

    def ready(self, group: Group) -> None:
        self.num_ready += 1
        heapq.heappush(self._ready, (group.floor, group.group_id, group))

    def remove(self, group: Group) -> None:
        """Handed over or dropped; to be called before its state says so."""
        self.num_outstanding -= 1
        self.num_ready -= group.state is GroupState.READY
        same_floor = self._by_floor[group.floor]
        del same_floor[group.group_id]
        if not same_floor:
            del self._by_floor[group.floor]

    def due(self) -> list[Group]:
        """Groups that the next publication would make too old: they must be in the batch about to be handed over."""
        return self._of_floors(
            staleness.is_due(f, self.learner_version, self.steps_left, self.max_lag)
            for f in self._floors()
        )

    def stale(self) -> list[Group]:
        """Groups too old already. Only after a learner came back at a later version: in the normal course none is left behind."""
        return self._of_floors(
            staleness.is_stale(f, self.learner_version, self.max_lag) for f in self._floors()
        )

    def take_batch(self) -> list[Group]:
        """The batch for the learner, oldest first, if it is complete and holds every group that is due; otherwise empty."""
        if self.num_ready < self.groups_per_step or any(
            group.state is GroupState.OPEN for group in self.due()
        ):
            return []
        batch: list[Group] = []
        while len(batch) < self.groups_per_step:
            group = heapq.heappop(self._ready)[2]
            if group.state is GroupState.READY:
                self.remove(group)
                group.move(GroupState.HANDED)
                batch.append(group)
        self.steps_left -= 1
        return batch

    def _floors(self) -> list[int]:
        return sorted(self._by_floor)

    def _of_floors(self, chosen: Iterator[bool]) -> list[Group]:
        return [
            group
            for floor, yes in zip(self._floors(), chosen, strict=True)
            if yes
            for group in self._by_floor[floor].values()
        ]
