"""`actors.pool.Pool` with shell scripts in the place of engines: restarts, giving up, and leaving nothing behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors import pool
from actors.pool import EngineFailed, Pool, check_model, engine_gpus
from actors.process import DIED, DONE, GAVE_UP, RUN_FAILED
from configs import cli
from configs.schema import Config


class ScriptedPool(Pool):
    """Engine `index` runs the shell script that the test gives; `$ERRORS` is where it says why it ends."""

    def __init__(self, config: Config, script: str) -> None:
        super().__init__(config)
        self.script = script
        self.num_started = 0

    def _command(self, index: int, errors: int) -> list[str]:
        self.num_started += 1
        return ["sh", "-c", f"ERRORS=/proc/self/fd/{errors}; {self.script}"]


@pytest.fixture
def make_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ScriptedPool]]:
    monkeypatch.setattr(pool, "POLL_S", 0.005)
    monkeypatch.setattr(pool, "STOP_S", 0.3)
    (tmp_path / "config.json").write_text("{}")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def make(script: str, engines: int = 1, max_restarts: int = 2) -> ScriptedPool:
        config = Config()
        config.model.path, config.actors.num_engines, config.actors.max_restarts = (
            str(tmp_path),
            engines,
            max_restarts,
        )
        return ScriptedPool(config, script)

    yield make
    for number, handler in handlers.items():
        signal.signal(number, handler)


def dies(pid: int) -> bool:
    """Whether a process is gone, or about to be: a kill takes a moment to arrive."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.005)
    return False


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


def test_an_engine_that_keeps_dying_is_given_up(make_pool: Callable[..., ScriptedPool]) -> None:
    scripted = make_pool(f"echo out of memory > $ERRORS; exit {DIED}", max_restarts=2)
    with pytest.raises(
        EngineFailed,
        match=r"engine pool/0 died 3 times \(actors.max_restarts=2\); last: out of memory",
    ):
        scripted.run()
    assert scripted.num_started == 3


@pytest.mark.parametrize("status", [GAVE_UP, RUN_FAILED])
def test_what_another_attempt_cannot_mend_is_not_tried_again(
    make_pool: Callable[..., ScriptedPool], status: int
) -> None:
    scripted = make_pool(f"echo no such model > $ERRORS; exit {status}")
    with pytest.raises(EngineFailed, match="no such model"):
        scripted.run()
    assert scripted.num_started == 1


def test_the_processes_of_a_dead_engine_die_with_it(
    make_pool: Callable[..., ScriptedPool], tmp_path: Path
) -> None:
    with pytest.raises(EngineFailed):
        make_pool(f"sleep 60 & echo $! > {tmp_path}/child; exit {GAVE_UP}").run()
    assert dies(int((tmp_path / "child").read_text()))


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_signal_stops_all_engines(
    make_pool: Callable[..., ScriptedPool], tmp_path: Path, stubborn: bool
) -> None:
    scripted = make_pool(
        f"{'trap : TERM;' if stubborn else ''} echo $$ > {tmp_path}/leader; while true; do sleep 0.05; done"
    )

    def stop() -> None:
        while not ((tmp_path / "leader").exists() and (tmp_path / "leader").read_text().strip()):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert scripted.run() == 128 + signal.SIGTERM
    stopper.join()
    assert dies(int((tmp_path / "leader").read_text()))


def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model.path={tmp_path}: .*config.json"):
        check_model(str(tmp_path))


@pytest.mark.parametrize("path", ["models/tiny-reasoner", "/nowhere/at/all", "tiny", "./a/b"])
def test_a_folder_that_is_not_there_is_refused_by_name(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"model.path={path}: no such folder"):
        check_model(path)


def test_a_hub_name_is_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_model("Qwen/Qwen3-0.6B")


def test_each_engine_gets_gpus_of_its_own() -> None:
    config = cli.load(["actors.device=cuda", "actors.num_engines=2", "actors.tensor_parallel=2"])
    assert [engine_gpus(config, i, "")["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["0,1", "2,3"]
    assert [engine_gpus(config, i, "4,5,6,7")["CUDA_VISIBLE_DEVICES"] for i in range(2)] == [
        "4,5",
        "6,7",
    ]
    with pytest.raises(ValueError, match="names 3"):
        engine_gpus(config, 0, "0,1,2")


def test_cpu_engines_are_given_no_gpus() -> None:
    assert engine_gpus(cli.load(["actors.device=cpu"]), 0, "0") == {}
