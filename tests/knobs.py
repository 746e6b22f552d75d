"""Proof that a key does something: two values of it make a component behave differently.

Each file `tests/unit/configs/test_*_knobs.py` holds a table of `Turn`s, and `test_knobs.py` checks
that together they cover every key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs import cli
from configs.schema import Config

Observe = Callable[[Config, Path], object]


@dataclass(frozen=True)
class Turn:
    """Two values of a key, an observation that tells them apart, and overrides that make it matter.

    In values and overrides, `{folder}` stands for a folder that all observations share, and
    `{port}` and `{port2}` stand for free ports.
    """

    first: str
    second: str
    observe: Observe
    given: tuple[str, ...] = ()


def check_turn(path: str, turn: Turn, folder: Path, ports: tuple[int, int] = (0, 0)) -> None:
    """Check that the same value gives the same observation twice, and the other value another."""

    def observed(value: str, number: int) -> object:
        overrides = [
            override.format(folder=folder, port=ports[0], port2=ports[1])
            for override in (*turn.given, f"{path}={value}")
        ]
        own = folder / f"observation-{number}"
        own.mkdir()
        return turn.observe(cli.load(overrides), own)

    first, again, second = (
        observed(turn.first, 0),
        observed(turn.first, 1),
        observed(turn.second, 2),
    )
    assert first == again, f"{path}={turn.first} is observed as {first}, then as {again}"
    assert first != second, f"{path}={turn.first} and {turn.second} are both observed as {first}"
