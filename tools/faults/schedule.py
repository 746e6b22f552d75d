"""Schedules of faults: the kind, target and time of each, drawn from a seed before the run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tools.launching.processes import Role

KINDS = ("kill", "stop", "reset", "delay", "cut", "slow")
ON_PROCESS = ("kill", "stop")  # the other kinds act on the network, and need a proxy
DELAY_AFTER_S = (0.0, 1.5)
LASTING_S = {"kill": (0.0, 0.0), "reset": (0.0, 0.0), "stop": (0.5, 8.0)}
SHAPED_S = (0.5, 5.0)
DELAY_S = 0.2
BYTES_PER_S = 1e6 / 8  # messages are small here, so only a very slow link matters


@dataclass(frozen=True)
class Fault:
    """It begins `delay_s` after `step` steps are done, and lasts `seconds`."""

    step: int
    delay_s: float
    kind: str
    target: str  # the name of a process
    seconds: float

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.kind} {self.target} at step {self.step} + {self.delay_s:.1f} s{lasting}"


def draw(
    seed: int, num_steps: int, num_faults: int, kinds: Sequence[str], targets: dict[str, Role]
) -> list[Fault]:
    """Faults in the order of their steps, from before the first step to after the last one.

    Each role is equally likely to be hit, regardless of the number of engines.
    """
    rng = random.Random(f"faults {seed}")
    can_hit_buffer = any(kind in ON_PROCESS for kind in kinds)
    roles = sorted({r for r in targets.values() if r != "buffer" or can_hit_buffer})
    faults: list[Fault] = []
    for step in sorted(rng.randint(0, num_steps) for _ in range(num_faults)):
        role = rng.choice(roles)
        target = rng.choice([name for name, its in targets.items() if its == role])
        kind = rng.choice([kind for kind in kinds if kind in ON_PROCESS or role != "buffer"])
        seconds = rng.uniform(*LASTING_S.get(kind, SHAPED_S))
        faults.append(Fault(step, rng.uniform(*DELAY_AFTER_S), kind, target, seconds))
    return faults
