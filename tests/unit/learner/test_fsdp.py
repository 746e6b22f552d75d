"""Behaviour that depends on the machine of a rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.schema import Config
from learner.fsdp import slow_dtype


@pytest.mark.parametrize(
    ("dtype", "device", "flags", "slow"),
    [
        ("bfloat16", "cpu", "flags : fpu avx2 avx512f", True),
        ("bfloat16", "cpu", "flags : fpu avx512f avx512_bf16", False),
        ("bfloat16", "cpu", "flags : fpu amx_bf16 amx_tile", False),
        ("bfloat16", "cpu", "Features : fp asimd bf16", False),
        ("float32", "cpu", "flags : fpu", False),
        # On a CPU, a learner with this dtype computes in float32.
        ("float16", "cpu", "flags : fpu", False),
        ("bfloat16", "cuda", "flags : fpu", False),
    ],
)
def test_bfloat16_in_software_gives_a_warning(
    tmp_path: Path, dtype: str, device: str, flags: str, slow: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\n{flags}\n")
    config = Config()
    config.model.dtype = dtype  # type: ignore[assignment]
    line = slow_dtype(config, torch.device(device), cpuinfo)
    assert ("model.dtype=float32" in line) == slow
    assert "\n" not in line
