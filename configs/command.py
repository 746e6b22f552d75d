"""The entry point of every command: how it starts and how it ends.

Owns the two forms of a command line (configuration keys, or the command's own arguments), their
`--help`, and the exit status. An expected error ends a command with one line on stderr; a bug shows
its traceback. Driven by the `__main__` part of each command.
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar, overload

from configs import cli
from configs.errors import EXIT_STATUSES, ExitStatus, advice, one_line

C = TypeVar("C")
Run = Callable[[C], int | None]
Errors = tuple[type[Exception], ...]
OWN_PACKAGES = {"__main__", "actors", "buffer", "configs", "darts", "learner", "tools"}
MAX_COLUMNS = 100
STDOUT = 1


@overload
def run_command(
    description: str,
    run: Run[C],
    *,
    schema: type[C],
    errors: Errors = (),
    argv: Sequence[str] | None = None,
    program: str = "",
) -> NoReturn: ...
@overload
def run_command(
    description: str,
    run: Run[argparse.Namespace],
    *,
    arguments: Callable[[argparse.ArgumentParser], object],
    errors: Errors = (),
    argv: Sequence[str] | None = None,
    program: str = "",
) -> NoReturn: ...
def run_command(
    description: str,
    run: Run[Any],
    *,
    schema: type | None = None,
    arguments: Callable[[argparse.ArgumentParser], object] | None = None,
    errors: Errors = (),
    argv: Sequence[str] | None = None,
    program: str = "",
) -> NoReturn:
    """Run a command from its command line and exit, with a status of `configs.errors.ExitStatus`.

    `schema` is a dataclass of configuration keys, of which `run` gets an instance. `arguments`
    instead adds the command's own arguments to a parser, and `run` gets the namespace. `errors` are
    the expected failures besides `OSError`. A `ValueError` of our own code is a user's mistake.
    """
    argv = sys.argv[1:] if argv is None else argv
    program = program or _program()
    try:
        if schema is not None:
            status = _run_keys(description, run, schema, argv, program)
        else:
            assert arguments is not None
            parser = make_parser(description, arguments, program)
            status = run(parser.parse_args(argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(ExitStatus.INTERRUPTED)
    except BrokenPipeError as error:
        if not _reader_gone():
            _fail(error, ExitStatus.FAILED)
        sys.exit(ExitStatus.READER_GONE)
    except (OSError, *errors) as error:
        _fail(error, ExitStatus.FAILED)
    except ValueError as error:
        if not _raised_by_us(error):
            raise
        _fail(error, ExitStatus.REFUSED)
    sys.exit(status or ExitStatus.OK)


def _run_keys(
    description: str, run: Run[Any], schema: type, argv: Sequence[str], program: str
) -> int | None:
    options = cli.parse(argv)
    if options.help:
        print(help_text(description, schema, program))
        return ExitStatus.OK
    config = cli.load(argv, schema)
    if options.print_config:
        print(cli.to_yaml(config), end="")
        return ExitStatus.OK
    return run(config)


# Help ---------------------------------------------------------------------------------------------


def help_text(description: str, schema: type, program: str) -> str:
    """Every key with its type, default, allowed values and meaning, wrapped to the terminal."""
    width = _width()
    presets = ", ".join(cli.presets(schema))
    files = f"a YAML file, or a preset ({presets})" if presets else "a YAML file"
    options = [
        ("--config FILE", f"{files}; may be repeated, and later files override earlier ones"),
        ("--print-config", "print the resolved configuration as YAML and exit"),
        ("-h, --help", "print this and exit"),
        ("KEY=VALUE", "set a key; overrides the files"),
    ]
    usage = f"usage: {program} [--config FILE ...] [--print-config] [KEY=VALUE ...]"
    lines = [usage, "", *textwrap.wrap(description, width), "", "options:"]
    for name, meaning in options:
        lines += textwrap.wrap(
            f"{name:<16}{meaning}", width, initial_indent="  ", subsequent_indent=" " * 18
        )
    section = ""
    for key in cli.keys(schema):
        head = key.path.rpartition(".")[0] or "keys"
        if head != section:
            lines += ["", f"{head}:"]
            section = head
        lines += _key_lines(key, width)
    return "\n".join([*lines, "", EXIT_STATUSES])


def _key_lines(key: cli.Key, width: int) -> list[str]:
    notes = [key.allowed(), "fixed in a run" if key.rules.get("fixed") else ""]
    allowed = f"  ({'; '.join(filter(None, notes))})" if any(notes) else ""
    heading = f"{key.path}  {cli.type_name(key.type)} = {cli.literal(key.default)}{allowed}"
    indented = partial(textwrap.wrap, width=width, break_on_hyphens=False)
    return [
        *indented(heading, initial_indent="  ", subsequent_indent=" " * 8),
        *indented(key.doc, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]


def make_parser(
    description: str,
    arguments: Callable[[argparse.ArgumentParser], object],
    program: str,
) -> argparse.ArgumentParser:
    """The parser of a command with arguments of its own."""
    width = _width()
    parser = cli.Parser(
        prog=program,
        description="\n".join(textwrap.wrap(description, width)),
        epilog=EXIT_STATUSES,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=width),
        allow_abbrev=False,
    )
    arguments(parser)
    return parser


def _width() -> int:
    return min(max(shutil.get_terminal_size((MAX_COLUMNS, 24)).columns, 60), MAX_COLUMNS)


def _program() -> str:
    """How this process was started: `python -m tools.report`, or `python tools/report.py`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return f"python {os.path.relpath(sys.argv[0])}" if Path(sys.argv[0]).is_file() else "python"
    return f"python -m {spec.name.removesuffix('.__main__')}"


# The end ------------------------------------------------------------------------------------------


def _reader_gone() -> bool:
    """Whether the reader of stdout is gone, as in `... | head`. If so, stdout is silenced."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return True


def _raised_by_us(error: BaseException) -> bool:
    """Whether our own code raised it, as a message to the user. A library's error is a bug."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    return (
        frame is not None
        and frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] in OWN_PACKAGES
    )


def _fail(error: BaseException, status: ExitStatus) -> NoReturn:
    print(f"error: {one_line(error)}{advice(error)}", file=sys.stderr)
    sys.exit(status)
