"""The monitor as a program between a real publisher and a real pseudo-terminal or pipe."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from buffer.wire.messages import GroupView, LiveState, PromptView, RolloutView
from buffer.wire.transport import Publisher, next_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
AS_FILE = [sys.executable, "tools/tail_monitor.py"]
AS_MODULE = [sys.executable, "-m", "tools.tail_monitor"]
DEADLINE_S = 40.0


def snapshot(step: int, phase: str = "training") -> LiveState:
    rollouts = [
        RolloutView(
            rollout_id=place, tokens=10 + 7 * place, state="running" if place > 5 else "finished"
        )
        for place in range(12)
    ]
    groups = [
        GroupView(
            group_id=place,
            prompt_id=f"flight-{place}",
            long_end="survivor",
            budget=12,
            short_cutoff=40,
            rollouts=rollouts,
        )
        for place in range(9)
    ]
    prompts = [
        PromptView(
            prompt_id=f"closed-{place}",
            spread=1 - place / 30,
            budget=12,
            pass_rate=0.5,
            lengths_right=[20, 30],
            lengths_wrong=[80, 200],
        )
        for place in range(20)
    ]
    return LiveState(
        time_s=time.time(), run_name="little", phase=phase, step=step, steps=60,
        policy_version=step, max_lag=4, waiting="learner waits for groups", groups_open=9,
        groups_ready=3, bytes_held=1000, refused_frames=0, histogram_edges=[0, 8, 16, 32, 64],
        histogram={"selected_short": [1, 5, 9, 2], "cancelled": [0, 0, 3, 4]}, lags=[0, 1, 1, 2],
        metrics={"reward/mean": 0.625}, groups=groups, engines=[], prompts=prompts,
    )  # fmt: skip


@pytest.fixture
def address(free_port: Callable[[], int]) -> str:
    return f"tcp://127.0.0.1:{free_port()}"


@contextmanager
def publishing(address: str, make: Callable[[], LiveState]) -> Iterator[None]:
    """Publish as a buffer does, ten times per second."""
    stop = threading.Event()

    def publish() -> None:
        with Publisher(next_port(address)) as publisher:
            while not stop.wait(0.1):
                publisher.publish(b"", make())

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Terminal:
    """A program in a pseudo-terminal, and the frames that it draws, as lines without colours."""

    def __init__(self, command: list[str], width: int, height: int) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execve(
                command[0], command, os.environ | {"TERM": "xterm-256color", "PYTHONPATH": ""}
            )
        self.output = b""
        self.resize(width, height)

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self.descriptor, keys)

    def read(self, timeout_s: float = 0.2) -> bool:
        """Read output. False once the program has closed the terminal."""
        if not select.select([self.descriptor], [], [], timeout_s)[0]:
            return True
        try:
            data = os.read(self.descriptor, 1 << 16)
        except OSError:
            return False
        self.output += data
        return bool(data)

    def frames(self) -> list[list[str]]:
        """All complete frames: the text between one return to the top left corner and the next."""
        drawn = self.output.decode(errors="replace").split("\x1b[H")[1:-1]
        return [
            re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "").rstrip("\n").split("\n")
            for text in drawn
        ]

    def until(self, condition: Callable[[list[str]], bool]) -> list[str]:
        """The first frame from now on that satisfies `condition`."""
        seen, deadline = len(self.frames()), time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            self.read()
            frames = self.frames()
            for shown in frames[seen:]:
                if condition(shown):
                    return shown
            seen = len(frames)
        raise AssertionError(
            f"not seen within {DEADLINE_S} s; the last output was {self.output[-2000:]!r}"
        )

    def ended(self) -> int:
        """Wait for the end of the program and return its exit status."""
        while self.read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextmanager
def terminal(command: list[str], width: int, height: int) -> Iterator[Terminal]:
    opened = Terminal(command, width, height)
    try:
        yield opened
    finally:
        try:
            os.kill(opened.pid, signal.SIGKILL)
            os.waitpid(opened.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # it has ended, and `ended` has seen it
        os.close(opened.descriptor)


def holds(*words: str) -> Callable[[list[str]], bool]:
    return lambda shown: all(any(word in line for line in shown) for word in words)


def run(command: list[str], timeout_s: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | {"PYTHONPATH": ""},
        check=False,
    )


@pytest.mark.parametrize("size", [(80, 24), (200, 50)])
def test_the_dashboard_fits_its_terminal(address: str, size: tuple[int, int]) -> None:
    with (
        publishing(address, lambda: snapshot(7)),
        terminal([*AS_FILE, "--address", address], *size) as screen,
    ):
        shown = screen.until(holds("step 7/60", "closed-0", "flight-0", "Engines"))
        assert len(shown) == size[1]
        assert {len(line) for line in shown} == {size[0]}
        screen.press(b"q")
        assert screen.ended() == 0


def test_keys_move_the_cursor_and_open_the_help(address: str) -> None:
    with (
        publishing(address, lambda: snapshot(7)),
        terminal([*AS_FILE, "--address", address], 100, 30) as screen,
    ):
        screen.until(holds("Prompt closed-0"))
        screen.press(b"\x1b[B\x1b[B")
        screen.until(holds("Prompt closed-2"))
        screen.press(b"s")
        screen.until(holds("Prompts by budget", "Prompt closed-2"))
        screen.press(b"?")
        screen.until(holds("Pattern II"))


def test_a_resized_terminal_is_filled_again(address: str) -> None:
    with (
        publishing(address, lambda: snapshot(7)),
        terminal([*AS_FILE, "--address", address], 80, 24) as screen,
    ):
        screen.until(lambda shown: len(shown) == 24)
        screen.resize(140, 40)
        screen.until(lambda shown: len(shown) == 40 and {len(line) for line in shown} == {140})


def test_it_survives_the_buffers_restart(address: str) -> None:
    with terminal([*AS_FILE, "--address", address], 80, 24) as screen:
        screen.until(holds("no statistics from"))
        with publishing(address, lambda: snapshot(7)):
            screen.until(holds("step 7/60"))
        screen.until(holds("step 7/60", "no news for"))
        with publishing(address, lambda: snapshot(8)):
            screen.until(lambda shown: holds("step 8/60")(shown) and not holds("no news")(shown))
        screen.press(b"q")
        assert screen.ended() == 0


@pytest.mark.parametrize("command", [AS_FILE, AS_MODULE], ids=["file", "module"])
def test_once_prints_one_plain_frame(address: str, command: list[str]) -> None:
    with publishing(address, lambda: snapshot(7)):
        done = run([*command, "--once", "--address", address])
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 7/60" in done.stdout and "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_json_is_one_object_per_snapshot_until_the_run_is_done(address: str) -> None:
    steps = iter(range(10_000))
    with publishing(
        address, lambda: snapshot(step := next(steps), "done" if step > 40 else "training")
    ):
        done = run([*AS_FILE, "--json", "--address", address])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert (
        len(rows) > 1
        and [row["phase"] for row in rows].count("done") == 1
        and rows[-1]["phase"] == "done"
    )
    assert rows[0]["groups"][0]["short_cutoff"] == 40


def test_the_web_page_shows_the_states_of_a_publisher(address: str) -> None:
    command = [*AS_MODULE, "--address", address, "--serve", "127.0.0.1:0"]
    with (
        publishing(address, lambda: snapshot(step=7)),
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        url = process.stdout.readline().split()[1]
        deadline, state = time.monotonic() + DEADLINE_S, None
        while state is None and time.monotonic() < deadline:
            state = json.loads(urlopen(f"{url}state", timeout=10).read())
        frame = urlopen(f"{url}frame?width=120&height=30", timeout=10).read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
    assert state is not None and (state["run_name"], state["step"]) == ("little", 7)
    assert "step 7/60" in frame and "flight-0" in frame and "q quit" not in frame


def test_a_missing_buffer_is_reported_in_one_clear_line(address: str) -> None:
    done = run([*AS_FILE, "--once", "--address", address])
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: no statistics from {address} within 10 s: is `python -m buffer` running there, "
        "with the keys that --keys names?"
    ]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], 2),
        (["--once", "--address", "nowhere"], 2),
        (["--serve", "70000", "--address", "tcp://127.0.0.1:1"], 2),
        (["--once", "--play", "no/such/run"], 2),
    ],
)
def test_a_mistake_is_reported_in_one_line(arguments: list[str], status: int) -> None:
    done = run([*AS_FILE, *arguments])
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")


def test_a_replay_plays_to_its_end_and_can_be_paused(tmp_path: Path) -> None:
    rollout = {"rollout_id": 1, "engine": "e", "tokens": 30, "reward": 1.0, "end": "selected_short"}
    group = {
        "group_id": 1,
        "prompt_id": "p",
        "opened_version": 0,
        "shipped_version": 0,
        "budget": 1,
        "long_end": "none",
        "end": "shipped",
    }
    (tmp_path / "groups.jsonl").write_text(
        "".join(
            json.dumps(group | {"step": step, "rollouts": [rollout]}) + "\n" for step in range(30)
        )
    )
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "time_s": step}) + "\n" for step in range(30))
    )
    with terminal([*AS_FILE, "--play", str(tmp_path)], 80, 24) as screen:
        screen.until(holds("replay ×2"))  # steps of one second
        screen.press(b" ")
        screen.until(holds("replay paused"))
        screen.press(b" ++++")
        screen.until(holds("replay ended", "step 30/30"))
        screen.press(b"q")
        assert screen.ended() == 0
