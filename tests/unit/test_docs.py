"""The documentation is true: its keys, paths, modules, targets, links and metrics exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from actors.turns import turns_of
from configs import cli
from configs.schema import Config
from darts.simulate.schema import SimulateConfig
from tests.pages import PAGES, ROOT, TOP_LEVEL, blocks, explained_metrics, spans
from tools.compare import CompareConfig


def test_fenced_blocks_name_their_language() -> None:
    """A block without a language would escape the test that runs every command."""
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(), re.M)
        assert set(fences[::2]) <= {"sh", "text", "yaml", "python"}, page
        assert set(fences[1::2]) <= {""}, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_commands_name_modules_and_targets_that_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for span in spans(page):
        if match := re.match(r"(?:\.venv/bin/)?python -m ([\w.]+)", span):
            assert importlib.util.find_spec(match[1]), span
        elif match := re.match(r"make ([\w-]+)", span):
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
    """The anchors that GitHub makes from the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def metrics_in_the_source() -> set[str]:
    """String literals that look like a metric's name, except parts of an f-string."""
    found: set[str] = set()
    measured_in = [ROOT / "darts/step_row.py"]
    for folder in ("buffer", "learner"):
        measured_in += (ROOT / folder).rglob("*.py")
    for path in measured_in:
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


def test_every_metric_is_explained() -> None:
    assert metrics_in_the_source() - explained_metrics() == set()


def test_every_explained_metric_exists() -> None:
    # Names with these prefixes are composed at run time; integration tests check them.
    composed = {"length", "tokens", "cancel", "eval"}
    named = {name for name in explained_metrics() if name.partition("/")[0] not in composed}
    assert named - metrics_in_the_source() == set()


def test_the_environment_of_the_documentation_does_as_it_says() -> None:
    environment, session = blocks(ROOT / "docs/your-environment.md", "python")[:2]
    exec(f"{environment}\n{session}", {})


class Counter:
    """Imitates a client of OpenEnv: the state of a session ends with its connection."""

    num_open = 0

    def __init__(self, base_url: str) -> None:
        assert base_url.startswith("http://127.0.0.1:")

    def sync(self) -> Counter:
        return self

    def __enter__(self) -> Counter:
        Counter.num_open += 1
        return self

    def __exit__(self, *_: object) -> None:
        Counter.num_open -= 1

    def reset(self, seed: int) -> None:
        self.left = seed

    def step(self, action: dict[str, str]) -> SimpleNamespace:
        self.left -= int(action["message"])
        done, text = self.left <= 0, f"{self.left} left"
        reward = None if self.left > 0 else 1.0
        return SimpleNamespace(done=done, observation={"text": text}, reward=reward)


def test_the_remote_environment_of_the_documentation_is_played_in_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (code,) = [
        block
        for block in blocks(ROOT / "docs/your-environment.md", "python")
        if "GenericEnvClient" in block
    ]
    module = ModuleType("openenv")
    module.__dict__["GenericEnvClient"] = Counter
    monkeypatch.setitem(sys.modules, "openenv", module)
    names: dict[str, Any] = {}
    exec(code, names)
    monkeypatch.setitem(globals(), "Remote", names["Remote"])  # to be pickled
    names["Remote"].__module__ = __name__
    turns, row = turns_of(names["Remote"]), {"metadata": {"seed": 5}}
    reward, observation, state = turns.step(row, "", "2")
    assert (reward, observation, Counter.num_open) == (0.0, "3 left", 0)
    _, observation, state = turns.step(row, state, "2")
    assert observation == "1 left"
    assert turns.step(row, state, "1") == (1.0, None, "")


@pytest.mark.slow
def test_the_site_of_the_documentation_is_built_without_warnings(tmp_path: Path) -> None:
    """Among others, no link or anchor is broken, and every page is in the navigation."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in ("index.html", "monitor/index.html", "examples/game/index.html"):
        assert (tmp_path / "site" / page).exists()
