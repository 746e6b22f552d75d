"""`tools.check` on a tiny random model of each family: right within rounding, or refused by name.

A family is right if packed equals alone, engine equals learner, and, after a swap to other weights,
engine, learner and a plain forward pass of transformers agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

BOUND = 1e-4  # in nats, for every token, in float32
NUM_CHECKS = 6
RIGHT = [
    "llama",
    "llama:tied",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mistral",
    "olmo2",
    "smollm3",
    "gpt_neox",
    "gpt_neox:tied",
    "qwen3_moe",
    "qwen3:adapters",
    "phi3:adapters",
    "gpt_neox:adapters",
]
# vLLM needs torchvision for the first, and on a CPU it computes wrong results for the second.
RIGHT_OR_REFUSED = ["qwen3_5_text", "lfm2"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.e2e.family_engines"]
    process = subprocess.Popen(
        [*command, str(tmp_path_factory.mktemp("families")), *RIGHT, *RIGHT_OR_REFUSED],
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    finally:
        # Any engines that are left are in its process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {row["family"]: row for row in rows}


@pytest.mark.parametrize("family", RIGHT)
def test_a_family_is_computed_right_before_and_after_a_swap(
    outcomes: dict[str, dict[str, Any]],
    family: str,
    record_property: Callable[[str, object], None],
) -> None:
    outcome = outcomes[family]
    record_property("seconds", round(outcome["seconds"], 1))
    record_property("differences", outcome["differences"])
    assert outcome["refused"] == ""
    # Transformers' own loader reads no adapters, so there is one check fewer.
    assert len(outcome["differences"]) == NUM_CHECKS - family.endswith(":adapters")
    assert max(outcome["differences"].values()) < BOUND


@pytest.mark.parametrize("family", RIGHT_OR_REFUSED)
def test_a_family_is_right_or_refused_by_name_in_one_line(
    outcomes: dict[str, dict[str, Any]], family: str
) -> None:
    outcome = outcomes[family]
    if outcome["refused"]:
        assert outcome["refused"].startswith(f"{family} models ")
        assert "\n" not in outcome["refused"] and len(outcome["refused"]) < 700
    else:
        assert len(outcome["differences"]) == NUM_CHECKS
        assert max(outcome["differences"].values()) < BOUND
