"""When a run without any signal says so."""

from __future__ import annotations

import pytest

from buffer.records import signal_watch
from buffer.records.signal_watch import SignalWatch


def spoken(uniform: list[float], reward: float = 0.0) -> list[str]:
    watch = SignalWatch(len(uniform))
    rows = [
        {"step": step, "darts/uniform_frac": frac, "reward/mean": reward}
        for step, frac in enumerate(uniform)
    ]
    return [watch.look(row) for row in rows]


def test_it_speaks_at_powers_of_two_and_at_the_end() -> None:
    assert [step for step, line in enumerate(spoken([1.0] * 11)) if line] == [1, 3, 7, 10]


def test_a_single_group_with_a_signal_begins_the_count_again() -> None:
    assert [bool(line) for line in spoken([1, 0.9, 1, 1, 0.5, 0.5])] == [0, 0, 0, 1, 0, 0]


def test_a_run_that_ends_with_a_signal_says_nothing() -> None:
    assert not any(spoken([0.5, 1.0, 0.99]))


@pytest.mark.parametrize(
    ("reward", "advice"),
    [
        (1.0, signal_watch.TOO_EASY),
        (0.0, signal_watch.TOO_HARD),
        (0.4, signal_watch.EITHER),
    ],
)
def test_the_advice_depends_on_the_reward(reward: float, advice: str) -> None:
    assert spoken([1.0, 1.0], reward)[1].endswith(advice)
