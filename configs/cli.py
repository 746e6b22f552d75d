"""Configuration: YAML files and `key=value` overrides in, a checked dataclass out.

Owns reading and strictness: an unknown key, a wrong type or a value out of range raises an error of
one clear line. Knows no key by name: it works on any dataclass whose fields carry the metadata of
`configs.schema.key`. Never imports torch, vLLM or another layer. Driven by `configs.command`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, overload

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.checks import check
from configs.errors import one_line
from configs.schema import REFUSED, RENAMED, Config

C = TypeVar("C")
PRESETS = Path(__file__).parent
BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": (">=", lambda value, bound: value >= bound),
    "gt": (">", lambda value, bound: value > bound),
    "le": ("<=", lambda value, bound: value <= bound),
    "lt": ("<", lambda value, bound: value < bound),
}
# Advice on an unknown key: a name counts as similar from this likeness on, of 0 to 1. Names made of
# the same words have at least the second; the likeness of the sections counts less.
LEAST_LIKENESS, SAME_WORDS, SECTION_WEIGHT = 0.75, 0.8, 0.3
AS_NEAR, MOST_SUGGESTED = 0.1, 3  # keys that are less near than the nearest by this are left out


@dataclasses.dataclass(frozen=True)
class Key:
    """One configuration key: `path` is dotted, `rules` are its bounds and choices."""

    path: str
    type: Any
    default: Any
    doc: str
    rules: Mapping[str, Any]

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words, () if any value is allowed."""
        if typing.get_origin(self.type) is typing.Literal:
            return typing.get_args(self.type)
        return tuple(self.rules.get("choices", ()))

    def allowed(self) -> str:
        """The rules in words, "" if there are none."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        return " and ".join(
            f"{sign} {_number(self.rules[name])}"
            for name, (sign, _) in BOUNDS.items()
            if name in self.rules
        )

    def violated(self, value: Any) -> bool:
        if value is None:
            return False
        if isinstance(value, list):
            return any(self.violated(item) for item in value)
        if self.choices and value not in self.choices:
            return True
        return any(
            not holds(value, self.rules[name])
            for name, (_, holds) in BOUNDS.items()
            if name in self.rules
        )


def keys(schema: type, prefix: str = "") -> Iterator[Key]:
    """Every key of a (nested) dataclass, in the order of its fields."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind, path = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            yield from keys(typing.cast(type, kind), path + ".")
            continue
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        yield Key(path, kind, default, field.metadata.get("doc", ""), field.metadata)


@overload
def load(argv: Sequence[str]) -> Config: ...
@overload
def load(argv: Sequence[str], schema: type[C]) -> C: ...
def load(argv: Sequence[str], schema: type = Config) -> Any:
    """The configuration of a command line: defaults, `--config` files in order, then overrides.

    `schema` is a dataclass, and the result is an instance of it. Raises a `ValueError` of one line
    that names the key, its value, the place where it was set, and the allowed values.
    """
    options = parse(argv)
    known = {key.path: key for key in keys(schema)}
    config = copy.deepcopy(_defaults(schema))
    origin: dict[str, str] = {}
    for path, value, where in [
        *_from_files(options.config, known),
        *_from_overrides(options.overrides, known),
    ]:
        _assign(config, known, path, value, where)
        origin[path] = where
    result = _finish(config)
    for path, key in known.items():
        value = _get(result, path)
        if key.violated(value):
            raise ValueError(
                f"{_shown(path, value)} ({origin.get(path, 'default')}): must be {key.allowed()}"
            )
    if isinstance(result, Config):
        check(result)
    return result


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML; `load(["--config", file])` gives it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


class Change(NamedTuple):
    """A key of which two configurations have different values, written as on a command line."""

    path: str
    before: str
    after: str
    fixed: bool


def changes(before: Any, after: Any) -> list[Change]:
    """The keys that differ between two configurations of one schema."""
    return [
        Change(key.path, literal(old), literal(new), bool(key.rules.get("fixed")))
        for key in keys(type(before))
        if (old := _get(before, key.path)) != (new := _get(after, key.path))
    ]


def presets(schema: type) -> list[str]:
    """Names that `--config` takes besides files: the presets whose keys the schema has."""
    known = {key.path: key for key in keys(schema)}
    names = sorted(
        str(path.relative_to(PRESETS).with_suffix("")) for path in PRESETS.rglob("*.yaml")
    )
    return [
        name for name in names if all(path in known for path, _, _ in _from_files([name], known))
    ]


# Reading ------------------------------------------------------------------------------------------


@functools.cache
def _defaults(schema: type) -> DictConfig:
    """A configuration without files and overrides. To build it takes longer than all else here."""
    return OmegaConf.structured(schema)


