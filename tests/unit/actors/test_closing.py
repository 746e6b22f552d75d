"""Environments are closed once, in whatever phase and manner their rollouts end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.environments import Environment, EnvironmentFailure, make_environment
from actors.verifier_load import Step
from buffer.processes.child import Child, python_path
from buffer.wire.messages import Cancel, Failed, Finished, Stopped
from tests.unit.actors.test_environments import config_of, payload
from tests.unit.actors.test_turns import prepare, respond
from tests.unit.actors.test_verifier_workers import wait_for
from tests.unit.actors.test_worker import EOS, Scene, play, quick_config

CLASSES = """
import asyncio, os, signal, threading, time
from pathlib import Path

def say(word):
    with open(os.environ["OPENED"], "a") as file:
        file.write(word + "\\n")

class Rented:
    # holds something outside of itself from reset on, which only close gives back
    def reset(self, row):
        self.name = row["answer"]
        say("open " + self.name)
        if "reset hangs" in self.name:
            time.sleep(600)
        if "reset raises" in self.name:
            raise KeyError("no room")

    async def step(self, response):
        say("step " + self.name)
        if response == "hang":
            time.sleep(600)
        if response == "ignore all signals":
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
            time.sleep(600)
        if response == "await":
            await asyncio.sleep(600)
        if response == "raise":
            raise KeyError("no such move")
        if response == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if response == "keep a lock":
            self.lock = threading.Lock()
        if response == "nan":
            return "more", float("nan")
        return 1.0 if response == "end" else "more"

    async def close(self):
        await asyncio.sleep(0)
        say("close " + self.name)
        if "close raises" in self.name:
            raise OSError("the door is stuck")

class Finishing(Rented):
    def finish(self):
        if "finish raises" in self.name:
            raise KeyError("no end")
        return 0.25
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_rented.py").write_text(CLASSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("OPENED", str(folder / "opened"))
        yield folder


@pytest.fixture(scope="module")
def rented(folder: Path) -> Iterator[Environment]:
    environment = make_environment(config_of("my_rented:Rented", verifier_timeout_s=1.5))
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def finishing(folder: Path) -> Iterator[Environment]:
    environment = make_environment(config_of("my_rented:Finishing"))
    yield environment
    environment.close()


def step(environment: Environment, name: str, response: str, state: str = "") -> Step:
    return asyncio.run(environment.step(payload(answer=name), response, state))


def said(folder: Path, word: str, name: str) -> int:
    opened = folder / "opened"
    return opened.read_text().splitlines().count(f"{word} {name}") if opened.exists() else 0


def is_closed_once(folder: Path, name: str) -> bool:
    closed = wait_for(lambda: said(folder, "close", name) > 0)
    return closed and said(folder, "open", name) == said(folder, "close", name) == 1


def test_a_rollout_that_ends_by_itself(rented: Environment, folder: Path) -> None:
    first = step(rented, "plain", "a")
    assert first.observation == "more" and said(folder, "close", "plain") == 0
    assert step(rented, "plain", "end", first.state) == Step(1.0)
    assert said(folder, "close", "plain") == said(folder, "open", "plain") == 1
    assert step(rented, "short", "end") == Step(1.0) and said(folder, "close", "short") == 1


def test_a_rollout_that_a_limit_ends(
    rented: Environment, finishing: Environment, folder: Path
) -> None:
    first = step(rented, "limited", "a")
    assert asyncio.run(rented.finish(payload(answer="limited"), first.state)) == 0.0
    assert is_closed_once(folder, "limited")
    first = step(finishing, "finished", "a")
    assert asyncio.run(finishing.finish(payload(answer="finished"), first.state)) == 0.25
    assert is_closed_once(folder, "finished")
    first = step(finishing, "finish raises", "a")
    with pytest.raises(EnvironmentFailure, match="no end"):
        asyncio.run(finishing.finish(payload(answer="finish raises"), first.state))
    assert is_closed_once(folder, "finish raises")


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize(
    ("response", "cause"),
    [
        ("raise", "no such move"),
        ("hang", "took longer"),
        ("await", "took longer"),
        ("keep a lock", "pickle"),
        ("nan", "returned nan"),
        ("die", "SIGKILL"),
    ],
)
def test_a_step_that_fails(
    rented: Environment, folder: Path, response: str, cause: str, turn: int
) -> None:
    name = f"{response} in turn {turn}"
    state = step(rented, name, "a").state if turn else ""
    with pytest.raises(EnvironmentFailure, match=cause):
        step(rented, name, response, state)
    if response == "die" and not turn:  # nothing of it is left that could be closed
        assert said(folder, "close", name) == 0
    else:
        assert is_closed_once(folder, name)


@pytest.mark.slow
def test_a_step_that_cannot_be_interrupted_is_closed_with_the_state_before_it(
    rented: Environment, folder: Path
) -> None:
    state = step(rented, "stubborn", "a").state
    with pytest.raises(EnvironmentFailure, match="took longer"):
        step(rented, "stubborn", "ignore all signals", state)
    assert is_closed_once(folder, "stubborn")


@pytest.mark.parametrize("name", ["reset hangs", "reset raises"])
def test_a_reset_that_fails(rented: Environment, folder: Path, name: str) -> None:
    with pytest.raises(EnvironmentFailure):
        step(rented, name, "a")
    assert is_closed_once(folder, name)


