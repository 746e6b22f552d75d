"""The state of a rollout of the package `verifiers` as bytes, between two of its turns.

A state may refer to its environment, and to objects that all its rollouts share, such as a
dictionary of 40 MB. Every process has those of its own, so only the way to them is kept.
"""

from __future__ import annotations

import functools
import io
import pickle
from types import MappingProxyType, ModuleType
from typing import Any

from configs.errors import one_line

DEPTH = 8  # of attributes, within which objects of the environment are looked for


class Unsupported(Exception):
    """The environment needs something that a rollout here cannot give. One line."""


class Owned:
    """Objects of the environment itself, which every process has: states refer to them by path."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self.paths: dict[int, tuple[str, ...]] = {id(environment): ()}
        self._kept: list[Any] = []  # so that no other object gets the same id
        waiting = [environment]
        while waiting:
            parent = waiting.pop()
            path = self.paths[id(parent)]
            for name, value in vars(parent).items():
                if len(path) < DEPTH and _is_data(value) and id(value) not in self.paths:
                    self.paths[id(value)] = (*path, name)
                    self._kept.append(value)
                    if hasattr(value, "__dict__"):
                        waiting.append(value)

    def at(self, path: tuple[str, ...]) -> Any:
        return functools.reduce(getattr, path, self._environment)


def _is_data(value: Any) -> bool:
    return isinstance(value, list | dict | set | frozenset) or (
        hasattr(value, "__dict__")
        and not isinstance(value, type | ModuleType)
        and not callable(value)
    )


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, owned: Owned) -> None:
        super().__init__(file)
        self._owned = owned

    def persistent_id(self, obj: Any) -> Any:
        return self._owned.paths.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, MappingProxyType):  # the package's count of tokens
            return _read_only, (dict(obj),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, owned: Owned) -> None:
        super().__init__(file)
        self.persistent_load = owned.at


def _read_only(mapping: dict[str, Any]) -> MappingProxyType[str, Any]:
    return MappingProxyType(mapping)


def pickled(state: Any, owned: Owned) -> bytes:
    data = io.BytesIO()
    try:
        _Pickler(data, owned).dump(state)
    except Exception as error:  # whatever an object of the environment raises
        raise Unsupported(
            f"its state cannot be kept between turns ({one_line(error)}); it holds more than data"
        ) from error
    return data.getvalue()


def unpickled(data: bytes, owned: Owned) -> Any:
    return _Unpickler(io.BytesIO(data), owned).load()
