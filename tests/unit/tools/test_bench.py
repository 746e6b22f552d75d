"""`python -m tools.bench core` runs on a machine of any speed."""

import pytest

from tools import bench


def test_the_core_bench_measures_progress_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    bench.core([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["progress", "ends"]
    for line in lines[1:]:
        assert float(line.split()[1].replace(",", "")) > 0
