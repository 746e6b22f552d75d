"""Schedules of faults: the kind, target and time of each, drawn from a seed before the run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tools.launching.processes import Role

KINDS = ("kill", "stop", "reset", "delay", "cut", "slow")
ON_PROCESS = ("kill", "stop")  # the other kinds act on the network, and need a proxy
GAP_S = (0.1, 3.5)
LASTING_S = {"kill": (0.0, 0.0), "reset": (0.0, 0.0), "stop": (0.5, 8.0)}
SHAPED_S = (0.5, 5.0)
DELAY_S = 0.2
BYTES_PER_S = 1e6 / 8  # messages are small here, so only a very slow link matters


@dataclass(frozen=True)
class Fault:
    """`at_s` counts from the start of the processes, and `seconds` from there."""

    at_s: float
    kind: str
    target: str  # the name of a process
    seconds: float

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.kind} {self.target} at {self.at_s:.1f} s{lasting}"


def draw(seed: int, num_faults: int, kinds: Sequence[str], targets: dict[str, Role]) -> list[Fault]:
    """Faults in the order of time. A process is not hit while an earlier fault still affects it.

    Each role is equally likely to be hit, regardless of the number of engines.
    """
    rng = random.Random(f"faults {seed}")
    can_hit_buffer = any(kind in ON_PROCESS for kind in kinds)
    roles = sorted({r for r in targets.values() if r != "buffer" or can_hit_buffer})
    faults: list[Fault] = []
    free_at_s: dict[str, float] = {}
    now_s = 0.0
    for _ in range(num_faults):
        now_s += rng.uniform(*GAP_S)
        role = rng.choice(roles)
        target = rng.choice([name for name, its in targets.items() if its == role])
        kind = rng.choice([kind for kind in kinds if kind in ON_PROCESS or role != "buffer"])
        now_s = max(now_s, free_at_s.get(target, 0.0))
        seconds = rng.uniform(*LASTING_S.get(kind, SHAPED_S))
        free_at_s[target] = now_s + seconds + 0.1
        faults.append(Fault(now_s, kind, target, seconds))
    return faults
