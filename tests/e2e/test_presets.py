"""Every preset of a run trains two steps on this CPU with its own settings, except for sizes and
machines.

tests/e2e/test_pipeline.py runs `configs/demo.yaml` to its end.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from buffer.data.tagged_sum import draw_problem

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("tiny_reasoner"),
]

ROOT = Path(__file__).parents[2]
SMALL = ["run.steps=2", "eval.every=0", "launch.progress=none", "batch.groups=2"]


def smollm2(folder: Path) -> list[str]:
    """The model as the README makes it."""
    model = folder / "smollm2"
    subprocess.run([sys.executable, "-m", "tools.smollm2", str(model)], check=True, cwd=ROOT)
    return [f"model.path={model}", "sampling.max_tokens=24", "actors.kv_cache_gib=0.25"]


def qwen(folder: Path) -> list[str]:
    """The tiny reasoner in place of Qwen, on problems that math_verify can score."""
    random, data = Random(0), folder / "math_train.jsonl"
    problems = [draw_problem(random) for _ in range(64)]
    rows = [{"prompt": p, "solution": str(sum(map(int, p[1::2][: len(p) // 2])))} for p in problems]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    machine = [
        "actors.device=cpu",
        "learner.device=cpu",
        "actors.num_engines=1",
        "learner.num_ranks=1",
    ]
    sizes = ["model.max_context=512", "sampling.max_tokens=200", "actors.slots=32"]
    return [
        *machine,
        *sizes,
        "model.path=models/tiny-reasoner",
        "model.dtype=float32",
        "batch.max_tokens=2048",
        f"data.train={data}",
    ]


def darts_paper(folder: Path) -> list[str]:
    """Two updates, and a zone before the lower limit in which rewards fall."""
    small = ["batch.groups=4", "batch.updates=2", "loss.overlong_buffer=100"]
    return [*qwen(folder), *small, "actors.tensor_parallel=1"]


def gfpo(folder: Path) -> list[str]:
    """More groups, since in two of them all rewards may be equal."""
    return ["sampling.max_tokens=200", "batch.groups=8"]


OWN_COLUMNS = ("data.prompt_field=prompt", "data.answer_field=solution")
REDUCED: dict[str, Callable[[Path], list[str]] | None] = {
    "darts_paper": darts_paper,
    "demo": None,
    "gfpo": gfpo,
    "qwen2.5_1.5b_2x24gb": lambda folder: [*qwen(folder), *OWN_COLUMNS],
    "qwen2.5_7b_gpu": qwen,
    "qwen3_4b_lora_24gb": qwen,
    "smollm2_cpu": smollm2,
}


def test_every_preset_is_run() -> None:
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == REDUCED.keys()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # gigabytes of SmolLM2's weights and optimizer moments


@pytest.mark.parametrize(
    "preset",
    [
        # A real model, beside which another run may not fit into 8 GiB.
        pytest.param(name, marks=[pytest.mark.alone] if name == "smollm2_cpu" else [])
        for name, reduce in REDUCED.items()
        if reduce
    ],
)
def test_a_preset_trains_two_steps(preset: str, folder: Path, free_port: Callable[[], int]) -> None:
    reduce = REDUCED[preset]
    assert reduce is not None
    where = [f"run.dir={folder}", "run.name=r", f"buffer.address=tcp://127.0.0.1:{free_port()}"]
    command = [sys.executable, "-m", "tools.launch", "--config", f"configs/{preset}.yaml"]
    done = subprocess.run(
        [*command, *SMALL, *where, *reduce(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "r" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[-1]["tokens/trained"] > 0
    assert max(row["train/grad_norm"] for row in rows) > 0
    assert max(row["probe/logprob_diff"] for row in rows) < 1e-4
