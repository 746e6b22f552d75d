"""Schedules of faults: the kind, target and time of each, drawn from a seed before the run."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ON_PROCESS = ("kill", "stop")
ON_NETWORK = ("reset", "delay", "cut", "slow")  # these need a proxy of the process's own
ON_DISK = ("full",)
KINDS = (*ON_PROCESS, *ON_NETWORK, *ON_DISK)
DISK = "disk"  # the target of faults on the run's folder
DELAY_AFTER_S = (0.0, 1.5)
LASTING_S = {"kill": (0.0, 0.0), "reset": (0.0, 0.0), "stop": (0.5, 8.0)}
SHAPED_S = (0.5, 5.0)
FOR_GOOD = 0.3  # part of the faults on the disk that last until the run has ended
DELAY_S = 0.2
BYTES_PER_S = 1e6 / 8  # messages are small here, so only a very slow link matters


@dataclass(frozen=True)
class Fault:
    """It begins `delay_s` after `step` steps are done, and lasts `seconds`."""

    step: int
    delay_s: float
    kind: str
    target: str  # the name of a process, or `DISK`
    seconds: float  # infinite: until the run has ended

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        if math.isinf(self.seconds):
            lasting = " for good"
        return f"{self.kind} {self.target} at step {self.step} + {self.delay_s:.1f} s{lasting}"


def draw(
    seed: int, num_steps: int, num_faults: int, kinds: Sequence[str], targets: Mapping[str, str]
) -> list[Fault]:
    """Faults in the order of their steps, from before the first step to after the last one.

    Each role, and the disk, is equally likely to be hit, regardless of the number of engines.
    """
    rng = random.Random(f"faults {seed}")
    places = {**targets, DISK: DISK}
    roles = sorted(role for role in set(places.values()) if _possible(role, kinds))
    faults: list[Fault] = []
    for step in sorted(rng.randint(0, num_steps) for _ in range(num_faults)):
        role = rng.choice(roles)
        target = rng.choice([name for name, its in places.items() if its == role])
        kind = rng.choice(_possible(role, kinds))
        seconds = rng.uniform(*LASTING_S.get(kind, SHAPED_S))
        if kind in ON_DISK and rng.random() < FOR_GOOD:
            seconds = math.inf
        faults.append(Fault(step, rng.uniform(*DELAY_AFTER_S), kind, target, seconds))
    return faults


def _possible(role: str, kinds: Sequence[str]) -> list[str]:
    """The kinds that can hit a role, or the disk."""
    behind_proxy = (*ON_PROCESS, *ON_NETWORK)
    allowed = {"actors": behind_proxy, "learner": behind_proxy, DISK: ON_DISK}.get(role, ON_PROCESS)
    return [kind for kind in kinds if kind in allowed]
