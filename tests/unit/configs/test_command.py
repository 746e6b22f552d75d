"""`configs.command`: the behaviour that all commands share, from `--help` to the exit status."""

from __future__ import annotations

import argparse
import ast
import errno
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from configs import command
from configs.cli import keys
from configs.command import help_text, run_command
from configs.errors import one_line, writing_to
from configs.schema import Config, key

ROOT = Path(__file__).parents[3]
PRODUCT = ("actors", "buffer", "configs", "darts", "learner", "tools")
# Started only by other processes of ours, with pipes.
INTERNAL = {
    "actors.process", "actors.verifier_process", "buffer.data.public_rows",
    "buffer.processes.janitor",
    "tools.faults.fake_engine", "tools.faults.fake_pool", "tools.faults.fast_learner",
    "tools.faults.launcher", "tools.faults.real_learner", "tools.faults.repeatable_engine",
    "tools.faults.standin_learner",
}  # fmt: skip


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def find_commands() -> list[str]:
    """Every module of the product that runs with `python -m`."""
    found = set()
    for path in (path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")):
        if any(is_main_guard(node) for node in ast.parse(path.read_text()).body):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.add(name.removesuffix(".__main__"))
    return sorted(found - INTERNAL)


COMMANDS = find_commands()
# Arguments with which a command starts to run: a folder or a run if it needs one.
VALID = {
    "tools.bias": ["RUN"],
    "tools.bench": ["core"],
    "tools.evaluate": ["RUN"],
    "tools.export": ["RUN", "FOLDER"],
    "tools.keys": ["FOLDER"],
    "tools.replay": ["RUN"],
    "tools.report": ["RUN"],
    "tools.smollm2": ["FOLDER"],
    "tools.tail_monitor": ["--once"],
    "tools.track": ["RUN"],
    "tools.warm_start": ["FOLDER"],
}
# Arguments that name a missing file or folder.
MISSING = {
    **{name: ["--config", "no/such/file.yaml"] for name in COMMANDS if name not in VALID},
    "tools.bench": ["pipeline", "--config", "no/such/file.yaml"],
    "tools.bias": ["no/such/run"],
    "tools.evaluate": ["no/such/run"],
    "tools.export": ["no/such/run", "FOLDER"],
    "tools.replay": ["no/such/run"],
    "tools.report": ["no/such/run"],
    "tools.tail_monitor": ["--once", "--play", "no/such/run"],
    "tools.track": ["no/such/run"],
}


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs a command in this process, as `python -m` would; returns its exit status."""

    def run(name: str, *argv: str) -> int:
        argv = tuple(str(tmp_path / word) if word in ("RUN", "FOLDER") else word for word in argv)
        monkeypatch.setattr(sys, "argv", [name, *argv])
        with pytest.raises(SystemExit) as caught, warnings.catch_warnings(action="ignore"):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        assert caught.value.code is None or isinstance(caught.value.code, int)
        return caught.value.code or 0

    return run


# Every command -----------------------------------------------------------------------------------


def test_the_readme_names_exactly_the_commands_that_exist() -> None:
    assert {name for name in COMMANDS if not name.startswith("tools.")} == {
        "actors", "buffer", "darts.simulate", "learner",
    }  # fmt: skip
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__"} == {
        name.removeprefix("tools.") for name in COMMANDS if name.startswith("tools.")
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_the_terminal_and_lists_the_exit_statuses(
    name: str, start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(name, "--help") == 0
    written = capsys.readouterr()
    lines = written.out.splitlines()
    assert lines[0].startswith(f"usage: python -m {name} ") and written.err == ""
    assert max(map(len, lines)) <= 100 and "exit status:" in lines


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_refused_in_one_line(
    name: str, start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(name, *VALID.get(name, []), "--no-such-option") == 2
    written = capsys.readouterr()
    assert written.out == "" and written.err.startswith("error: command line: ")
    assert written.err.count("\n") == 1 and "--no-such-option" in written.err


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_refused_in_one_line(
    name: str, start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(name, *MISSING[name]) == 2
    written = capsys.readouterr()
    assert written.out == "" and written.err.startswith("error: ")
    assert written.err.count("\n") == 1 and "no/such/" in written.err


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_ends_a_command_with_130(
    name: str,
    start: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sends a real SIGINT as soon as the command's own function is called."""
    original = run_command

    def interrupted(given: object) -> NoReturn:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal was lost")

    def replaced(description: str, run: object, **options: object) -> NoReturn:
        original(description, interrupted, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(command, "run_command", replaced)
    assert start(name, *VALID.get(name, [])) == 130
    assert capsys.readouterr() == ("", "")


# One command -------------------------------------------------------------------------------------


@dataclass
class Inner:
    depth: int = key(1, "How deep.", ge=1)


@dataclass
class Schema:
    inner: Inner = field(default_factory=Inner)
    name: str = key("x", "Its name.")


class PeerError(Exception):
    pass


def exit_status(run: Callable[[Schema], int | None], *argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command("A command.", run, schema=Schema, argv=argv, errors=(PeerError,))
    assert not isinstance(caught.value.code, str)
    return caught.value.code or 0


def test_a_command_runs_with_its_configuration_and_exits_with_its_status() -> None:
    seen = []
    assert exit_status(lambda config: seen.append(config.inner.depth), "inner.depth=4") == 0
    assert exit_status(lambda config: 3) == 3
    assert seen == [4]


def test_a_command_runs_with_its_own_arguments() -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--depth", type=int)

    with pytest.raises(SystemExit) as caught:
        run_command(
            "A command.", lambda given: given.depth, arguments=arguments, argv=["--depth", "5"]
        )
    assert caught.value.code == 5


def test_a_mistake_on_the_command_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda config: 0, "inner.depht=4") == 2
    assert capsys.readouterr() == (
        "",
        "error: inner.depht (command line): unknown key; did you mean inner.depth? --help lists "
        "every key\n",
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PeerError("no answer\nfrom the buffer"), "error: no answer from the buffer\n"),
        (PeerError(), "error: PeerError\n"),
        (ConnectionRefusedError(111, "refused"), "error: [Errno 111] refused\n"),
        (BrokenPipeError(32, "a peer's pipe"), "error: [Errno 32] a peer's pipe\n"),
        (
            OSError(28, "No space left on device"),
            "error: [Errno 28] No space left on device; free some space, or write elsewhere with "
            "run.dir=FOLDER\n",
        ),
    ],
)
def test_an_expected_failure_is_one_line_and_status_1(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: Schema) -> None:
        raise error

    assert exit_status(run) == 1
    assert capsys.readouterr() == ("", line)


