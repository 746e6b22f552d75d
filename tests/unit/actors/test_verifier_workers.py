"""Verifiers that misbehave: each results in a failure that names its fault, and no process that
it started survives.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.verifier_load import VerifierFailure, VerifierTimeout
from actors.verifier_workers import OUTPUT_BYTES, WorkerPool
from buffer.processes.child import python_path
from buffer.processes.descendants import processes_of
from buffer.wire.messages import PromptPayload, VerifierReport
from configs.schema import DataConfig

SECONDS = 10**9 + os.getpid()  # so that no process of another test is mistaken for ours
MODULE = f"odd_verifiers_{os.getpid()}"
VERIFIERS = '''
import ctypes, mmap, os, signal, subprocess, sys, threading, time

MOST_FILES = 4096  # a long test run has hundreds open, and pipes keep their numbers
HELPER = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2000)"])


class Unpicklable(Exception):
    def __reduce__(self):
        raise RuntimeError("not to be pickled")

    def __str__(self):
        raise RuntimeError("not to be shown")


class Odd:
    def __repr__(self):
        raise RuntimeError("not to be shown")


def sleeper(**options):
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(SECONDS)"], **options)


def raising(error):
    def verify():
        raise error
    return verify


def ignore_and_sleep():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(SECONDS)


def allocate():
    kept = []
    while True:
        kept.append(bytearray(1 << 24))


def map_memory():
    kept = []
    while True:
        kept.append(mmap.mmap(-1, 1 << 24))


def fork_and_exit():
    if os.fork():
        os._exit(0)
    return 1.0


def fork_and_return():
    os.fork()
    return 1.0


def daemon():
    """Hides completely: a double fork, its own session and an empty environment."""
    ready, unready = os.pipe()  # closed by exec
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            program = "import time; time.sleep(SECONDS)"
            os.execve(sys.executable, [sys.executable, "-c", program], {})
        os._exit(0)
    os.close(unready)
    os.read(ready, 1)
    return 1.0


def stop_oneself():
    os.kill(os.getpid(), signal.SIGSTOP)
    return 1.0


def write_to_every_pipe():
    for fd in range(3, MOST_FILES):
        try:
            os.write(fd, b"1.0\\n")
        except OSError:
            continue
    return 1.0


def recurse():
    return recurse()


CASES = {
    "ignores SIGTERM": ignore_and_sleep,
    "spins": lambda: [None for _ in iter(int, 1)],
    "allocates": allocate,
    "maps": map_memory,
    "prints": lambda: print("x" * 5_000_000) or 1.0,
    "forks and exits": fork_and_exit,
    "kills itself": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kills its group": lambda: os.killpg(0, signal.SIGKILL),
    "segfaults": lambda: ctypes.string_at(0),
    "stops itself": stop_oneself,
    "closes everything": lambda: os.closerange(0, MOST_FILES) or 1.0,
    "writes to every pipe": write_to_every_pipe,
    "unpicklable": raising(Unpicklable()),
    "SystemExit": raising(SystemExit(0)),
    "KeyboardInterrupt": raising(KeyboardInterrupt()),
    "GeneratorExit": raising(GeneratorExit()),
    "recursion": recurse,
    "nan": lambda: float("nan"),
    "inf": lambda: float("-inf"),
    "text": lambda: "1.0",
    "none": lambda: None,
    "list": lambda: [1.0],
    "huge float": lambda: 1e300,
    "huge int": lambda: 10 ** 400,
    "complex": lambda: 1j,
    "odd": Odd,
    "bool": lambda: True,
    "waits for a child": lambda: float(sleeper().kill() is None),
    "leaves a child": lambda: float(bool(sleeper())),
    "leaves a session": lambda: float(bool(sleeper(start_new_session=True))),
    "leaves a daemon": daemon,
    "daemon, then hangs": lambda: daemon() and ignore_and_sleep(),
    "forks and returns": fork_and_return,
    "reads input": lambda: float(sys.stdin.read() == ""),
    "helper": lambda: float(HELPER.poll() is None),
}


def verify(prompt, response, answer, metadata):
    return CASES[response]()
'''

FAILURES = {  # a verifier's fault -> a phrase of its failure
    "ignores SIGTERM": "took longer than 1 s",
    "spins": "took longer than 1 s",
    "allocates": "ran out of memory (data.verifier_memory_mb)",
    "maps": "ran out of memory (data.verifier_memory_mb)",
    "prints": f"printed more than {OUTPUT_BYTES} bytes",
    "forks and exits": "ended with exit status 0",
    "kills itself": "was killed by SIGKILL",
    "kills its group": "was killed by SIGKILL",
    "segfaults": "was killed by SIGSEGV",
    "stops itself": "took longer than 1 s",
    "closes everything": "ended with exit status",
    "writes to every pipe": "wrote to the pipe of its rewards",
    "unpicklable": "raised Unpicklable",
    "SystemExit": "raised SystemExit: 0",
    "KeyboardInterrupt": "raised KeyboardInterrupt",
    "GeneratorExit": "raised GeneratorExit",
    "recursion": "raised RecursionError",
    "nan": "returned nan",
    "inf": "returned -inf",
    "text": "returned '1.0'",
    "none": "returned None",
    "list": "returned [1.0]",
    "huge float": "returned 1e+300",
    "huge int": "raised OverflowError",
    "complex": "returned 1j",
    "odd": "raised RuntimeError",
}
REWARDED = [
    "bool",
    "waits for a child",
    "leaves a child",
    "leaves a session",
    "leaves a daemon",
    "forks and returns",
    "reads input",
    "helper",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verifiers")
    (folder / f"{MODULE}.py").write_text(VERIFIERS.replace("SECONDS", str(SECONDS)))
    return folder


@pytest.fixture(scope="module")
def make_pool(folder: Path) -> Iterator[Callable[..., WorkerPool]]:
    pools = []

    def make(**data: float) -> WorkerPool:
        settings = {"verifier_timeout_s": 60.0, "verifier_memory_mb": 600, "verifier_workers": 1}
        pools.append(WorkerPool(f"{MODULE}:verify", DataConfig(**{**settings, **data})))
        return pools[-1]

    before = Path.cwd()
    os.chdir(folder)
    yield make
    for pool in pools:
        pool.close()
    os.chdir(before)


@pytest.fixture(scope="module")
def pool(make_pool: Callable[..., WorkerPool]) -> WorkerPool:
    return make_pool()


@pytest.fixture(scope="module")
def hasty_pool(make_pool: Callable[..., WorkerPool]) -> WorkerPool:
    return make_pool(verifier_timeout_s=1.0)


def score(pool: WorkerPool, response: str) -> float:
    prompt = PromptPayload(prompt_id="p", text="?", messages=[], answer="", metadata="")
    return asyncio.run(pool.score(prompt, response))


def processes(before: set[int]) -> set[int]:
    """The processes that exist now and are not in `before`, zombies included."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit()} - before