@pytest.mark.parametrize(
    ("name", "response"), [("cancelled: reset hangs", "a"), ("cancelled: step", "hang")]
)
def test_a_cancel_during_reset_or_step(
    rented: Environment, folder: Path, name: str, response: str
) -> None:
    async def script() -> None:
        playing = asyncio.ensure_future(rented.step(payload(answer=name), response))
        await asyncio.to_thread(wait_for, lambda: said(folder, "open", name) == 1)
        playing.cancel()

    asyncio.run(script())
    assert is_closed_once(folder, name)


def test_a_cancel_of_a_step_that_then_ends_in_time(rented: Environment, folder: Path) -> None:
    """Before or after it has begun; its new state reaches no one else."""

    async def script() -> None:
        steps = [rented.step(payload(answer=f"in time {i}"), "a") for i in range(20)]
        playing = [asyncio.ensure_future(each) for each in steps]
        await asyncio.to_thread(wait_for, lambda: said(folder, "step", "in time 0") == 1)
        for each in playing:
            each.cancel()
        results = await asyncio.gather(*playing, return_exceptions=True)
        for result in results:
            if isinstance(result, Step):
                rented.abandon(result.state)

    asyncio.run(script())
    for name in (f"in time {i}" for i in range(20)):
        assert wait_for(lambda of=name: said(folder, "open", of) == said(folder, "close", of))
    assert is_closed_once(folder, "in time 0")


def test_a_rollout_that_is_given_up_between_two_steps(rented: Environment, folder: Path) -> None:
    rented.abandon(step(rented, "given up", "a").state)
    assert is_closed_once(folder, "given up")


def test_a_close_that_raises(
    rented: Environment, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It fails the rollout if that has not ended yet, and is a line if it has."""
    with pytest.raises(EnvironmentFailure, match="the door is stuck"):
        step(rented, "close raises", "end")
    assert is_closed_once(folder, "close raises")
    with pytest.raises(EnvironmentFailure, match=r"no such move.*close\(\).*the door is stuck"):
        step(rented, "close raises too", "raise")
    rented.abandon(step(rented, "close raises later", "a").state)
    assert is_closed_once(folder, "close raises later")
    assert wait_for(lambda: "the door is stuck" in capfd.readouterr().err)


# The engine ends ---------------------------------------------------------------------------------


def test_an_engine_that_ends_closes_all(folder: Path) -> None:
    environment = make_environment(config_of("my_rented:Rented"))

    async def script() -> None:
        states = await asyncio.gather(
            *(environment.step(payload(answer=f"waiting {i}"), "a") for i in range(3))
        )
        assert all(state.observation == "more" for state in states)
        playing = asyncio.ensure_future(environment.step(payload(answer="in its step"), "hang"))
        await asyncio.to_thread(wait_for, lambda: said(folder, "step", "in its step") == 1)
        await asyncio.to_thread(environment.close)
        with pytest.raises(EnvironmentFailure):
            await playing

    asyncio.run(script())
    for name in (*(f"waiting {i}" for i in range(3)), "in its step"):
        assert said(folder, "close", name) == said(folder, "open", name) == 1


ENGINE = """
import asyncio
from actors.environments import make_environment
from tests.unit.actors.test_environments import config_of, payload

async def script():
    environment = make_environment(config_of("my_rented:Rented", verifier_timeout_s=600.0))
    await environment.step(payload(answer="held"), "a")
    await environment.step(payload(answer="running"), "hang")

asyncio.run(script())
"""


@pytest.mark.parametrize("supervised", [True, False])
def test_an_engine_that_is_killed_closes_all(
    supervised: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its verifiers' processes close them, and their supervisor lets them."""
    monkeypatch.setenv("OPENED", str(tmp_path / "opened"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-c", ENGINE]
    paths = {"PYTHONPATH": f"{folder}{os.pathsep}{python_path()['PYTHONPATH']}"}
    if supervised:
        child = Child("engine", command, paths)
        assert wait_for(lambda: said(tmp_path, "step", "running") == 1, 60)
        child.kill()
        assert said(tmp_path, "close", "held") == said(tmp_path, "close", "running") == 1
        return
    process = subprocess.Popen(command, env={**os.environ, **paths})
    assert wait_for(lambda: said(tmp_path, "step", "running") == 1, 60)
    process.kill()
    process.wait()
    assert is_closed_once(tmp_path, "held") and is_closed_once(tmp_path, "running")


# The worker of an engine -------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["cancelled", "failed", "engine stops", "limit", "by itself"])
def test_a_rollout_in_its_second_response_gives_its_environment_up(ending: str) -> None:
    """Unless the environment itself has ended it. While it decodes, nothing else would close it."""
    config = quick_config()
    config.data.max_turns = 2 if ending == "limit" else 8

    async def script(scene: Scene) -> None:
        prepare(scene, [20], *([[21]] if ending == "limit" else []))
        await respond(scene, 0, 3, EOS)
        await respond(scene, 1, 4, end=None)
        generation = scene.engine.generations["1.1"]
        if ending == "cancelled":
            scene.link.incoming.put(Cancel(rollout_ids=[1]))
        elif ending == "failed":
            generation.end(RuntimeError("not accepted"))
        elif ending == "engine stops":
            generation.end("odd")
        else:
            generation.end("stop")
        await scene.answered(1)

    scene = play(script, config=config)
    (answer,) = scene.answers()
    kind = {"cancelled": Stopped, "failed": Failed, "engine stops": Failed}.get(ending, Finished)
    assert isinstance(answer, kind)
    given_up = kind is not Finished
    assert scene.environment.abandoned == (["x"] if given_up else [])
    assert scene.environment.finished == (["xx"] if ending == "limit" else [])
