"""A learner on several Ray nodes ends as one process, and names the node that was lost."""

from __future__ import annotations

from collections import deque
from typing import cast

import pytest

from tools.launching import ray_process
from tools.launching.ray_process import RayGroup, RayProcess


class Part:
    """A process of one node with a status that the test sets."""

    def __init__(self, name: str) -> None:
        self.name, self.where, self.last_lines = name, name, deque[str]()
        self.given: int | None = None
        self.killed = False

    def status(self) -> int | None:
        return self.given

    def how_it_ended(self) -> str:
        return f"{self.name} ended"

    def kill(self) -> None:
        self.killed, self.given = True, -9


@pytest.fixture
def parts() -> list[Part]:
    return [Part("first"), Part("second")]


def group(parts: list[Part]) -> RayGroup:
    return RayGroup("learner", cast(list[RayProcess], parts))


def test_it_ends_well_once_all_nodes_have(parts: list[Part]) -> None:
    learner = group(parts)
    parts[0].given = 0
    assert learner.status() is None
    parts[1].given = 0
    assert learner.status() == 0


def test_a_lost_node_is_the_culprit_even_if_another_has_failed_before(parts: list[Part]) -> None:
    learner = group(parts)
    parts[0].given = 1  # it has lost its peer
    assert learner.status() is None and not parts[1].killed
    parts[1].given = -9
    assert learner.status() == -9
    assert learner.how_it_ended() == "second ended"


def test_a_lost_node_ends_the_others_at_once(parts: list[Part]) -> None:
    learner = group(parts)
    parts[1].given = -9
    assert learner.status() == -9 and parts[0].killed


def test_a_failure_ends_the_others_after_a_while(
    parts: list[Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_process, "SETTLE_S", 0.0)
    learner = group(parts)
    parts[0].given = 1
    assert learner.status() == 1 and parts[1].killed
    assert learner.status() == 1, "the one that was killed with it is not the culprit"