def commands(pids: set[int]) -> list[str]:
    found = []
    for pid in pids:
        try:
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], bool], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds


@pytest.mark.slow
@pytest.mark.parametrize("case", FAILURES)
def test_a_verifier_that_misbehaves_is_named_and_the_next_one_is_scored(
    pool: WorkerPool, hasty_pool: WorkerPool, case: str
) -> None:
    one = hasty_pool if "took longer" in FAILURES[case] else pool
    with pytest.raises(VerifierFailure) as failure:
        score(one, case)
    assert FAILURES[case] in str(failure.value) and "\n" not in str(failure.value)
    assert score(one, "bool") == 1.0


@pytest.mark.parametrize("case", REWARDED)
def test_a_verifier_may_start_processes(pool: WorkerPool, case: str) -> None:
    assert score(pool, case) == 1.0
    assert score(pool, "bool") == 1.0


def sleepers() -> list[str]:
    """The processes that our verifiers left behind."""
    return [one for one in commands(processes(set())) if str(SECONDS) in one]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["leaves a child", "leaves a session", "leaves a daemon"])
def test_a_process_that_a_verification_left_behind_is_ended(pool: WorkerPool, case: str) -> None:
    assert score(pool, case) == 1.0
    assert wait_for(lambda: not sleepers())
    assert score(pool, "helper") == 1.0  # uses a process started at import, which must survive


