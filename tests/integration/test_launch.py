"""The launcher's life cycle with stub commands in place of buffer, actors and learner: the right
process is blamed, and none is left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tools.launching.summary import resume_hint

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0

# Each stub records its pid, so that a test can look for the process, and then runs the test's code.
NOTE = (
    "import os, signal, subprocess, sys, time; "
    "open(os.path.join(os.environ['PIDS'], str(os.getpid())), 'w').close(); "
)
SLEEP = "time.sleep(300)"
# A grandchild in its own session that ignores SIGTERM: only a kill of the whole tree ends it.
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
PARENT = "subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True); "

DRIVER = """
import json, sys
from configs import cli
from tools import launch
from tools.launching import supervision
from tools.launching.processes import Command, LocalHost
config, commands = cli.load(json.loads(sys.argv[1])), json.loads(sys.argv[2])
supervision.SETTLE_S, supervision.LEAVE_S = 0.5, 2.0
table = [Command(role, name, ("-c", code)) for role, name, code in commands]
host = LocalHost(cli.to_yaml(config), config.run.stop_s)
sys.exit(launch.exit_status(lambda: launch.conduct(config, host, table)))
"""


class Launched:
    """A launcher of stubs in its own process."""

    def __init__(self, folder: Path, port: int, stubs: dict[str, str], *overrides: str) -> None:
        self.pids, self.run_dir = folder / "pids", folder / "runs" / "run"
        self.pids.mkdir()
        commands = [(name.split()[0], name, NOTE + code) for name, code in stubs.items()]
        keys = [
            f"run.dir={folder / 'runs'}",
            f"buffer.address=tcp://127.0.0.1:{port}",
            "launch.progress=plain",
            "run.stop_s=5",
            "launch.max_restarts=0",
            *overrides,
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(keys), json.dumps(commands)], cwd=ROOT,
            env=os.environ | {"PIDS": str(self.pids)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def started(self, count: int) -> list[int]:
        """The pids of `count` stubs, as soon as they run."""
        deadline = time.monotonic() + WAIT_S
        while len(list(self.pids.iterdir())) < count:
            assert time.monotonic() < deadline and self.process.poll() is None, (
                self.process.communicate()
            )
            time.sleep(0.02)
        return [int(file.name) for file in self.pids.iterdir()]

    def line_with(self, text: str) -> str:
        """The next line of its output that holds `text`."""
        assert self.process.stdout is not None
        return next(line for line in self.process.stdout if text in line)

    def ended(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, out, err


def alive(pids: list[int]) -> list[int]:
    return [
        pid
        for pid in pids
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


@pytest.fixture
def launched(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Callable[..., Launched]]:
    all_launched: list[Launched] = []

    def start(stubs: dict[str, str], *overrides: str) -> Launched:
        all_launched.append(Launched(tmp_path, free_port(), stubs, *overrides))
        return all_launched[-1]

    yield start
    for one in all_launched:
        one.process.kill()
        one.process.communicate()


def test_a_failed_learner_is_named_and_ends_the_others(launched: Callable[..., Launched]) -> None:
    run = launched(
        {
            "buffer": SLEEP,
            "actors": SLEEP,
            "learner": "time.sleep(0.5); print('Traceback'); print('last words'); sys.exit(7)",
        }
    )
    pids = run.started(3)
    status, out, err = run.ended()
    assert status == 1
    assert "learner (pid" in err and "exit status 7" in err
    assert "last words" in out  # although the learner's own code did not print it
    assert alive(pids) == []


def test_a_killed_buffer_is_named_with_its_signal(launched: Callable[..., Launched]) -> None:
    run = launched({"buffer": "os.kill(os.getpid(), 9)", "actors": SLEEP, "learner": SLEEP})
    status, _, err = run.ended()
    assert status == 1
    assert "buffer (pid" in err and "SIGKILL" in err


def test_the_last_line_contains_the_reason_of_the_failed_process(
    launched: Callable[..., Launched],
) -> None:
    run = launched({"buffer": "sys.exit('error: no disk')", "actors": SLEEP, "learner": SLEEP})
    assert "exit status 1: no disk" in run.ended()[2]


def test_the_only_pool_failing_ends_the_run(launched: Callable[..., Launched]) -> None:
    run = launched({"buffer": SLEEP, "actors": "sys.exit(3)", "learner": SLEEP})
    status, _, err = run.ended()
    assert status == 1
    assert "actors (pid" in err


def test_one_pool_of_two_failing_does_not_end_the_run(launched: Callable[..., Launched]) -> None:
    run = launched(
        {
            "buffer": "time.sleep(2)",
            "actors a": "sys.exit(3)",
            "actors b": "time.sleep(2)",
            "learner": "time.sleep(2); sys.exit(5)",
        }
    )
    assert "learner" in run.ended()[2]


def test_a_failing_tracker_does_not_end_the_run(launched: Callable[..., Launched]) -> None:
    others = dict.fromkeys(("buffer", "actors", "learner"), "time.sleep(2)")
    _, _, err = launched({**others, "tracker": "sys.exit('error: no network')"}).ended()
    assert "in print_summary" in err  # which finds no files of the stubs


@pytest.mark.parametrize("learner", ["time.sleep(2)", "time.sleep(1); sys.exit(7)"])
def test_a_tracker_is_told_to_end_once_the_buffer_has_ended(
    learner: str, launched: Callable[..., Launched], tmp_path: Path
) -> None:
    """After a run that ended well, and after one that failed while the buffer was there."""
    told = tmp_path / "told"
    code = f"signal.signal(15, lambda *_: (open({str(told)!r}, 'a').write('once'), sys.exit())); "
    buffer = "time.sleep(2)" if "exit" not in learner else SLEEP
    others = {"buffer": buffer, "actors": buffer, "learner": learner}
    _, out, _ = launched({**others, "tracker": code + SLEEP}).ended()
    assert told.read_text() == "once" and "killed" not in out


def test_a_learner_that_ends_early_is_a_failure(launched: Callable[..., Launched]) -> None:
    run = launched({"buffer": SLEEP, "actors": SLEEP, "learner": "pass"})
    status, _, err = run.ended()
    assert status == 1
    assert "learner" in err


def test_ctrl_c_ends_all_processes_including_grandchildren(
    launched: Callable[..., Launched],
) -> None:
    parent = PARENT.format(child=NOTE + STUBBORN + SLEEP)
    run = launched(
        {"buffer": SLEEP, "actors": parent + STUBBORN + SLEEP, "learner": SLEEP}, "run.stop_s=0.5"
    )
    pids = run.started(4)
    run.process.send_signal(signal.SIGINT)
    assert run.ended()[0] == 130
    assert alive(pids) == []


def test_ctrl_c_is_acknowledged_at_once_and_a_second_one_kills(
    launched: Callable[..., Launched],
) -> None:
    stubs = {"buffer": SLEEP, "actors": STUBBORN + "print('actors: deaf');" + SLEEP}
    run = launched(stubs, "run.stop_s=3600")
    pids = run.started(2)
    run.line_with("deaf")
    run.process.send_signal(signal.SIGINT)
    assert "up to 3600 s; Ctrl-C again to kill" in run.line_with("stopping: ")
    run.process.send_signal(signal.SIGINT)
    assert run.ended()[0] == 130
    assert alive(pids) == []


def test_the_buffer_is_told_to_stop_before_the_others(launched: Callable[..., Launched]) -> None:
    tell = "signal.signal(signal.SIGTERM, lambda *_: (print('{role}: told'), {then}sys.exit(130)));"
    stubs = {
        "buffer": tell.format(role="buffer", then="time.sleep(0.5), print('buffer: ends'), "),
        "learner": tell.format(role="learner", then=""),
    }
    run = launched(
        {role: f"{code} print('{role}: ready');" + SLEEP for role, code in stubs.items()}
    )
    run.line_with("ready"), run.line_with("ready")
    run.process.send_signal(signal.SIGTERM)
    status, out, err = run.ended()
    assert status == 130, err
    lines = [line for line in out.splitlines() if " | " in line]
    assert lines == ["buffer | told", "buffer | ends", "learner | told"]


DIES_ONCE = (
    "[os.kill(os.getpid(), 9) for _ in range(1) if len(os.listdir(os.environ['PIDS'])) < {n}];"
)


def test_a_killed_learner_is_restarted_with_resume(launched: Callable[..., Launched]) -> None:
    dies = DIES_ONCE.format(n=3)
    run = launched(
        {
            "buffer": "time.sleep(3)",
            "learner": dies + "print('learner: has', sys.argv[1:]); time.sleep(3)",
        },
        "launch.max_restarts=1",
    )
    assert "['run.resume=true']" in run.line_with("learner | has")
    assert len(run.started(3)) == 3


@pytest.mark.parametrize(
    ("stub", "status"), [("os.kill(os.getpid(), 9)", "SIGKILL"), ("sys.exit(75)", "75")]
)
def test_a_learner_that_keeps_dying_ends_the_run(
    launched: Callable[..., Launched], stub: str, status: str
) -> None:
    run = launched({"buffer": SLEEP, "actors": SLEEP, "learner": stub}, "launch.max_restarts=2")
    code, _, err = run.ended()
    assert code == 1
    assert status in err and "launch.max_restarts=2" in err
    assert len(run.started(0)) == 5


def test_restarts_of_the_learner_count_within_their_window(
    launched: Callable[..., Launched],
) -> None:
    stub = "time.sleep(0.6);" + DIES_ONCE.format(n=6) + "sys.exit('error: enough')"
    run = launched(
        {"buffer": SLEEP, "actors": SLEEP, "learner": stub},
        "launch.max_restarts=1",
        "launch.restart_window_s=0.4",
    )
    assert run.ended()[2].startswith("error: learner (pid") and len(run.started(0)) == 6


@pytest.mark.parametrize("signal_or_status", ["sys.exit(1)", "os.kill(os.getpid(), 15)"])
def test_a_learner_that_failed_or_was_told_to_stop_is_not_restarted(
    launched: Callable[..., Launched], signal_or_status: str
) -> None:
    run = launched(
        {"buffer": SLEEP, "actors": SLEEP, "learner": signal_or_status}, "launch.max_restarts=2"
    )
    assert run.ended()[0] == 1
    assert len(run.started(0)) == 3


def test_a_killed_pool_and_a_killed_buffer_are_restarted(
    launched: Callable[..., Launched],
) -> None:
    run = launched(
        {
            "buffer": "time.sleep(2); os.kill(os.getpid(), 9)",
            "actors": DIES_ONCE.format(n=4) + SLEEP,
            "learner": SLEEP,
        },
        "launch.max_restarts=2",
    )
    assert "buffer (pid" in run.ended()[2]
    assert len(run.started(0)) == 6  # the buffer three times, the pool twice, the learner once


@pytest.mark.parametrize(("exists", "arguments"), [(True, "['run.resume=true']"), (False, "[]")])
def test_a_killed_buffer_resumes_a_run_only_if_the_run_had_begun(
    launched: Callable[..., Launched], exists: bool, arguments: str
) -> None:
    make = "os.makedirs(f, exist_ok=True); open(f + '/config.yaml', 'w');"
    folder = "f = os.path.dirname(os.environ['PIDS']) + '/runs/run';"
    run = launched(
        {
            "buffer": folder + exists * make + DIES_ONCE.format(n=2)
            + "print('buffer: has', sys.argv[1:]);" + SLEEP,
        },
        "launch.max_restarts=1",
    )  # fmt: skip
    assert arguments in run.line_with("buffer | has")


def test_a_killed_launcher_leaves_no_process(launched: Callable[..., Launched]) -> None:
    run = launched(
        {
            "buffer": STUBBORN + SLEEP,
            "actors": PARENT.format(child=NOTE + SLEEP) + SLEEP,
            "learner": SLEEP,
        },
        "run.stop_s=1",
    )
    pids = run.started(4)
    folder = next(
        value for value in psutil.Process(pids[0]).environ().items() if value[0] == "TMPDIR"
    )
    run.process.kill()
    deadline = time.monotonic() + WAIT_S
    while (left := alive(pids)) or Path(folder[1]).parent.exists():
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_run_succeeds_if_its_buffer_does_and_ends_with_its_report(
    launched: Callable[..., Launched],
) -> None:
    run = launched({"buffer": "time.sleep(1)", "actors": SLEEP, "learner": "time.sleep(1)"})
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "config.yaml").write_text("run: {name: run, steps: 1}\n")
    rows = [{"step": 0, "time_s": 1.0, "reward/mean": 0.5, "eval/reward_mean": 0.25}]
    (run.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = run.ended()
    assert status == 0, err
    assert out.splitlines()[-1] == f"Report: {run.run_dir / 'report.html'}"
    assert (run.run_dir / "report.html").stat().st_size > 1000


def test_the_hint_names_the_step_to_resume_from(tmp_path: Path) -> None:
    assert "run.resume" not in resume_hint(tmp_path)
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_000040")
    assert "from step 40" in resume_hint(tmp_path)
    assert f"--config {tmp_path / 'config.yaml'} run.resume=true" in resume_hint(tmp_path)
