"""`buffer.processes`: no process, temporary file or shared memory of a run is left, no matter
which of its processes is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from buffer.processes.child import Child, given_reason, in_words, stop
from buffer.processes.descendants import marks
from buffer.processes.restarts import Restarts
from buffer.processes.shared_memory import FOLDER, SharedMemory

WAIT_S = 20.0
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
# A process that ignores SIGTERM, in its own session.
GRANDCHILD = (
    f"subprocess.Popen([sys.executable, '-c', {STUBBORN + '; time.sleep(300)'!r}], "
    "start_new_session=True)"
)

# Leaves as much behind as possible. It prints its pid, the pid of a stubborn process, the names of
# its shared memory and of its semaphore, and the path of a temporary file.
MESSY = f"""
import os, subprocess, sys, tempfile
from multiprocessing import get_context, resource_tracker, shared_memory
{STUBBORN}
resource_tracker.register = lambda *_: None  # it would remove the shared memory
lock = get_context("spawn").Lock()
semaphore = "sem." + lock._semlock.name.lstrip("/")
segment = shared_memory.SharedMemory(create=True, size=64)
_, path = tempfile.mkstemp()
grandchild = {GRANDCHILD}
time.sleep(0.6)  # for the janitor to see the shared memory
print(os.getpid(), grandchild.pid, segment.name, semaphore, path, flush=True)
time.sleep(300)
"""

SUPERVISOR = f"""
import sys, time
from buffer.processes.child import Child
from buffer.processes.private_folder import private_folder
with private_folder(grace_s=0.5):
    child = Child("messy", [sys.executable, "-c", {MESSY!r}])
    while not (lines := child.lines()):
        time.sleep(0.02)
    print(lines[0], flush=True)
    sys.stdin.read()
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def lives(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + WAIT_S
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(held)


def ended(child: Child) -> int:
    assert wait_until(lambda: child.status() is not None)
    status = child.status()
    assert status is not None
    return status


# A child -----------------------------------------------------------------------------------------


def test_output_is_read_line_by_line_and_the_last_lines_are_kept() -> None:
    child = Child("talker", python("print('x\\ry'); [print(n) for n in range(30)]; print(end='?')"))
    ended(child)
    lines = child.lines()
    assert lines == ["y", *map(str, range(30)), "?"]
    assert list(child.last_lines) == lines[-20:]


def test_no_process_that_a_child_started_outlives_it() -> None:
    child = Child("parent", python(f"import subprocess, sys; print({GRANDCHILD}.pid)"))
    assert ended(child) == 0
    assert not lives(int(child.lines()[0]))


def test_a_killed_child_leaves_no_process_and_no_temporary_file() -> None:
    child = Child("messy", python(MESSY))
    assert wait_until(child.lines)
    pid, grandchild, *names, path = child.last_lines[0].split()
    child.kill()
    assert child.status() == -signal.SIGKILL
    assert not lives(int(pid)) and not lives(int(grandchild)) and not Path(path).exists()
    for name in names:
        (FOLDER / name).unlink()  # as this test has no janitor


def test_children_are_asked_to_end_and_killed_after_the_time_limit() -> None:
    polite = Child("polite", python("import time; print(1, flush=True); time.sleep(300)"))
    stubborn = Child("stubborn", python(f"{STUBBORN}; print(1, flush=True); time.sleep(300)"))
    assert wait_until(polite.lines) and wait_until(stubborn.lines)
    assert stop([polite, stubborn], limit_s=0.5) == [stubborn]
    assert (polite.status(), stubborn.status()) == (-signal.SIGTERM, -signal.SIGKILL)


@pytest.mark.parametrize("ask", [Child.terminate, Child.kill])
def test_a_child_that_ends_as_it_is_asked_to_is_still_cleared(ask: Callable[[Child], None]) -> None:
    """Its status stays known, and nothing of its process group is left."""
    start = "import subprocess; print(subprocess.Popen(['sleep', '300']).pid, flush=True); exit(3)"
    child = Child("quick", python(start))
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    ask(child)
    assert child.status() == 3
    (grandchild,) = child.lines()
    assert not lives(int(grandchild))


def test_a_second_request_cuts_the_wait_short() -> None:
    stubborn = Child("stubborn", python(f"{STUBBORN}; print(1, flush=True); time.sleep(300)"))
    assert wait_until(stubborn.lines)
    assert stop([stubborn], limit_s=3600, hurry=lambda: True) == [stubborn]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-signal.SIGSEGV, "was killed by SIGSEGV"),
        (1, "ended with exit status 1"),
        (130, "was asked to stop from outside (exit status 130)"),
    ],
)
def test_an_exit_status_is_described_in_words(status: int, words: str) -> None:
    assert in_words(status) == words


def test_the_reason_for_a_failure_is_the_last_one_printed() -> None:
    assert given_reason(["error: first", "error: second", "Traceback"]) == "second"
    assert given_reason(["Traceback"]) == ""