@pytest.mark.parametrize("case", ["leaves a daemon", "ignores SIGTERM", "forks and exits"])
def test_closing_a_pool_ends_all_processes_of_its_verifiers(
    make_pool: Callable[..., WorkerPool], case: str
) -> None:
    before = processes(set())
    pool = make_pool(verifier_timeout_s=0.5)
    try:
        score(pool, case)
    except VerifierFailure:
        pass  # this test is not about the reward
    pool.close()
    assert wait_for(lambda: not sleepers())
    assert wait_for(lambda: not [c for c in commands(processes(before)) if MODULE in c])


def test_a_deadline_grows_with_the_longest_verification_that_gave_a_reward(
    make_pool: Callable[..., WorkerPool],
) -> None:
    pool = make_pool(verifier_timeout_s=1e-6)
    with pytest.raises(VerifierTimeout, match="took longer than 1e-06 s"):
        score(pool, "bool")
    pool._load.rewarded(100.0)
    assert pool._load.deadline_s(1e-6) == 500.0 and pool._load.deadline_s(600.0) == 600.0
    assert score(pool, "bool") == 1.0


def test_a_worker_that_died_while_it_was_idle_is_replaced(pool: WorkerPool) -> None:
    assert score(pool, "bool") == 1.0
    (worker,) = pool._workers
    os.killpg(worker._process.pid, signal.SIGKILL)
    assert wait_for(lambda: not worker.lives)
    assert score(pool, "bool") == 1.0
    assert worker not in pool._workers


def test_the_load_of_the_workers_is_measured(make_pool: Callable[..., WorkerPool]) -> None:
    """One worker has three responses: one is verified, one waits, and one is given up."""
    pool = make_pool(verifier_timeout_s=1.0)
    prompt = PromptPayload(prompt_id="p", text="?", messages=[], answer="", metadata="")

    async def measure_meanwhile() -> VerifierReport:
        tasks = [
            asyncio.create_task(pool.score(prompt, response))
            for response in ("spins", "bool", "bool")
        ]
        await asyncio.sleep(0.3)
        tasks[2].cancel()
        await asyncio.sleep(0)
        meanwhile = pool.measure()
        await asyncio.gather(*tasks, return_exceptions=True)
        return meanwhile

    meanwhile = asyncio.run(measure_meanwhile())
    assert (meanwhile.num_busy, meanwhile.num_waiting, meanwhile.num_verified) == (1, 1, 0)
    after = pool.measure()
    assert (after.num_busy, after.num_waiting, after.num_workers) == (0, 0, 1)
    assert (after.num_verified, after.num_failed, after.num_timeouts) == (2, 1, 1)
    assert after.longest_s >= 1.0 and after.time_s >= after.longest_s
    assert after.queue_s >= 1.0
    assert pool.measure() == VerifierReport(num_workers=1)


def test_closing_does_not_wait_for_a_verification(make_pool: Callable[..., WorkerPool]) -> None:
    pool = make_pool(verifier_timeout_s=600)

    async def close_meanwhile() -> float:
        prompt = PromptPayload(prompt_id="p", text="?", messages=[], answer="", metadata="")
        scoring = asyncio.ensure_future(pool.score(prompt, "ignores SIGTERM"))
        await asyncio.sleep(1.0)
        started_s = time.monotonic()
        await asyncio.to_thread(pool.close)
        with pytest.raises(VerifierFailure):
            await scoring
        return time.monotonic() - started_s

    assert asyncio.run(close_meanwhile()) < 10


def test_all_processes_of_a_verifier_end_with_a_killed_engine(folder: Path, tmp_path: Path) -> None:
    """The engine is killed during a verification that ignores all signals that can be ignored."""
    engine = f"""
import asyncio
from actors.verifier_workers import WorkerPool
from configs.schema import DataConfig
from tests.unit.actors.test_verifier_workers import score
pool = WorkerPool({MODULE + ":verify"!r}, DataConfig(verifier_timeout_s=600, verifier_workers=1))
score(pool, "daemon, then hangs")
"""
    environment = {**os.environ, **python_path(), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", engine], cwd=folder, env=environment)
    try:
        assert wait_for(lambda: bool(sleepers()), 60)
    finally:
        process.kill()
        process.wait()
    assert wait_for(lambda: not sleepers())
    assert wait_for(lambda: not processes_of(tmp_path))
