"""A live view of a run in a terminal: rollouts in flight, selected and cancelled, and waits.

    python tools/tail_monitor.py                       attach to the default buffer.address
    python tools/tail_monitor.py --once                one frame as text
    python tools/tail_monitor.py --svg FILE            one frame as a picture
    python tools/tail_monitor.py --json                one JSON object per snapshot
    python tools/tail_monitor.py --serve               a web page on this machine
    python tools/tail_monitor.py --play runs/<name>    play a finished run

Owns the keyboard and the screen; `tools.monitor.frame` draws, and `tools.monitor.web` serves. It
only listens to states that the buffer publishes anyway, on a socket that drops messages to slow
listeners, so it cannot slow the run. Run by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__" and not __package__:
    # Run as a file: the packages are in the repository's root, not in tools/.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import msgspec
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from buffer.records.files import atomic_write
from buffer.wire.client import MonitorLink
from buffer.wire.keys import find_keys
from buffer.wire.messages import LiveState
from buffer.wire.transport import TransportError, next_port
from configs.command import run_command
from configs.errors import one_line
from configs.schema import BufferConfig, RunConfig
from tools.monitor.frame import SILENCE_S, frame, pressed
from tools.monitor.picture import parse_size, picture
from tools.monitor.playback import Replay
from tools.monitor.views import View
from tools.monitor.web import MonitorServer, parse_address

FIRST_NEWS_S = 10.0
POLL_S = 0.05
ARROWS = {b"A": "up", b"B": "down", b"C": "right", b"D": "left"}
PIPED_SIZE = (100, 40)
SEEKS = {
    ",": (0.0, -1),
    ".": (0.0, 1),
    "<": (-0.1, 0),
    ">": (0.1, 0),
    "0": (-1.0, 0),
    "$": (1.0, 0),
}


class Dashboard:
    """The content of the screen, drawn for the current size of the terminal."""

    def __init__(self, address: str, color: bool) -> None:
        self.address = address
        self.view = View(color=color)
        self.snapshot: LiveState | None = None
        self.since_s = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n").join(self.lines(options.max_width, options.height or console.height))

    def lines(self, width: int, height: int) -> list[Text]:
        silent_s = time.monotonic() - self.since_s
        if self.snapshot is None:
            return [Text(no_statistics(self.address, silent_s)), Text("q quit")][:height]
        return frame(
            self.snapshot,
            replace(self.view, silent_s=silent_s if not self.view.source else 0.0),
            width,
            height,
        )

    def show(self, snapshot: LiveState) -> None:
        self.snapshot, self.since_s = snapshot, time.monotonic()


def no_statistics(address: str, waited_s: float) -> str:
    return (
        f"no statistics from {address} within {waited_s:.0f} s: "
        "is `python -m buffer` running there, with the keys that --keys names?"
    )


def first_snapshot(source: MonitorLink | Replay, address: str) -> LiveState:
    """The first live state. Raises `TransportError` if none arrives in time."""
    snapshot = source.receive(FIRST_NEWS_S)
    if snapshot is None:
        raise TransportError(no_statistics(address, FIRST_NEWS_S))
    return snapshot


def newest(source: MonitorLink | Replay, address: str) -> LiveState:
    return source.last() if isinstance(source, Replay) else first_snapshot(source, address)


def save_svg(source: MonitorLink | Replay, address: str, file: Path, size: tuple[int, int]) -> None:
    """Write one coloured frame of `size` as a picture that refers to no other file."""
    snapshot, (width, height) = newest(source, address), size
    view = View(source="replay" if isinstance(source, Replay) else "")
    lines = frame(snapshot, view, width, height + 1)[:-1]  # without the keys
    atomic_write(file, picture(lines, width, snapshot.run_name))
    print(file)


def print_once(source: MonitorLink | Replay, address: str, console: Console) -> None:
    """Print one frame, coloured in a terminal and as plain text otherwise."""
    snapshot = newest(source, address)
    view = View(
        color=console.color_system is not None,
        source=described(source) if isinstance(source, Replay) else "",
    )
    width, height = (console.width, console.height - 1) if console.is_terminal else PIPED_SIZE
    for line in frame(snapshot, view, width, height)[:-1]:
        console.print(line, soft_wrap=True) if console.is_terminal else print(line.plain.rstrip())


def print_json(source: MonitorLink | Replay, address: str) -> None:
    """Print one object per line until the run is done."""
    snapshot: LiveState | None = first_snapshot(source, address)
    while True:
        if snapshot is not None:
            sys.stdout.buffer.write(msgspec.json.encode(snapshot) + b"\n")
            sys.stdout.buffer.flush()
            if snapshot.phase == "done":
                return
        snapshot = source.receive(1.0)


def watch(source: MonitorLink | Replay, address: str, console: Console) -> None:
    """Show the dashboard until q is pressed.

    It keeps its last frame while the buffer is away, and continues when the buffer is back.
    """
    dashboard = Dashboard(address, console.color_system is not None)
    drawn_s, size = 0.0, (0, 0)
    with (
        raw_keys() as keys,
        Live(dashboard, console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            changed = False
            for key in read_keys(keys, POLL_S):
                if key in ("q", "\x03"):
                    return
                changed = True
                if isinstance(source, Replay) and (found := steer(source, key)):
                    dashboard.show(found)
                if dashboard.snapshot:
                    dashboard.view = pressed(dashboard.view, key, dashboard.snapshot)
            if isinstance(source, Replay):
                dashboard.view = replace(dashboard.view, source=described(source))
            snapshot = source.receive(0.0)
            if snapshot:
                dashboard.show(snapshot)
            due = time.monotonic() - drawn_s > SILENCE_S / 6
            if changed or snapshot or due or size != (console.width, console.height):
                live.refresh()
                drawn_s, size = time.monotonic(), (console.width, console.height)


def serve(source: MonitorLink | Replay, address: str, given: str) -> None:
    """Serve the dashboard as a web page until Ctrl-C."""
    host, port = parse_address(given)
    dashboard = Dashboard(address, color=True)

    def lines(width: int, height: int) -> list[Text]:
        return dashboard.lines(width, height + 1)[:-1]  # without the keys, which a page lacks

    def state() -> bytes | None:
        return msgspec.json.encode(dashboard.snapshot) if dashboard.snapshot else None

    try:
        server = MonitorServer(host, port, lines, state)
    except OSError as error:
        raise ValueError(f"--serve={given}: {one_line(error)}; choose another port") from error
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"serving {server.url} until Ctrl-C", flush=True)
        while True:
            if isinstance(source, Replay):
                dashboard.view = replace(dashboard.view, source=described(source))
            if snapshot := source.receive(0.2):
                dashboard.show(snapshot)


def steer(replay: Replay, key: str) -> LiveState | None:
    """Space pauses and continues, + and - change the speed, and `SEEKS` move to another step."""
    if key == " ":
        replay.held = not replay.held
    if key in ("+", "="):
        replay.change_speed(2)
    if key == "-":
        replay.change_speed(0.5)
    return replay.seek(*SEEKS[key]) if key in SEEKS else None


def described(replay: Replay) -> str:
    return "replay " + (
        "paused" if replay.held else "ended" if replay.ended() else f"×{replay.speed:g}"
    )


@contextlib.contextmanager
def raw_keys() -> Iterator[int]:
    """Standard input without line editing and echo. Restores the terminal's settings at the end."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def read_keys(descriptor: int, timeout_s: float) -> list[str]:
    """The keys pressed within `timeout_s`. A closed terminal counts as q."""
    if not select.select([descriptor], [], [], timeout_s)[0]:
        return []
    typed = os.read(descriptor, 256)
    if not typed:
        return ["q"]
    keys = []
    while typed:
        if typed[:2] in (b"\x1b[", b"\x1bO") and typed[2:3] in ARROWS:
            keys.append(ARROWS[typed[2:3]])
            typed = typed[3:]
        else:
            keys.append(chr(typed[0]))
            typed = typed[1:]
    return keys


