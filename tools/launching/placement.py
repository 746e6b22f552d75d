"""Pools and places on a cluster, as the section `cluster` of the configuration describes them.

Owns the translation of an entry of `cluster.pools` into pools, their overrides and their place.
Places no process. Driven by `tools.launching.run_plan`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs import cli
from configs.errors import one_line
from configs.schema import Config, Place

PLACE = [field.name for field in fields(Place)]
SECTIONS = [field.name for field in fields(Config)]


class PoolEntry(NamedTuple):
    """A pool on one machine."""

    overrides: tuple[str, ...]
    place: Place


def pool_entries(config: Config) -> Iterator[PoolEntry]:
    """The pools of `cluster.pools`, each once for every machine that it takes."""
    for name, entry in config.cluster.pools.items():
        if not isinstance(entry, dict):
            raise ValueError(
                f"cluster.pools.{name}={entry!r}: must be a table of places and keys, such as "
                "{accelerator_type: A10, actors: {num_engines: 4}}"
            )
        place = _place(name, entry)
        for section in SECTIONS:
            if not isinstance(entry.get(section, {}), dict):
                raise ValueError(
                    f"cluster.pools.{name}.{section}={entry[section]!r}: must be a table of keys, "
                    "such as actors: {num_engines: 4}"
                )
        if "name" in entry.get("actors", {}):
            raise ValueError(
                f"cluster.pools.{name}.actors.name: a pool of a cluster is named by its entry, so "
                "rename the entry"
            )
        overrides = tuple(_overrides({key: entry[key] for key in entry if key not in PLACE}))
        for number in range(place.num_nodes):
            own = f"{name}-{number}" if place.num_nodes > 1 else str(name)
            yield PoolEntry((f"actors.name={own}", *overrides), replace(place, num_nodes=1))


def group_variables(place: Place, node: str, first: str, port: int) -> dict[str, str]:
    """The environment by which the learner's nodes find each other, {} if there is only one.

    `node` is the number of the node, and `first` the host of number 0, which serves `port`.
    """
    if place.num_nodes == 1:
        return {}
    return {
        "GROUP_RANK": node,
        "GROUP_WORLD_SIZE": str(place.num_nodes),
        "MASTER_ADDR": first,
        "MASTER_PORT": str(port),
    }


def _place(name: str, entry: Mapping[str, Any]) -> Place:
    for key in entry:
        if key not in PLACE and key not in SECTIONS:
            near = difflib.get_close_matches(key, [*PLACE, *SECTIONS], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"cluster.pools.{name}.{key}: unknown key{hint} A pool has {', '.join(PLACE)}, "
                "and sections of the run, such as actors"
            )
    place = OmegaConf.structured(Place)
    for key in PLACE:
        if key in entry:
            try:
                OmegaConf.update(place, key, entry[key])
            except OmegaConfBaseException as error:
                raise ValueError(
                    f"cluster.pools.{name}.{key}={entry[key]!r}: {one_line(error)}"
                ) from None
    checked: Any = OmegaConf.to_object(place)
    for key in cli.keys(Place):
        value = getattr(checked, key.path)
        if key.violated(value):
            raise ValueError(f"cluster.pools.{name}.{key.path}={value}: must be {key.allowed()}")
    return checked


def _overrides(entry: Mapping[str, Any]) -> Iterator[str]:
    """`section.key=value` for every key in an entry; a nested section or table is flattened."""
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from (f"{name}.{rest}" for rest in _overrides(value))
        else:
            yield f"{name}={value if isinstance(value, str) else json.dumps(value)}"
