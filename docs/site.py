"""Puts the pages outside docs/ into the documentation's site, and points every link at its page.

Driven by mkdocs (`hooks` in mkdocs.yml). On the site, a link to a file that is not in it is only
its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {  # file of the repository -> page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
} | {
    str(path.relative_to(ROOT)): f"examples/{path.parent.name}.md"
    for path in sorted(ROOT.glob("examples/*/README.md"))
}
SOURCES = {page: source for source, page in OUTSIDE.items()}
LINK = re.compile(r"(!?\[[^\]]*\])\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> None:
    examples = [page for page in SOURCES if page.startswith("examples/")]
    config.nav.insert(-1, {"Examples": examples})


def on_files(files: Files, config: Any) -> None:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    own = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(own, f"docs/{own}"))

    def on_the_site(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        source = posixpath.normpath(posixpath.join(folder, target))
        there = OUTSIDE.get(source, source.removeprefix("docs/"))
        if files.get_file_from_path(there) is None:
            return text[1:-1]
        return f"{text}({posixpath.relpath(there, posixpath.dirname(own) or '.')}{anchor or ''})"

    return LINK.sub(on_the_site, markdown)