def test_a_user_mistake_found_late_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Schema) -> None:
        from configs.model_path import check_model

        check_model("models/no-such-model")

    assert exit_status(run) == 2
    assert capsys.readouterr().err.startswith("error: model.path=models/no-such-model: ")


def test_a_bug_shows_its_traceback() -> None:
    def bug(config: Schema) -> None:
        raise KeyError("x")

    def value_error_of_a_library(config: Schema) -> None:
        ast.literal_eval("f()")

    for run, error in ((bug, KeyError), (value_error_of_a_library, ValueError)):
        with pytest.raises(error):
            run_command("A command.", run, schema=Schema, argv=[])


def test_print_config_shows_the_configuration_and_runs_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(config: Schema) -> None:
        raise AssertionError("ran")

    assert exit_status(run, "--print-config", "inner.depth=5") == 0
    assert capsys.readouterr().out == "inner:\n  depth: 5\nname: x\n"


def test_help_lists_every_key_with_its_type_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text("The buffer.", Config, "python -m buffer")
    assert [one.path for one in keys(Config) if f"  {one.path}  " not in text] == []
    assert "optimizer.lr  float = 1e-06  (> 0)" in text
    assert "model.dtype  str = float32  (one of float32, bfloat16, float16; fixed in a run)" in text


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    """As in `... | head`: the rest of the output does not fit the pipe, and nothing reads it."""
    code = (
        "from configs.command import run_command\n"
        "run_command('', lambda given: print('x' * 1_000_000), arguments=lambda parser: None)"
    )
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    os.read(read, 10)
    os.close(read)
    assert process.communicate(timeout=60) == (None, b"")
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("error", "with_type", "line"),
    [
        (ValueError("a\n  b"), False, "a b"),
        (ValueError("a"), True, "ValueError: a"),
        (ValueError(), False, "ValueError"),
        (ValueError(), True, "ValueError"),
        (ValueError("x" * 5000), False, "x" * 1000),
    ],
)
def test_an_error_is_reported_in_one_line(error: Exception, with_type: bool, line: str) -> None:
    assert one_line(error, with_type) == line


def test_a_full_disk_is_named_by_its_folder_unless_the_error_names_a_file() -> None:
    for name, expected in ((None, "/runs/a"), ("/runs/a/b", "/runs/a/b")):
        with pytest.raises(OSError) as caught, writing_to(Path("/runs/a")):
            raise OSError(errno.ENOSPC, "No space left on device", name)
        assert caught.value.filename == expected