class Parser(argparse.ArgumentParser):
    """A parser that raises a mistake as a `ValueError` of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"command line: {message}; see --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line (`config`, `print_config`, `help`) and its `overrides`."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("overrides", nargs="*")
    for word in argv:
        if word.startswith("--") and "=" in word and not word.startswith("--config="):
            raise ValueError(
                f"command line: {word} is not an option; a key is set without dashes: "
                f"{word.lstrip('-')}"
            )
    return parser.parse_intermixed_args(argv)


def _from_files(names: Sequence[str], known: Mapping[str, Key]) -> Iterator[tuple[str, Any, str]]:
    for name in names:
        path = Path(name)
        if not path.is_file() and (PRESETS / f"{name}.yaml").is_file():
            path = PRESETS / f"{name}.yaml"
        if not path.is_file():
            raise ValueError(
                f"--config {name}: no such file, and no preset of that name; --help lists them"
            )
        try:
            content = _plain(OmegaConf.load(path))
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"--config {name}: not readable as YAML: {one_line(error)}") from None
        if not isinstance(content, dict):
            raise ValueError(
                f"--config {name}: must hold sections with keys, such as 'run: {{steps: 10}}'"
            )
        yield from ((key, value, name) for key, value in _flatten(content, known))


def _flatten(
    content: Mapping[Any, Any], known: Mapping[str, Key], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and path not in known:
            yield from _flatten(value, known, path + ".")
        elif value is None and any(key.startswith(path + ".") for key in known):
            continue  # a section whose keys are all commented out
        else:
            yield path, value


def _from_overrides(
    overrides: Sequence[str], known: Mapping[str, Key]
) -> Iterator[tuple[str, Any, str]]:
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ValueError(
                f"command line: {override!r} is not of the form key=value; --help lists every key"
            )
        quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
        # A string stays as it is typed, such as run.name=007.
        verbatim = path in known and type_name(known[path].type) == "str" and not quoted
        try:
            value = text if verbatim else _plain(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(
                f"{override} (command line): not readable as a YAML value: {one_line(error)}"
            ) from None
        yield path, value, "command line"


def _assign(
    config: DictConfig, known: Mapping[str, Key], path: str, value: Any, where: str
) -> None:
    if path not in known and not _inside_table(path, known):
        if (new := RENAMED.get(path)) in known:
            raise ValueError(f"{path} ({where}): is now called {new}; use that name")
        if path in REFUSED:
            raise ValueError(f"{path} ({where}): there is no such key: {REFUSED[path]}")
        inside = [key for key in known if key.startswith(path + ".")]
        if inside:
            raise ValueError(
                f"{path} ({where}): is a section, not a key; its keys are {', '.join(inside)}"
            )
        raise ValueError(f"{path} ({where}): unknown key; {_advice(path, known)}")
    try:
        OmegaConf.update(config, path, value)
    except OmegaConfBaseException:
        key = known.get(path) or known[_inside_table(path, known)]
        expected = f"must be {key.allowed()}" if key.choices else f"expected {type_name(key.type)}"
        raise ValueError(f"{_shown(path, value)} ({where}): {expected}") from None


def _inside_table(path: str, known: Mapping[str, Key]) -> str:
    """The key of a dict with entries of any name that `path` names an entry of, or ""."""
    tables = [key for key in known if typing.get_origin(known[key].type) is dict]
    return next((table for table in tables if path.startswith(f"{table}.")), "")


def _plain(config: Any) -> Any:
    # Interpolations are resolved once, when every value is known.
    return OmegaConf.to_container(config, resolve=False)


def _advice(path: str, known: Mapping[str, Key]) -> str:
    """What to do about an unknown key: similar names in any section, and the keys of its own."""
    section, _, last = path.rpartition(".")
    nearness: dict[str, float] = {}
    for key in known:
        of_section, _, name = key.rpartition(".")
        likeness = _likeness(last, name)
        if set(last.split("_")) <= set(re.split("[._]", key)) or name in last.split("_"):
            likeness = max(likeness, SAME_WORDS)
        if likeness >= LEAST_LIKENESS:
            nearness[key] = likeness + SECTION_WEIGHT * _likeness(section, of_section)
    best = max(nearness.values(), default=0.0)
    near = [key for key in nearness if nearness[key] > best - AS_NEAR]
    near = sorted(near, key=lambda key: -nearness[key])[:MOST_SUGGESTED]
    parts = [f"did you mean {' or '.join(near)}?"] if near else []
    inside = [key for key in known if section and key.startswith(f"{section}.")]
    if inside and not set(near) & set(inside):
        parts += [f"{section} has the keys {', '.join(key[len(section) + 1 :] for key in inside)};"]
    return " ".join([*parts, "--help lists every key"])


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _finish(config: DictConfig) -> Any:
    """Resolve the interpolations and build the dataclasses."""
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(f"configuration: {one_line(error)}") from None


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


# Writing ------------------------------------------------------------------------------------------


def literal(value: Any) -> str:
    """The value of a key as it is shown to the user."""
    if value is dataclasses.MISSING:
        return "(required)"
    if isinstance(value, bool):
        return str(value).lower()
    return '""' if value == "" else str(value)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _shown(path: str, value: Any) -> str:
    return f"{path}={literal(value)}"


def type_name(kind: Any) -> str:
    """The type of a key as it is shown to the user, "str" for a choice of words."""
    if typing.get_origin(kind) is typing.Literal:
        return "str"
    if isinstance(kind, type) and not isinstance(kind, types.GenericAlias):
        return kind.__name__
    return str(kind).replace("typing.", "")
