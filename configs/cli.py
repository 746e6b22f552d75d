"""Command lines and configuration files of every process: YAML and `key=value` overrides in, a checked dataclass out.

Owns: reading, strictness (an unknown key, a wrong type or a value out of range is one clear line), `--help`, `--print-config`, and how an
error leaves a process. Knows no key by name: it works on any dataclass whose fields carry the metadata of `configs.schema.key`. Never
imports torch, vLLM or another layer. Driven by the `__main__` of each process.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.schema import RENAMED

PRESETS = Path(__file__).parent
OWN_PACKAGES = {"__main__", "actors", "buffer", "configs", "darts", "learner", "tools"}
BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": (">=", lambda value, bound: value >= bound),
    "gt": (">", lambda value, bound: value > bound),
    "le": ("<=", lambda value, bound: value <= bound),
    "lt": ("<", lambda value, bound: value < bound),
}


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
        """The words that are allowed, () if any value is."""
        if typing.get_origin(self.type) is typing.Literal:
            return typing.get_args(self.type)
        return tuple(self.rules.get("choices", ()))

    def allowed(self) -> str:
        """The rules in words, "" if there are none."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        return " and ".join(
            f"{sign} {self.rules[name]:g}"
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
    """Every key of a (nested) dataclass, in the order it is written."""
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


def load(argv: Sequence[str], schema: type | None = None) -> Any:
    """The configuration that a command line asks for: defaults, then `--config` files in order, then `key=value` overrides.

    `schema` is a dataclass, `configs.schema.Config` unless given; the result is an instance of it.
    Raises `ValueError`, in one line that names the key, the value, where it was set, what is allowed and the consequence.
    """
    schema = schema or _run_schema()
    options = _parse(argv)
    known = {key.path: key for key in keys(schema)}
    config = OmegaConf.structured(schema)
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
    if schema is _run_schema():
        from configs.checks import check

        check(result)
    return result


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML; `load(["--config", file])` gives it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def main(
    description: str,
    run: Callable[[Any], int | None],
    schema: type | None = None,
    argv: Sequence[str] | None = None,
    errors: tuple[type[Exception], ...] = (),
) -> NoReturn:
    """Run one process from its command line, and exit with its status.

    A user's mistake, a failure of the machine (`OSError`) and those of `errors` end in one line on stderr: status 2 where the
    configuration is at fault, 1 after that. Anything else is a bug and shows its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = _parse(argv)
        if options.help:
            print(help_text(description, schema or _run_schema()))
            sys.exit(0)
        config = load(argv, schema)
    except (ValueError, OSError) as error:
        _fail(error, 2)
    if options.print_config:
        print(to_yaml(config), end="")
        sys.exit(0)
    try:
        sys.exit(run(config) or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, *errors) as error:
        _fail(error, 1)
    except ValueError as error:
        if not _raised_by_us(error):
            raise
        _fail(error, 1)


def help_text(description: str, schema: type) -> str:
    """Every key with its type, default, allowed values and meaning, by section, wrapped to the terminal."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 140)
    presets = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
    options = [
        (
            "--config FILE",
            f"a YAML file, or a preset: {presets}; may be repeated, later files win over earlier ones",
        ),
        ("--print-config", "print the resolved configuration as YAML and exit"),
        ("-h, --help", "print this and exit"),
        ("key=value", "set a key; wins over files"),
    ]
    lines = textwrap.wrap(description, width) + ["", "options:"]
    for name, meaning in options:
        lines += textwrap.wrap(
            f"{name:<16}{meaning}", width, initial_indent="  ", subsequent_indent=" " * 18
        )
    section = None
    for key in keys(schema):
        head = key.path.rpartition(".")[0]
        if head != section:
            lines += ["", f"{head or 'keys'}:"]
            section = head
        allowed = f"  ({key.allowed()})" if key.allowed() else ""
        heading = f"{key.path}  {_type_name(key.type)} = {_literal(key.default)}{allowed}"
        lines += textwrap.wrap(
            heading, width, initial_indent="  ", subsequent_indent=" " * 8, break_on_hyphens=False
        )
        lines += textwrap.wrap(key.doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


# Reading -----------------------------------------------------------------------------------------------------------


def _run_schema() -> type:
    from configs.schema import (
        Config,
    )  # here and not above: a tool with a schema of its own needs no other

    return Config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"command line: {message}; --help lists the options and every key")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("overrides", nargs="*")
    for word in argv:
        if word.startswith("--") and "=" in word and not word.startswith("--config="):
            raise ValueError(
                f"command line: {word} is no option; a key is set without dashes: {word.lstrip('-')}"
            )
    return parser.parse_intermixed_args(argv)


