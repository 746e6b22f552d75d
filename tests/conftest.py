"""Shared by all tests: skips with a reason, second tries, free ports, and the built-in model."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# An example may take as long as a busy machine needs.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

# A shell that starts the tests in the background has them ignore Ctrl-C, and their children too.
signal.signal(signal.SIGINT, signal.default_int_handler)


if "PYTEST_XDIST_WORKER" in os.environ:
    # xdist says how large its terminal is, and what a test starts would believe it.
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    # Threads of one computation wait for each other, for long if another test has their processor.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Of real processes and clocks, so that a busy machine can fail one of thousands.
SECOND_TRY = [Path(__file__).parent / folder for folder in ("chaos", "e2e", "integration")]
# Of peers that wait for each other for a second or two: they need the machine to themselves.
ALONE = [
    Path(__file__).parent / "integration" / f"test_{name}.py"
    for name in (
        "deadlines", "floods", "hostile_peers", "launch", "links", "processes", "recovery",
        "rejoin", "service",
    )
]  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU. A test of real processes that fails runs once more, and
    the summary names it as RERUN: a fault to look for, which costs nobody a whole run.
    """
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in SECOND_TRY):
            item.add_marker(pytest.mark.flaky(reruns=1))
        if item.path in ALONE:
            item.add_marker(pytest.mark.alone)
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))


def _has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False  # torch takes seconds to import, so ask it only if there is a driver
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that returns the first of two consecutive free ports of the loopback interface, as
    `buffer.address` needs them. Each process takes its ports in an order of its own, and from below
    those that the system hands out, so that tests side by side are not given the same.
    """
    ports = list(range(16000, 32000, 2))
    random.SystemRandom().shuffle(ports)

    def find() -> int:
        while ports:
            port = ports.pop()
            with socket.socket() as first, socket.socket() as second:
                try:
                    first.bind(("127.0.0.1", port))
                    second.bind(("127.0.0.1", port + 1))
                except OSError:
                    continue
                return port
        raise RuntimeError("no two free consecutive ports on 127.0.0.1")

    return find


@pytest.fixture(scope="session")
def tiny_reasoner() -> Path:
    """The folder of the built-in model, made once and kept, as `make demo` does. If tests that run
    side by side need it, one of them makes it and the others wait.
    """
    root = Path(__file__).parents[1]
    folder = root / "models" / "tiny-reasoner"
    folder.parent.mkdir(exist_ok=True)
    lock = os.open(folder.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # In a process of its own, which coverage does not slow down.
        command = [sys.executable, "-m", "tools.warm_start", str(folder)]
        subprocess.run(command, cwd=root, check=True)
    finally:
        os.close(lock)
    return folder
