"""The documentation is true: its commands run, and its keys, paths, targets and links exist.

Every command of a fenced `sh` block runs as written, in a folder that looks like the repository.
Commands that would take hours, GPUs, a network or several machines are reduced by `REDUCED`, which
gives the reason.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from buffer.service import Service
from configs import cli
from configs.schema import Config
from darts.simulate.schema import SimulateConfig
from tests.fakes import FakeEngine, FakeLearner
from tools.compare import CompareConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PACKAGES = ("actors", "buffer", "configs", "darts", "learner", "tools")
TOP_LEVEL = (*PACKAGES, "tests", "docs", "requirements")

Reduction = tuple[str, Callable[[str], str], str]


def plus(option: str) -> Callable[[str], str]:
    return lambda command: f"{command} {option}"


def helped(command: str) -> str:
    """The same module or script with --help alone."""
    return re.sub(r"(python (?:-m \S+|\S+\.py)).*", r"\1 --help", command)


REDUCED: list[Reduction] = [  # the first pattern that matches counts
    (r"^make ", lambda c: c.replace("make ", "make -n ", 1), "installs packages, or takes minutes"),
    (r"-m pytest", lambda c: c.removeprefix("WRITE_GOLDEN=1 ") + " --collect-only", "this suite"),
    (r"-m (buffer|actors|learner)\b", plus("--print-config"), "serves until its run ends"),
    (r"-m tools\.launch .*--help", lambda c: c, ""),
    (r"-m tools\.(launch|compare) ", plus("--print-config"), "minutes to hours; in tests/e2e"),
    (r"thousand\.yaml", plus("--print-config"), "over a minute of one core"),
    (r"-m tools\.bench", helped, "a measurement; tests/e2e/test_bench.py runs it"),
    (r"-m tools\.(evaluate|export)", helped, "needs a real checkpoint; tests/e2e/test_pipeline.py"),
    (r"-m tools\.check ", helped, "needs the demo's model; tests/e2e/test_check.py runs it"),
    (r"-m tools\.smollm2", helped, "half a minute of conversion"),
    (r"-m tools\.figures", helped, "tests/unit/tools/test_figures.py compares what it writes"),
    (r"tail_monitor\.py --play", plus("--once"), "without --once it needs a terminal"),
    (r"tail_monitor\.py", helped, "needs a running buffer; tests/e2e/test_tail_monitor.py"),
]  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", page.read_text(), re.M | re.S)


def commands(page: Path) -> Iterator[str]:
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).strip()
            if command:
                yield " ".join(command.split())


def reduced(command: str) -> str:
    for pattern, reduce, _ in REDUCED:
        if re.search(pattern, command):
            return reduce(command)
    return command


def spans(page: Path) -> Iterator[str]:
    """Inline code, outside fenced blocks."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    yield from re.findall(r"`([^`\n]+)`", text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Path:
    """A folder like the repository's root, with a finished run and the README's run.yaml."""
    folder = tmp_path_factory.mktemp("docs")
    for name in (*TOP_LEVEL, "pyproject.toml", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "run.yaml").write_text(blocks(ROOT / "README.md", "yaml")[0])
    settings = [
        "run.steps=3",
        "batch.groups=3",
        "darts.group_size=4",
        "redundancy.rule=fixed",
        "sampling.max_tokens=64",
        "data.num_prompts=200",
        "eval.num_prompts=4",
        f"buffer.address=tcp://127.0.0.1:{free_port()}",
    ]
    service = Service(cli.load([f"run.dir={folder / 'runs'}", "run.name=demo", *settings]))
    address = service.run.router.address
    for peer in (FakeLearner(address, 3), FakeEngine(address, "engine", slots=16)):
        peer.start()
    assert service.serve() == 0
    return folder


def test_blocks_say_what_they_hold() -> None:
    """A block without a language would escape the tests below."""
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(), re.M)
        assert set(fences[::2]) <= {"sh", "text", "yaml", "python"}, page
        assert set(fences[1::2]) <= {""}, page


ALL = sorted({command for page in PAGES for command in commands(page)})


@pytest.mark.parametrize("command", ALL)
def test_a_command_runs(command: str, folder: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", reduced(command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{reduced(command)}\n{done.stdout[-1000:]}{done.stderr[-1000:]}"


def test_no_reduction_is_left_over() -> None:
    for pattern, _, _ in REDUCED:
        assert any(re.search(pattern, command) for command in ALL), pattern


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_commands_name_modules_and_targets_that_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for span in spans(page):
        if match := re.match(r"(?:\.venv/bin/)?python -m ([\w.]+)", span):
            assert importlib.util.find_spec(match[1]), span
        elif match := re.match(r"make (\w+)", span):
            assert match[1] in targets, span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page: Path) -> None:
    schemas = (Config, SimulateConfig, CompareConfig)
    known = {key.path for schema in schemas for key in cli.keys(schema)}
    sections = {path.partition(".")[0] for path in known if "." in path}
    for span in spans(page):
        for word in span.split():
            match = re.fullmatch(r"([a-z]+)\.([a-z_]+)(=.*)?", word)
            if match and match[1] in sections and match[2] not in ("py", "yaml"):
                assert f"{match[1]}.{match[2]}" in known or is_module(match[1], match[2]), span


def is_module(package: str, name: str) -> bool:
    return (ROOT / package / name).exists() or (ROOT / package / f"{name}.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_exist(page: Path) -> None:
    for span in set(spans(page)) - explained_metrics():
        path = span.partition("::")[0]
        if re.fullmatch(r"[\w./-]+", path) and path.partition("/")[0] in TOP_LEVEL and "/" in path:
            assert (ROOT / path).exists(), span
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("https:"):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def explained_metrics() -> set[str]:
    """First column of the table in docs/run-files.md; `_p50` replaces the last part of a name."""
    explained: set[str] = set()
    text = (ROOT / "docs" / "run-files.md").read_text()
    for row in re.findall(r"^\| (`[a-z]+/[a-z].*?) \|", text, re.M):
        stem = ""
        for name in re.findall(r"`([^`]+)`", row):
            if not name.startswith("_"):
                stem = name.rpartition("_")[0]
            explained.add(stem + name if name.startswith("_") else name)
    return explained


def metrics_in_the_source() -> set[str]:
    """String literals of the form of a metric's name, but not the parts of an f-string."""
    found: set[str] = set()
    for path in [*(ROOT / "buffer").rglob("*.py"), *(ROOT / "learner").rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        parts = {
            id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values
        }
        found |= {
            node.value
            for node in nodes
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in parts
            if re.fullmatch(r"[a-z]+/[a-z][a-z0-9_]*", node.value)
        }
    return found


def test_every_metric_is_explained_and_exists(folder: Path) -> None:
    lines = (folder / "runs/demo/metrics.jsonl").read_text().splitlines()
    written = {name for line in lines for name in json.loads(line) if "/" in name}
    assert written and (written | metrics_in_the_source()) - explained_metrics() == set()
    assert explained_metrics() - written - metrics_in_the_source() == set()
