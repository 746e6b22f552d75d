"""Which node of a Ray cluster could hold a process, and the line that says why none does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from configs.schema import Place
from tools.launching.processes import Command
from tools.launching.ray_nodes import Needs, nodes_of, waits_for


def listed(address: str, resources: Mapping[str, float], others: Any = None) -> dict[str, Any]:
    """A node as `ray.nodes()` lists it."""
    return {
        "NodeID": address, "NodeManagerAddress": address, "Alive": True, "Labels": {},
        "Resources": {"CPU": 8.0, "memory": 1e9, f"node:{address}": 1.0, **resources},
        **(others or {}),
    }  # fmt: skip


H100 = listed("10.0.0.1", {"GPU": 8, "accelerator_type:H100": 1})
A10 = listed(
    "10.0.0.2", {"GPU": 2, "accelerator_type:A10": 1, "disk": 1}, {"Labels": {"zone": "b"}}
)
GONE = listed("10.0.0.3", {"GPU": 8, "accelerator_type:A10": 1}, {"Alive": False})
NODES = nodes_of([H100, A10, GONE])


def needs(num_gpus: float = 0, **place: Any) -> Needs:
    return Needs.of(Command("actors", "a", (), num_gpus, Place(**place)))


@pytest.mark.parametrize(
    ("given", "fitting"),
    [
        (needs(), ["10.0.0.1", "10.0.0.2"]),
        (needs(2), ["10.0.0.1", "10.0.0.2"]),
        (needs(3), ["10.0.0.1"]),
        (needs(accelerator_type="A10"), ["10.0.0.2"]),
        (needs(3, accelerator_type="A10"), []),
        (needs(resources={"disk": 1}), ["10.0.0.2"]),
        (needs(resources={"disk": 2}), []),
        (needs(labels={"zone": "b"}), ["10.0.0.2"]),
        (needs(labels={"zone": "c"}), []),
    ],
)
def test_a_node_fits_if_it_has_everything(given: Needs, fitting: list[str]) -> None:
    assert [node.address for node in NODES if given.fits(node)] == fitting


def test_an_impossible_place_is_named_with_the_nodes_of_the_cluster() -> None:
    assert waits_for(needs(3, accelerator_type="A10"), NODES) == (
        "{GPU: 3, A10}; the cluster has 10.0.0.1 {CPU: 8, GPU: 8, H100}; "
        "10.0.0.2 {CPU: 8, GPU: 2, A10, disk: 1, zone: b}"
    )


def test_a_place_in_use_is_named_with_its_nodes() -> None:
    assert waits_for(needs(2, accelerator_type="A10"), NODES) == (
        "{GPU: 2, A10}; it is in use on 10.0.0.2, or Ray is about to start the process there"
    )


def test_ray_is_asked_for_the_same() -> None:
    given = needs(0.5, accelerator_type="A10", resources={"disk": 1}, labels={"zone": "b"})
    assert given.options() == {
        "num_cpus": 0.01, "num_gpus": 0.5, "accelerator_type": "A10", "resources": {"disk": 1},
        "label_selector": {"zone": "b"},
    }  # fmt: skip
