"""The hard bound on the staleness of trajectories, and the pacing of admission that allows it.

A group's `min_version` is the policy version of its engine when it opened. Each of its rollouts is
sampled by that version or a newer one, so a group that ships at learner version v has a lag of at
most v - min_version. It must ship by version min_version + max_lag, its deadline.

The bound can always be kept. A group opens only if all outstanding groups, itself included, fit
into the batches that remain up to its deadline. Batches take the earliest deadlines first, and each
keeps seats for as many open groups as the later ones could not hold. It waits for them or, at their
deadline, releases or drops them (see `Core`). Differs: published methods count admissions against
the learner's version. Here the engine's own version counts, because an engine that has not yet
swapped opens groups that are stale from the start.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from darts.state.groups import Group, GroupState


def ships_left(
    min_version: int,
    learner_version: int,
    steps_left: int,
    max_lag: int,
    groups_per_step: int,
    steps_per_version: int,
) -> int:
    """Groups that can still ship while a group of `min_version` is within `max_lag`.

    `steps_left` is the number of batches that the learner takes before it publishes again.
    """
    later_versions = min_version + max_lag - learner_version
    if later_versions < 0:
        return 0
    return groups_per_step * (steps_left + later_versions * steps_per_version)


def is_stale(min_version: int, learner_version: int, max_lag: int) -> bool:
    """Whether shipping the group now would break the bound."""
    return learner_version - min_version > max_lag


class OutstandingGroups:
    """Training groups that have opened and not yet shipped, in order of their deadlines.

    Owns the learner's clock as well: `learner_version` is its newest published version (-1 before
    the first), and `steps_left` the number of batches that it takes before it publishes again. A
    batch that is taken in portions counts in `steps_left` until it is full, and `num_taken` of its
    groups have shipped until then.
    """

    def __init__(self, groups_per_step: int, steps_per_version: int, max_lag: int = 0) -> None:
        self.max_lag = max_lag
        self.groups_per_step = groups_per_step
        self.steps_per_version = steps_per_version
        self.learner_version = -1
        self.steps_left = 0
        self.num_taken = 0  # groups of the open batch that have shipped; 0 if no batch is open
        self.num_outstanding = 0
        self.num_ready = 0  # outstanding groups whose selection is decided
        self._by_min_version: dict[int, dict[int, Group]] = {}
        self._num_open: Counter[int] = Counter()  # undecided groups by their minimum version
        # A heap of (min_version, id, group). Groups dropped in the meantime are skipped.
        self._ready: list[tuple[int, int, Group]] = []

    def __iter__(self) -> Iterator[Group]:
        for same_version in self._by_min_version.values():
            yield from same_version.values()

    def __contains__(self, group: Group) -> bool:
        return group.group_id in self._by_min_version.get(group.min_version, {})

    def published(self, version: int) -> None:
        self.learner_version, self.steps_left = version, self.steps_per_version

    def has_room(self, min_version: int) -> bool:
        """Whether one more group can ship within the bound, after all that are outstanding."""
        left = self._ships_left(min_version)
        return self.learner_version >= 0 and self.num_taken + self.num_outstanding < left

    def add(self, group: Group) -> None:
        self._by_min_version.setdefault(group.min_version, {})[group.group_id] = group
        self._num_open[group.min_version] += 1
        self.num_outstanding += 1
        if group.state is GroupState.READY:
            self.ready(group)

    def ready(self, group: Group) -> None:
        """Call this when the group is decided."""
        self._num_open[group.min_version] -= 1
        self.num_ready += 1
        heapq.heappush(self._ready, (group.min_version, group.group_id, group))

    def remove(self, group: Group) -> None:
        """Call this when the group ships or is dropped, before its state changes."""
        self.num_outstanding -= 1
        if group.state is GroupState.READY:
            self.num_ready -= 1
        else:
            self._num_open[group.min_version] -= 1
        same_version = self._by_min_version[group.min_version]
        del same_version[group.group_id]
        if not same_version:
            del self._by_min_version[group.min_version], self._num_open[group.min_version]

    def seated(self) -> list[Group]:
        """Open groups for which the present or next batch keeps seats, in order of deadlines.

        Of the open groups up to each deadline, as many as the batches after that one cannot hold.
        """
        num_seats = num_open = 0
        for version in sorted(self._num_open):
            num_open += self._num_open[version]
            num_seats = max(num_seats, num_open - self._seats_later(version))
        if not num_seats:
            return []
        in_order = (
            group
            for version in sorted(self._by_min_version)
            for group in self._by_min_version[version].values()
            if group.state is GroupState.OPEN
        )
        return list(islice(in_order, num_seats))

    def due(self) -> list[Group]:
        """Open groups at their deadline: the next publication makes all of them too old."""
        return [group for group in self.seated() if not self._seats_later(group.min_version)]

    def stale(self) -> list[Group]:
        """Groups that are too old already, which exist only after a learner died."""
        return [
            group
            for version in sorted(self._by_min_version)
            if is_stale(version, self.learner_version, self.max_lag)
            for group in self._by_min_version[version].values()
        ]

    def releasable(self) -> list[Group]:
        """Open groups at their deadline, if the learner waits for nothing else.

        Until every one of them has enough responses, and the batch is full with them, releasing
        one would end its long responses and ship no batch earlier.
        """
        seated = self.seated()
        if self.num_ready + len(seated) < self.num_missing:
            return []
        enough = all(g.at_deadline and len(g.finished) >= g.group_size for g in seated)
        return seated if enough else []

    @property
    def num_missing(self) -> int:
        """Groups that the learner's present or next batch still lacks."""
        return self.groups_per_step - self.num_taken

    def take_portion(self, stream: bool) -> list[Group]:
        """The next portion of the learner's batch, oldest first.

        With `stream`, all ready groups for which the batch has room besides the seats that it
        keeps. Otherwise the whole batch, and nothing until it is full and keeps no seat.
        """
        size = min(self.num_ready, self.num_missing - len(self.seated()))
        if size < (1 if stream else self.num_missing):
            return []
        portion: list[Group] = []
        while len(portion) < size:
            group = heapq.heappop(self._ready)[2]
            if group.state is GroupState.READY:
                self.remove(group)
                group.move(GroupState.SHIPPED)
                portion.append(group)
        self.num_taken += size
        if self.num_taken == self.groups_per_step:
            self.num_taken = 0
            self.steps_left -= 1
        return portion

    def _seats_later(self, min_version: int) -> int:
        """Seats after the present or next batch, up to the deadline of groups of this version."""
        return max(0, self._ships_left(min_version) - self.groups_per_step)

    def _ships_left(self, min_version: int) -> int:
        return ships_left(
            min_version,
            self.learner_version,
            self.steps_left,
            self.max_lag,
            self.groups_per_step,
            self.steps_per_version,
        )