def _from_files(names: Sequence[str], known: Mapping[str, Key]) -> Iterator[tuple[str, Any, str]]:
    for name in names:
        path = Path(name)
        if not path.is_file() and (PRESETS / f"{name}.yaml").is_file():
            path = PRESETS / f"{name}.yaml"
        if not path.is_file():
            presets = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
            raise ValueError(
                f"--config {name}: no such file, and no preset of that name ({presets})"
            )
        try:
            content = _plain(OmegaConf.load(path))
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"--config {name}: not readable as YAML: {_one_line(error)}") from None
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
        verbatim = (
            path in known and known[path].type is str and not quoted
        )  # run.name=007 stays as it is typed
        try:
            value = text if verbatim else _plain(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(
                f"{override} (command line): not readable as a YAML value: {_one_line(error)}"
            ) from None
        yield path, value, "command line"


def _assign(
    config: DictConfig, known: Mapping[str, Key], path: str, value: Any, where: str
) -> None:
    if path not in known:
        if (new := RENAMED.get(path)) in known:
            raise ValueError(f"{path} ({where}): is now called {new}; use that name")
        inside = [key for key in known if key.startswith(path + ".")]
        if inside:
            raise ValueError(
                f"{path} ({where}): is a section, not a key; its keys are {', '.join(inside)}"
            )
        raise ValueError(
            f"{path} ({where}): unknown key; did you mean {_nearest(path, known)}? --help lists every key"
        )
    try:
        OmegaConf.update(config, path, value)
    except OmegaConfBaseException:
        key = known[path]
        expected = f"must be {key.allowed()}" if key.choices else f"expected {_type_name(key.type)}"
        raise ValueError(f"{_shown(path, value)} ({where}): {expected}") from None


def _plain(config: Any) -> Any:
    return OmegaConf.to_container(
        config, resolve=False
    )  # interpolations are resolved once, when everything is known


def _nearest(path: str, known: Mapping[str, Key]) -> str:
    last = path.rpartition(".")[2]
    same_name = [key for key in known if key.rpartition(".")[2] == last]
    return difflib.get_close_matches(path, same_name or list(known), n=1, cutoff=0.0)[0]


def _finish(config: DictConfig) -> Any:
    """Interpolations resolved, dataclasses built. A schema's own `__post_init__` may raise `ValueError`."""
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(f"configuration: {_one_line(error)}") from None


def _get(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


# Writing -----------------------------------------------------------------------------------------------------------


def _literal(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "(required)"
    return '""' if value == "" else str(value)


def _shown(path: str, value: Any) -> str:
    return f"{path}={_literal(value)}"


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "str"
    if isinstance(kind, type) and not isinstance(kind, types.GenericAlias):
        return kind.__name__
    return str(kind).replace("typing.", "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _raised_by_us(error: BaseException) -> bool:
    """Whether our own code raised it: then it speaks to the user. What a library raises through us is a bug to be shown whole."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    return (
        frame is not None
        and frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] in OWN_PACKAGES
    )


def _fail(error: BaseException, status: int) -> NoReturn:
    message = _one_line(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        message += "; free some space, or write elsewhere with run.dir=FOLDER"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
