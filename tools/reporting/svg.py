"""A small SVG writer: rectangles, lines and text, rendered to the same bytes on every machine.

Used for the figures of the documentation, which a test compares with the repository's copies.
`tools.reporting.plots` draws measured data with matplotlib.
"""

from __future__ import annotations

from html import escape

FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


class Svg:
    """A drawing on white of `width` x `height` pixels; coordinates grow right and down."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._elements: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, **style: object) -> None:
        self._add("rect", {"x": x, "y": y, "width": width, "height": height, "rx": 2, **style})

    def line(self, x1: float, y1: float, x2: float, y2: float, **style: object) -> None:
        self._add("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, **style})

    def text(self, x: float, y: float, content: str, **style: object) -> None:
        self._add("text", {"x": x, "y": y, **style}, escape(content))

    def render(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'font-family="{FONT}" font-size="12" fill="#1d2733" role="img">\n'
            f"<title>{escape(self.title)}</title>\n"
            f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>\n'
        )
        return head + "\n".join(self._elements) + "\n</svg>\n"

    def _add(self, name: str, attributes: dict[str, object], content: str = "") -> None:
        written = " ".join(
            f'{key.replace("_", "-")}="{_number(value)}"' for key, value in attributes.items()
        )
        self._elements.append(
            f"<{name} {written}>{content}</{name}>" if content else f"<{name} {written}/>"
        )


def _number(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
