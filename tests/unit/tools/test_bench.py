"""`python -m tools.bench core` and `buffer`, which run on a machine of any speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tools import bench
from tools.benchmarks import traffic


def test_the_core_bench_measures_progress_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    bench.core([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["progress", "ends"]
    for line in lines[1:]:
        assert float(line.split()[1].replace(",", "")) > 0


@pytest.mark.slow
def test_traffic_goes_through_a_real_buffer_which_is_then_restarted(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "PORT", free_port())
    monkeypatch.setattr(traffic, "MEASURED_S", 2.0)
    config = traffic.bench_config(tmp_path, "short", "sampling.max_tokens=160")
    assert traffic.ends_per_s(config, tmp_path, 20, 4, 8) > 0
    assert traffic.seconds_to_restart(config, tmp_path) > 0
