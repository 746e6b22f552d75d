"""Shared prompts against repeated ones, with the kernels of the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner import fsdp
from learner.probes.sharing import probe_sharing
from tests.families import save_family
from tests.gpu.conftest import DEVICE, Note
from tests.learner_cases import make_config, single_rank

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else [pytest.mark.slow]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_prompts_equal_repeated_ones(tmp_path: Path, dtype: str, note: Note) -> None:
    path = save_family(tmp_path / "model", "qwen3")
    config = make_config(path, tmp_path / "run", learner__device=DEVICE, model__dtype=dtype)
    with single_rank(config) as state:
        sharing = probe_sharing(state.boundaries, state.packing, fsdp.COMPUTE_DTYPE[dtype])
        assert state.shares_prompts, sharing
    note("largest difference of a log-probability", f"{sharing.difference.logprob:.1e} nats")
    note("of a gradient", f"{sharing.difference.gradient:.1e}")
