"""The monitor's screen as a web page: read only, drawn by `tools.monitor.frame`.

`/` is the page, which asks for `/frame` once a second and for nothing of another server; `/state`
is the newest live state as JSON. Nothing here can change a run. Driven by
`tools.tail_monitor --serve`, whose loop receives the states.
"""

from __future__ import annotations

import io
import ipaddress
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rich.console import Console
from rich.text import Text

Draw = Callable[[int, int], list[Text]]
SMALLEST, LARGEST = (20, 10), (400, 200)  # columns and lines of a frame
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Run</title>
<link rel="icon" href="monitor.svg"><link rel="stylesheet" href="monitor.css"></head>
<body><pre id="frame">waiting for the first state</pre><p id="note"></p>
<script src="monitor.js"></script></body></html>
"""
CSS = """body { margin:0; padding:10px; background:#14181d; color:#d7dde4 }
pre { margin:0; font:13px/1.2 ui-monospace,"DejaVu Sans Mono",Menlo,monospace; overflow:hidden }
#note { color:#f0604d; font:14px system-ui,sans-serif; margin:8px 0 }
"""
# Without an icon of its own, a browser asks for /favicon.ico and reports that it is missing.
ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path fill="#2fbf9b"
d="M1 9h4v6H1z"/><path fill="#6f8cff" d="M6 1h4v14H6z"/><path fill="#eeb02e" d="M11 6h4v9h-4z"/>
</svg>
"""
SCRIPT = """const frame = document.getElementById("frame"), note = document.getElementById("note")
function cell() {
  const probe = frame.appendChild(document.createElement("span"))
  probe.textContent = "0".repeat(50)
  const {width, height} = probe.getBoundingClientRect()
  probe.remove()
  return [width / 50, Math.max(height, 13 * 1.2)]
}
async function draw() {
  const [width, height] = cell(), columns = Math.floor(frame.clientWidth / width)
  const lines = columns < 72 ? 78 : Math.floor((innerHeight - 30) / height)
  try {
    const answer = await fetch(`frame?width=${columns}&height=${lines}`)
    frame.innerHTML = await answer.text()
    note.textContent = ""
  } catch {
    note.textContent = "The monitor does not answer; this is its last frame."
  }
  setTimeout(draw, 1000)
}
draw()
"""


class MonitorServer(ThreadingHTTPServer):
    """Serves frames that `draw(width, height)` returns, and the JSON that `state()` returns.

    `state` returns None before the first state has arrived. Port 0 takes a free port.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, draw: Draw, state: Callable[[], bytes | None]) -> None:
        self.draw, self.state, self.host = draw, state, host
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: MonitorServer  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "monitor", ""

    def do_GET(self) -> None:
        if not self._is_direct():
            self.send_error(HTTPStatus.FORBIDDEN, "Open the monitor by its address")
            return
        url = urlsplit(self.path)
        match url.path:
            case "/":
                self._answer("text/html", PAGE.encode())
            case "/monitor.js":
                self._answer("text/javascript", SCRIPT.encode())
            case "/monitor.css":
                self._answer("text/css", CSS.encode())
            case "/monitor.svg":
                self._answer("image/svg+xml", ICON.encode())
            case "/frame":
                width, height = _size(url.query)
                self._answer("text/html", as_html(self.server.draw(width, height), width).encode())
            case "/state":
                self._answer("application/json", self.server.state() or b"null")
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: there is one per second."""

    def _is_direct(self) -> bool:
        """False for a foreign name, by which another site could make a browser read this page."""
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        if name in ("localhost", self.server.host):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        # Text of a run in a frame must never run as a script.
        self.send_header(
            "Content-Security-Policy", "default-src 'self'; style-src 'self' 'unsafe-inline'"
        )
        self.end_headers()
        self.wfile.write(body)


def parse_address(given: str) -> tuple[str, int]:
    """`HOST:PORT` or `PORT`, which means 127.0.0.1:PORT. Raises `ValueError` for anything else."""
    host, _, port = given.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ValueError(f"--serve={given}: must be PORT or HOST:PORT, such as 127.0.0.1:8090")
    return host or "127.0.0.1", int(port)


def as_html(lines: list[Text], width: int) -> str:
    """The lines with their colours, escaped, for a `pre` element."""
    console = Console(
        record=True, file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor"
    )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    return console.export_html(code_format="{code}", inline_styles=True)


def _size(query: str) -> tuple[int, int]:
    """Columns and lines from `width=..&height=..`, within limits; 100 x 40 if they are absent."""
    given = parse_qs(query)
    sizes = []
    for name, default, low, high in zip(
        ("width", "height"), (100, 40), SMALLEST, LARGEST, strict=True
    ):
        text = given.get(name, [""])[0]
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else default
        sizes.append(min(max(number, low), high))
    return sizes[0], sizes[1]
