"""Engines, their slots and backlogs, and the choice of the engine that takes the next group.

A whole group goes to one engine, so its prompt is prefilled once and its responses grow at one
pace. The engine is the one whose predicted latency per token, at the batch it would then have, is
lowest. Among engines of one type, which share a latency curve, that is the least loaded one. A heap
finds it, so that a thousand engines cost no more than ten. Driven by `darts.core.Core`; does no
I/O.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from darts.sizing.latency import LatencyCurve
from darts.state.groups import Group, Planned, Rollout


@dataclass(slots=True, eq=False)
class Engine:
    """One engine. `backlog` holds its groups that have rollouts to launch, in launch order.

    `waiting`: the rollouts in flight that wait for their environment, and hold no slot meanwhile.
    When they go on, the engine may have more than `slots` rollouts to decode for a while.
    """

    engine_id: str
    engine_type: str
    slots: int
    version: int
    in_flight: dict[int, Rollout] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    backlog: deque[Group] = field(default_factory=deque)

    @property
    def num_decoding(self) -> int:
        """Rollouts that hold a slot."""
        return len(self.in_flight) - len(self.waiting)

    @property
    def num_queued(self) -> int:
        """Rollouts that wait here for a slot. The sum is cheap, since few groups wait at a time."""
        return sum([len(group.planned) for group in self.backlog]) if self.backlog else 0

    @property
    def load(self) -> int:
        return self.num_decoding + self.num_queued

    @property
    def has_room(self) -> bool:
        return self.load < self.slots


class Engines:
    """All engines by id.

    Every change of an engine's load or version goes through a method of this table.
    """

    def __init__(self) -> None:
        self.by_id: dict[str, Engine] = {}
        self.curves: dict[str, LatencyCurve] = {}
        self._heaps: dict[str, list[tuple[int, int, Engine]]] = {}
        self._serial = 0

    def join(self, engine: Engine) -> None:
        self.by_id[engine.engine_id] = engine
        self.curves.setdefault(engine.engine_type, LatencyCurve())
        self._heaps.setdefault(engine.engine_type, [])
        self._offer(engine)

    def leave(self, engine: Engine) -> None:
        del self.by_id[engine.engine_id]

    def load_version(self, engine: Engine, version: int) -> None:
        engine.version = version
        self._offer(engine)

    # Launching
    # ----------------------------------------------------------------------------------------------

    def enqueue(self, group: Group, first: bool = False) -> None:
        """Queue the group's planned rollouts on its engine, ahead of other groups if `first`.

        No-op if its engine is gone. The caller then takes launches until none is left.
        """
        engine = self.by_id.get(group.engine_id)
        if engine is None or group in engine.backlog:
            return
        if first:
            engine.backlog.appendleft(group)
        else:
            engine.backlog.append(group)

    def next_launch(self, engine: Engine) -> tuple[Group, Planned] | None:
        """Take the next rollout to launch, or None while no slot is free or no rollout waits."""
        if not engine.backlog or engine.num_decoding >= engine.slots:
            self._offer(engine)
            return None
        group = engine.backlog[0]
        planned = group.planned.popleft()
        if not group.planned:
            engine.backlog.popleft()
        return group, planned

    def withdraw(self, group: Group) -> None:
        """Launch none of the group's planned rollouts."""
        engine = self.by_id.get(group.engine_id)
        queued = engine is not None and group in engine.backlog
        group.planned.clear()
        if engine is not None and queued:
            engine.backlog.remove(group)
            self._offer(engine)

    def free(self, rollout: Rollout) -> Engine | None:
        """Free the rollout's slot and return its engine, which may launch another rollout.

        None if the rollout held no slot.
        """
        engine = self.by_id.get(rollout.engine_id)
        if engine is None or engine.in_flight.pop(rollout.rollout_id, None) is None:
            return None
        engine.waiting.discard(rollout.rollout_id)
        return engine

    def lend_slot(self, rollout: Rollout) -> Engine:
        """The rollout decodes nothing for now: its engine, which may launch another rollout."""
        engine = self.by_id[rollout.engine_id]
        engine.waiting.add(rollout.rollout_id)
        return engine

    def take_slot(self, rollout: Rollout) -> None:
        """The rollout decodes. No-op unless it waited."""
        engine = self.by_id[rollout.engine_id]
        if rollout.rollout_id in engine.waiting:
            engine.waiting.remove(rollout.rollout_id)
            self._offer(engine)

    # Placement
    # ----------------------------------------------------------------------------------------------

    def best_with_room(self, batch_of_group: int) -> Engine | None:
        """The engine with a free slot on which `batch_of_group` more rollouts decode fastest."""
        best, best_ms = None, float("inf")
        for engine_type, heap in self._heaps.items():
            while heap and not self._is_current(heap[0]):
                heapq.heappop(heap)
            if not heap:
                continue
            engine = heap[0][2]
            ms = self.curves[engine_type].ptl(min(engine.load + batch_of_group, engine.slots))
            if ms < best_ms:
                best, best_ms = engine, ms
        return best

    def least_loaded(self, min_version: int) -> Engine | None:
        """The least loaded engine whose policy is at least `min_version`, or None."""
        able = (e for e in self.by_id.values() if e.version >= max(min_version, 0))
        return min(able, key=lambda e: (e.load / e.slots, e.engine_id), default=None)

    def offers(self, engine: Engine) -> bool:
        """Whether `best_with_room` considers this engine at its present load."""
        return any(
            entry[2] is engine and self._is_current(entry)
            for entry in self._heaps[engine.engine_type]
        )

    def save_offers(self) -> dict[str, tuple[tuple[int, int, str], ...]]:
        """The entries by which engines of equal load take turns: (load, serial, engine id)."""
        return {
            engine_type: tuple(
                (load, serial, engine.engine_id)
                for load, serial, engine in sorted(heap, key=lambda entry: entry[:2])
                if self.by_id.get(engine.engine_id) is engine
            )
            for engine_type, heap in self._heaps.items()
        }

    def restore_offers(self, offers: dict[str, tuple[tuple[int, int, str], ...]]) -> None:
        """Take over saved entries. Every engine that they name is in the table already."""
        for engine_type, entries in offers.items():
            heap = [(load, serial, self.by_id[name]) for load, serial, name in entries]
            self._heaps[engine_type] = heap  # a sorted list is a heap
            self._serial = max([self._serial, *(serial for _, serial, _ in heap)])

    def _offer(self, engine: Engine) -> None:
        """Put the engine at its present load into its heap; entries of another load are void."""
        load = engine.load
        if load >= engine.slots or engine.version < 0:
            return
        heap = self._heaps[engine.engine_type]
        self._serial += 1
        heapq.heappush(heap, (load, self._serial, engine))
        if len(heap) > 64 + 8 * len(self.by_id):
            heap[:] = [entry for entry in heap if self._is_current(entry)]
            heapq.heapify(heap)

    def _is_current(self, entry: tuple[int, int, Engine]) -> bool:
        load, _, engine = entry
        return (
            load < engine.slots
            and engine.load == load
            and self.by_id.get(engine.engine_id) is engine
        )
