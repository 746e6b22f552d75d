"""A frame of the monitor as an SVG picture that refers to no other file.

Pure: writes nothing. Driven by `tools.tail_monitor --svg`.
"""

from __future__ import annotations

import io
import re
from argparse import ArgumentTypeError
from collections.abc import Sequence

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

# rich's own picture names fonts on a server; without them, a viewer takes its monospaced font.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.S)


def picture(lines: Sequence[Text], width: int, title: str) -> str:
    console = Console(
        record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    for line in lines:
        console.print(line, soft_wrap=True)
    return console.export_svg(title=title, code_format=FORMAT)


def parse_size(given: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{2,3})x(\d{2,3})", given)
    if found is None:
        raise ArgumentTypeError(f"{given!r}: must be COLUMNSxLINES, such as 80x24")
    return int(found[1]), int(found[2])