# A supervisor ------------------------------------------------------------------------------------


class Supervisor:
    """A supervisor of a messy child, in its own process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            python(SUPERVISOR), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        pid, grandchild, *names, path = self.process.stdout.readline().split()
        self.pids = [int(pid), int(grandchild)]
        self.shared = [FOLDER / name for name in names]
        self.file = Path(path)
        self.folder = self.file.parents[1]

    def janitor(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        (janitor,) = (int(pid) for pid in children.split() if int(pid) not in self.pids)
        return janitor

    def left(self) -> list[object]:
        files = [path for path in (*self.shared, self.file, self.folder) if path.exists()]
        return [*filter(lives, self.pids), *files]


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    one = Supervisor()
    yield one
    one.process.kill()
    one.process.communicate()
    for path in one.shared:
        path.unlink(missing_ok=True)


def test_a_killed_supervisor_leaves_nothing(supervisor: Supervisor) -> None:
    janitor = supervisor.janitor()
    assert len(supervisor.left()) == 6
    supervisor.process.kill()
    assert wait_until(lambda: not supervisor.left() and not lives(janitor)), supervisor.left()


def test_a_supervisor_that_ends_by_itself_leaves_nothing(supervisor: Supervisor) -> None:
    janitor = supervisor.janitor()
    supervisor.process.communicate()  # closes its input, which makes it end
    assert not supervisor.left() and not lives(janitor)


def test_a_killed_janitor_leaves_nothing(supervisor: Supervisor) -> None:
    os.kill(supervisor.janitor(), signal.SIGKILL)
    supervisor.process.communicate()
    assert supervisor.left() == []


def test_the_next_supervisor_removes_what_a_killed_one_and_its_killed_janitor_left(
    supervisor: Supervisor,
) -> None:
    os.kill(supervisor.janitor(), signal.SIGKILL)
    supervisor.process.kill()
    supervisor.process.wait()
    assert len(supervisor.left()) >= 5  # the messy child may have ended with its supervisor
    second = Supervisor()
    assert supervisor.left() == [] and len(second.left()) == 6  # the living one keeps its own
    second.process.communicate()


def test_shared_memory_of_a_dead_child_is_removed_while_the_supervisor_goes_on(
    supervisor: Supervisor,
) -> None:
    os.kill(supervisor.pids[0], signal.SIGKILL)
    assert wait_until(lambda: not any(path.exists() for path in supervisor.shared))
    assert supervisor.process.poll() is None


def test_shared_memory_older_than_the_janitor_is_removed_as_well(tmp_path: Path) -> None:
    child = subprocess.Popen(
        python(MESSY), stdout=subprocess.PIPE, text=True, env={**os.environ, **marks(tmp_path)}
    )
    assert child.stdout is not None
    _, grandchild, *names, path = child.stdout.readline().split()
    memory = SharedMemory(tmp_path)
    memory.look()
    for pid in (child.pid, int(grandchild)):
        os.kill(pid, signal.SIGKILL)
    child.wait()
    memory.look()
    assert len(names) == 2 and not any((FOLDER / name).exists() for name in names)
    Path(path).unlink()


def test_shared_memory_of_others_is_left_alone(supervisor: Supervisor) -> None:
    foreign = shared_memory.SharedMemory(create=True, size=64)
    foreign.close()  # now no process holds it open
    time.sleep(0.6)
    supervisor.process.communicate()
    assert (FOLDER / foreign.name).exists()
    foreign.unlink()


# Restarts and requests to stop -------------------------------------------------------------------


def test_restarts_count_within_their_window() -> None:
    now = [0.0]
    restarts = Restarts(most=2, window_s=60, clock_s=lambda: now[0])
    assert [restarts.take() for _ in range(3)] == [1, 2, 0]
    now[0] = 61.0
    assert [restarts.take() for _ in range(3)] == [1, 2, 0]


REQUEST = """
import hashlib, sys, time
from buffer.processes.stop_request import StopRequest
with StopRequest(lambda: print("stopping", flush=True), limit_s={limit_s}) as stop:
    print("ready", flush=True)
    {busy}
sys.exit(7)
"""
POLITE = "while not stop.requested: time.sleep(0.01)"
IN_A_LONG_CALL = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


def requesting(busy: str, limit_s: float) -> subprocess.Popen[str]:
    code = REQUEST.format(busy=busy, limit_s=limit_s)
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_lets_the_process_end_by_itself(number: int) -> None:
    process = requesting(POLITE, 3600)
    process.send_signal(number)
    assert process.communicate(timeout=WAIT_S)[0].rstrip("\n") == "stopping"
    assert process.returncode == 7


def test_the_first_signal_is_noticed_during_a_call_and_the_second_kills() -> None:
    process = requesting(IN_A_LONG_CALL, 3600)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_S) == 130


def test_a_process_that_does_not_end_in_time_is_killed() -> None:
    process = requesting(IN_A_LONG_CALL, 0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
