"""What a process needs of a Ray cluster, and what the nodes of the cluster have.

Owns the comparison of the two and its words. Never talks to Ray: nodes come as `ray.nodes()` gives
them. Driven by `tools.launching.ray_cluster`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from configs.schema import Place
from tools.launching.processes import Command

FEW_CPUS = 0.01  # processes share a node's CPUs as under the local launcher; only GPUs are counted
TYPE = "accelerator_type:"  # prefix of the resource by which Ray knows a node's GPUs
HIDDEN = ("memory", "object_store_memory", "node:")  # resources that no process of ours asks for


@dataclass(frozen=True)
class Node:
    """A living node of the cluster, with everything that it has, used or free."""

    node_id: str
    address: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def in_words(self) -> str:
        shown = {k: v for k, v in sorted(self.resources.items()) if not k.startswith(HIDDEN)}
        return f"{self.address} {_table(shown, self.labels_of_user())}"

    def labels_of_user(self) -> dict[str, str]:
        return {k: v for k, v in self.labels.items() if not k.startswith("ray.io/")}


@dataclass(frozen=True)
class Needs:
    """The demands of one process on its node."""

    num_gpus: float
    accelerator_type: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @classmethod
    def of(cls, command: Command) -> Self:
        place: Place = command.place
        labels = {key: str(value) for key, value in place.labels.items()}
        return cls(command.num_gpus, place.accelerator_type, place.resources, labels)

    def options(self) -> dict[str, Any]:
        """The options of a Ray actor."""
        options: dict[str, Any] = {"num_cpus": FEW_CPUS, "num_gpus": self.num_gpus}
        if self.accelerator_type:
            options["accelerator_type"] = self.accelerator_type
        if self.resources:
            options["resources"] = dict(self.resources)
        if self.labels:
            options["label_selector"] = dict(self.labels)
        return options

    def fits(self, node: Node) -> bool:
        """Whether the node could ever hold the process, if nothing else ran there."""
        return all(
            node.resources.get(name, 0) >= amount for name, amount in self._amounts().items()
        ) and all(node.labels.get(key) == value for key, value in self.labels.items())

    def in_words(self) -> str:
        return _table(self._amounts(), self.labels) if self._amounts() or self.labels else "a place"

    def _amounts(self) -> dict[str, float]:
        amounts = dict(self.resources)
        if self.num_gpus:
            amounts["GPU"] = self.num_gpus
        if self.accelerator_type:
            amounts[f"{TYPE}{self.accelerator_type}"] = 0.001  # as Ray does
        return amounts


def nodes_of(listed: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The living nodes among those that `ray.nodes()` lists."""
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"], node.get("Labels", {}))
        for node in listed
        if node["Alive"]
    ]


def waits_for(needs: Needs, nodes: Sequence[Node]) -> str:
    """Why a process that asks for `needs` is not placed, in one line."""
    suitable = [node for node in nodes if needs.fits(node)]
    if suitable:
        addresses = ", ".join(dict.fromkeys(node.address for node in suitable))
        where = f"it is in use on {addresses}, or Ray is about to start the process there"
    else:
        where = f"the cluster has {'; '.join(node.in_words() for node in nodes) or 'no node'}"
    return f"{needs.in_words()}; {where}"


def _table(amounts: Mapping[str, float], labels: Mapping[str, str]) -> str:
    shown = [
        name.removeprefix(TYPE) if name.startswith(TYPE) else f"{name}: {amount:g}"
        for name, amount in amounts.items()
    ]
    shown += [f"{key}: {value}" for key, value in labels.items()]
    return f"{{{', '.join(shown)}}}"
