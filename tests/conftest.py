"""Shared by all tests: markers that skip with a reason, and free ports."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Callable

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, and their children too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
    `buffer.address` needs them.
    """

    def find() -> int:
        for _ in range(100):
            with socket.socket() as first, socket.socket() as second:
                first.bind(("127.0.0.1", 0))
                port = first.getsockname()[1]
                try:
                    second.bind(("127.0.0.1", port + 1))
                except (OSError, OverflowError):
                    continue
                return port
        raise RuntimeError("no two free consecutive ports on 127.0.0.1")

    return find
