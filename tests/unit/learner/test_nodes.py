"""The variables by which the ranks of a learner find each other, on one node and on several."""

from __future__ import annotations

import pytest

from configs.schema import Place
from learner.__main__ import _rank_environment
from tools.launching.placement import group_variables


def test_ranks_of_one_node_meet_at_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    variables = _rank_environment(1, 2, "/folder")
    assert (variables["RANK"], variables["WORLD_SIZE"]) == ("1", "2")
    assert variables["LEARNER_RENDEZVOUS"] == "file:///folder/rendezvous"


def test_ranks_of_several_nodes_are_numbered_through(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = []
    for node in range(3):
        given = group_variables(Place(num_nodes=3), str(node), "10.0.0.1", 29500)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        for rank in range(2):
            variables = _rank_environment(rank, 2, "/folder")
            assert variables["WORLD_SIZE"] == "6" and variables["LOCAL_WORLD_SIZE"] == "2"
            assert "LEARNER_RENDEZVOUS" not in variables  # MASTER_ADDR and MASTER_PORT count
            numbers.append((variables["RANK"], variables["LOCAL_RANK"]))
    assert numbers == [(str(number), str(number % 2)) for number in range(6)]


def test_a_process_on_one_node_is_given_no_variables() -> None:
    assert group_variables(Place(), "0", "10.0.0.1", 29500) == {}
