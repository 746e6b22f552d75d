"""The smallest `python -m tools.bench pipeline` measures both halves. Speed is not tested."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from tools.warm_start import build_model, build_tokenizer  # noqa: E402

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.alone, pytest.mark.slow]


def test_it_prints_the_ratio_of_both_actors_and_learner(tmp_path: Path) -> None:
    build_model(seed=0).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    command = [
        sys.executable,
        "-m",
        "tools.bench",
        "pipeline",
        f"model.path={tmp_path / 'model'}",
        "bench.rounds=1",
        "bench.seconds=3",
    ]
    command += [
        "bench.warmup_s=1",
        "actors.slots=8",
        "batch.groups=2",
        "darts.group_size=2",
        "sampling.max_tokens=32",
        "bench.steps=3",
    ]
    command += ["actors.kv_cache_gib=0.1", "loss.train_truncated=true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^(actors|learner).*? ([\d,]+) +([\d,]+) +(\d\.\d{3}) ", done.stdout, re.MULTILINE
    )
    assert [name for name, *_ in rows] == ["actors", "actors", "actors", "learner"], done.stdout
    for _, bare, pipeline, ratio in rows:
        assert int(bare.replace(",", "")) > 0 and int(pipeline.replace(",", "")) > 0
        # Both sides do the same amount of work; the factor allows for a busy machine.
        assert 0 < float(ratio) < 10
    assert re.search(r"paused for [1-9]\d* swaps", done.stdout), done.stdout
