"""Every command of the documentation runs, in a folder that looks like the repository.

Commands that would take hours, GPUs, a network or several machines are reduced by `REDUCED`, which
gives the reason. `tests/unit/test_docs.py` checks the rest of the documentation.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from buffer.service import Service
from configs import cli
from tests.fakes import FakeEngine, FakeLearner
from tests.pages import PAGES, ROOT, TOP_LEVEL, blocks, commands, explained_metrics

Reduction = tuple[str, Callable[[str], str], str]


def plus(option: str) -> Callable[[str], str]:
    return lambda command: f"{command} {option}"


def helped(command: str) -> str:
    """The same module or script with only --help."""
    return re.sub(r"(python (?:-m \S+|\S+\.py)).*", r"\1 --help", command)


REDUCED: list[Reduction] = [  # the first pattern that matches counts
    (r"^make ", lambda c: c.replace("make ", "make -n ", 1), "installs packages, or takes minutes"),
    (r"-m pytest", lambda c: c.removeprefix("WRITE_GOLDEN=1 ") + " --collect-only", "this suite"),
    (r"-m (buffer|actors|learner)\b", plus("--print-config"), "serves until its run ends"),
    (r"-m tools\.launch .*--help", lambda c: c, ""),
    (r"-m tools\.(launch|compare) ", plus("--print-config"), "minutes to hours; in tests/e2e"),
    (r"-m tools\.chaos", plus("--print-config"), "minutes; tests/chaos runs it"),
    (r"thousand\.yaml", plus("--print-config"), "over a minute of one core"),
    (r"-m tools\.bench", helped, "a measurement; tests/e2e/test_bench.py runs it"),
    (r"-m tools\.(bias|evaluate|export)", helped, "a checkpoint; test_bias.py, test_pipeline.py"),
    (r"-m tools\.check ", helped, "needs the demo's model; tests/e2e/test_check.py runs it"),
    (r"-m examples\.", helped, "a minute of training"),
    (r"-m tools\.doctor ", plus("--print-config"), "needs a model; test_doctor.py runs it"),
    (r"-m tools\.smollm2", helped, "half a minute of conversion"),
    (r"-m tools\.figures", helped, "tests/unit/tools/test_figures.py compares what it writes"),
    (r"tail_monitor\.py --play", plus("--once"), "without --once it needs a terminal"),
    (r"tail_monitor\.py", helped, "needs a running buffer; tests/e2e/test_tail_monitor.py"),
]  # fmt: skip


def reduced(command: str) -> str:
    for pattern, reduce, _ in REDUCED:
        if re.search(pattern, command):
            return reduce(command)
    return command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Path:
    """A folder like the repository's root, with a finished run and the README's run.yaml."""
    folder = tmp_path_factory.mktemp("docs")
    for name in (*TOP_LEVEL, "pyproject.toml", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "run.yaml").write_text(blocks(ROOT / "README.md", "yaml")[0])
    settings = [
        "run.steps=3",
        "batch.groups=3",
        "darts.group_size=4",
        "redundancy.rule=fixed",
        "sampling.max_tokens=64",
        "data.num_prompts=200",
        "eval.num_prompts=4",
        f"buffer.address=tcp://127.0.0.1:{free_port()}",
    ]
    service = Service(cli.load([f"run.dir={folder / 'runs'}", "run.name=demo", *settings]))
    address = service.run.router.address
    for peer in (FakeLearner(address, 3), FakeEngine(address, "engine", slots=16)):
        peer.start()
    assert service.serve() == 0
    return folder


ALL = sorted({command for page in PAGES for command in commands(page)})


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", reduced(command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def outcomes(
    folder: Path, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The commands of the chosen tests, one at a time on each processor: most only start up."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    chosen = [i.callspec.params["command"] for i in items if i.function is test_a_command_runs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {command: pool.submit(run, command, folder) for command in chosen}


@pytest.mark.parametrize("command", ALL)
def test_a_command_runs(
    command: str, outcomes: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    done = outcomes[command].result()
    assert done.returncode == 0, f"{reduced(command)}\n{done.stdout[-1000:]}{done.stderr[-1000:]}"


def test_no_reduction_is_unused() -> None:
    for pattern, _, _ in REDUCED:
        assert any(re.search(pattern, command) for command in ALL), pattern


def test_every_metric_of_a_run_is_explained(folder: Path) -> None:
    lines = (folder / "runs/demo/metrics.jsonl").read_text().splitlines()
    written = {name for line in lines for name in json.loads(line) if "/" in name}
    written = {re.sub(r"^eval/\w+/", "eval/", name) for name in written}  # of a kind of prompt
    assert written and written - explained_metrics() == set()
    assert composed(explained_metrics()) - written == set()


def composed(names: set[str]) -> set[str]:
    """The names that are composed at run time, so that no test finds them in the source."""
    return {name for name in names if name.partition("/")[0] in ("length", "tokens", "cancel")}
