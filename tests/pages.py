"""The documentation's pages as the tests read them: fenced blocks, inline code and metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
PACKAGES = ("actors", "buffer", "configs", "darts", "learner", "tools")
TOP_LEVEL = (*PACKAGES, "tests", "docs", "examples", "requirements")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", page.read_text(), re.M | re.S)


def commands(page: Path) -> Iterator[str]:
    """Each command of the `sh` blocks, without comments and line breaks, and with the values of the
    variables that its block sets before.
    """
    for block in blocks(page, "sh"):
        values: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).strip()
            if assignment := re.fullmatch(r"([A-Z_]+)=\"?([^\"]*)\"?", command):
                values[assignment[1]] = assignment[2]
                continue
            for name, value in values.items():
                command = command.replace(f"${name}", value)
            if command:
                yield " ".join(command.split())


def spans(page: Path) -> Iterator[str]:
    """Inline code, outside fenced blocks."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    yield from re.findall(r"`([^`\n]+)`", text)


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