def arguments(parser: argparse.ArgumentParser) -> None:
    default = BufferConfig()
    parser.add_argument(
        "--address",
        default=default.address,
        help="address of the buffer, as in buffer.address (default: %(default)s)",
    )
    parser.add_argument(
        "--keys",
        help="folder of the CURVE keys, as in buffer.keys (default: those of the newest run in "
        f"{RunConfig().dir}/ that has this address)",
    )
    parser.add_argument(
        "--play",
        type=Path,
        metavar="RUN",
        help="play back the run in this directory, such as runs/demo, instead of listening",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--once", action="store_true", help="print one frame as text and exit")
    output.add_argument(
        "--svg",
        type=Path,
        metavar="FILE",
        help="write one frame to this file as a picture, and exit",
    )
    output.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per snapshot until the run is done",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        default="200x50",
        metavar="COLUMNSxLINES",
        help="size of the picture of --svg (default: %(default)s)",
    )
    output.add_argument(
        "--serve",
        nargs="?",
        const="8090",
        metavar="[HOST:]PORT",
        help="serve the view as a web page, which can change nothing (default: port 8090 of "
        "127.0.0.1); with another HOST, everything that reaches it can read the run's prompts",
    )


def run(given: argparse.Namespace) -> None:
    console = Console(highlight=False)
    if not (given.once or given.svg or given.json or given.serve) and not (
        console.is_terminal and sys.stdin.isatty()
    ):
        raise ValueError(
            "input and output are not a terminal: use --once, --svg, --json or --serve"
        )
    keys = find_keys(given.address, Path(RunConfig().dir)) if given.keys is None else given.keys
    with contextlib.closing(
        Replay(given.play) if given.play else MonitorLink(next_port(given.address), keys)
    ) as source:
        if given.once:
            print_once(source, given.address, console)
        elif given.svg:
            save_svg(source, given.address, given.svg, given.size)
        elif given.json:
            print_json(source, given.address)
        elif given.serve:
            serve(source, given.address, given.serve)
        else:
            watch(source, given.address, console)


def main() -> NoReturn:
    run_command(
        "Show a live view of a run: lengths, groups in flight, prompts, lag and engines.",
        run,
        arguments=arguments,
        errors=(TransportError,),
    )


if __name__ == "__main__":
    main()
