"""The monitor's web page over real HTTP: its frames, its refusals, and a browser."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.text import Text

from tools.monitor.web import MonitorServer, parse_address

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def server() -> Iterator[MonitorServer]:
    def draw(width: int, height: int) -> list[Text]:
        return [Text(f"{width}x{height} <b>&", "#ff0000"), *[Text("·")] * (height - 1)]

    with MonitorServer("127.0.0.1", 0, draw, lambda: b'{"step": 3}') as served:
        threading.Thread(target=served.serve_forever, args=(0.05,), daemon=True).start()
        yield served
        served.shutdown()


def ask(
    server: MonitorServer, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, http.client.HTTPMessage, str]:
    link = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    link.request(method, path, headers={"Host": host} if host else {})
    answer = link.getresponse()
    found = answer.status, answer.headers, answer.read().decode()
    link.close()
    return found


def test_a_frame_has_the_requested_size_and_its_text_is_escaped(server: MonitorServer) -> None:
    status, headers, body = ask(server, "/frame?width=90&height=12")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert len(body.splitlines()) == 12
    assert "90x12 &lt;b&gt;&amp;" in body and "#ff0000" in body


@pytest.mark.parametrize(
    ("query", "size"),
    [
        ("", "100x40"),
        ("?width=5&height=100000", "20x40"),
        ("?width=99999&height=3", "400x10"),
        ("?width=-1&height=%C2%B2", "100x40"),
    ],
)
def test_the_size_of_a_frame_is_bounded(server: MonitorServer, query: str, size: str) -> None:
    assert f"{size} &lt;b&gt;" in ask(server, f"/frame{query}")[2]


def test_the_state_is_json_and_null_before_the_first_one(server: MonitorServer) -> None:
    assert json.loads(ask(server, "/state")[2]) == {"step": 3}
    server.state = lambda: None
    assert json.loads(ask(server, "/state")[2]) is None


def test_the_page_names_only_files_of_this_server_and_no_inline_script(
    server: MonitorServer,
) -> None:
    _, headers, page = ask(server, "/")
    assert "//" not in page.replace("<!doctype", "")
    assert "script-src" not in headers["Content-Security-Policy"]  # so default-src: 'self'
    for name in ("monitor.js", "monitor.css", "monitor.svg"):
        assert name in page and ask(server, f"/{name}")[0] == 200


def test_nothing_but_reading_is_offered(server: MonitorServer) -> None:
    assert ask(server, "/", "POST")[0] == 501
    assert ask(server, "/", "DELETE")[0] == 501
    assert ask(server, "/../config.yaml")[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example:8090", 403)],
)
def test_another_site_cannot_read_the_page_through_its_own_name(
    server: MonitorServer, host: str, status: int
) -> None:
    assert ask(server, "/state", host=host)[0] == status


def test_the_address_is_loopback_by_default() -> None:
    assert parse_address("8090") == ("127.0.0.1", 8090)
    assert parse_address("10.0.0.5:80") == ("10.0.0.5", 80)
    for wrong in ("", "host", "host:", "1:70000", "8090x"):
        with pytest.raises(ValueError, match="must be PORT or HOST:PORT"):
            parse_address(wrong)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the path")
@pytest.mark.parametrize("width", [1300, 500])
def test_a_browser_draws_the_frame_for_its_own_size(
    server: MonitorServer, width: int, tmp_path: Path
) -> None:
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        f"--window-size={width},800",
        "--virtual-time-budget=3000",
        "--dump-dom",
        server.url,
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    drawn = dom.split('<pre id="frame">')[1].split("</pre>")[0]
    columns = int(drawn.split(">", 1)[-1].split("x")[0])
    assert width / 10 < columns < width / 6
    assert '<p id="note"></p>' in dom
