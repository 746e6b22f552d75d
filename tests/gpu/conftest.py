"""The table that `make gpu-check` prints: one line per check, with the figures that it measured."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.schema import Device

DEVICE: Device = "cpu" if os.environ.get("GPU_CHECK_DEVICE") == "cpu" else "cuda"

Note = Callable[[str, str], None]


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """A function that adds a figure, its name and its value with the unit, to the test's line."""
    return record_property


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = {
        outcome: [
            report
            for report in terminalreporter.getreports(outcome)
            if Path(report.nodeid).is_relative_to("tests/gpu")
        ]
        for outcome in ("passed", "failed", "error", "skipped")
    }
    if not any(reports.values()):
        return
    terminalreporter.section(f"checks on {_device_name()}")
    for outcome, of_outcome in reports.items():
        for report in of_outcome:
            name = report.nodeid.rpartition("::test_")[2].replace("_", " ")
            figures = ", ".join(f"{key} {value}" for key, value in report.user_properties)
            terminalreporter.write_line(f"{outcome:<8} {name}{f': {figures}' if figures else ''}")


def _device_name() -> str:
    import torch  # here, since it takes seconds

    versions = f"torch {torch.__version__}"
    if DEVICE != "cuda" or not torch.cuda.is_available():
        return f"no GPU, {versions}"
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name(0)} ({gib:.0f} GiB), {versions}"
