"""Environments of the package `verifiers` are played unmodified, or refused with the reason."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import pytest
import verifiers as vf
from datasets import Dataset
from verifiers.envs.experimental.gym_env import GymEnv

from actors.open_environments import OpenEnvironments
from actors.public.state import Unsupported
from actors.public.turns import environment_called, turns_of_environment
from actors.turns import Turns
from buffer.data.public_rows import load, rows_of
from buffer.processes.descendants import OPEN

pytestmark = pytest.mark.slow

ROWS = [{"question": f"{i}+1", "answer": str(i + 1)} for i in range(3)]


def right(completion: Any, answer: str) -> float:
    return float(answer in completion[-1].content)


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def tools(**more: Any) -> vf.Environment:
    return vf.ToolEnv(tools=[add], **common(), **more)


def common(function: Callable[..., Any] = right, weight: float = 1.0) -> dict[str, Any]:
    rubric = vf.Rubric(funcs=[right, function], weights=[1.0, weight])
    return {
        "dataset": Dataset.from_list(ROWS),
        "rubric": vf.Rubric(funcs=[right]) if function is right else rubric,
    }


class Counting(vf.MultiTurnEnv):
    """Counts its turns; subclasses do something odd in the second one."""

    async def setup_state(self, state: vf.State) -> vf.State:
        state["count"] = 0
        return state

    async def env_response(self, messages: Any, state: vf.State, **_: Any) -> Any:
        state["count"] += 1
        self.odd(messages, state)
        return [vf.UserMessage(content=f"turn {state['count']}")]

    def odd(self, messages: Any, state: vf.State) -> None: ...


class Played:
    """The turns, with a key for each rollout, as the pool of the processes gives them."""

    def __init__(self, turns: Turns, folder: Path) -> None:
        self._turns, self.has_finish, self.close = turns, turns.has_finish, turns.close
        self._turns.opened = OpenEnvironments(folder)
        self._turns.opened.create()
        self._keys = map(str, count())

    def step(self, row: dict[str, Any], state: str, response: str) -> tuple[Any, Any, str]:
        return self._turns.step(row, state, response, state or next(self._keys))

    def finish(self, state: str) -> Any:
        return self._turns.finish(state)

    def open(self) -> int:
        """How many states are kept."""
        return len(self._turns.opened.waiting())


@pytest.fixture
def install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Makes an environment importable as `my_env`, as its own package would be."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def installed(make: Callable[[], Any]) -> Any:
        module = ModuleType("my_env")
        module.load_environment = make  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "my_env", module)
        turns = turns_of_environment("my-env")
        return Played(turns, tmp_path) if isinstance(turns, Turns) else turns

    environment_called.cache_clear()
    yield installed
    environment_called.cache_clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def play(turns: Any, *responses: str, state: str = "", row: int = 0) -> list[tuple[Any, Any]]:
    """(reward, observation) of each step."""
    environment = environment_called("my-env").environment
    given = {"metadata": json.loads(json.dumps({"row": environment.get_dataset()[row]}))}
    played = []
    for response in responses:
        reward, observation, state = turns.step(given, state, response)
        played.append((reward, observation))
    return played


def call(**arguments: int) -> str:
    written = json.dumps({"name": "add", "arguments": arguments})
    return f"Let me see. <tool_call>\n{written}\n</tool_call>"


def test_a_tool_is_called_and_its_result_observed(install: Any) -> None:
    turns = install(tools)
    assert play(turns, call(a=0, b=1), "so 1") == [
        (0.0, "<tool_response>\n1\n</tool_response>"),
        (1.0, None),
    ]
    assert play(turns, "it is 7") == [(0.0, None)]
    ((_, observation),) = play(turns, call(a=0, c=1))
    assert "unexpected keyword argument 'c'" in observation
    assert play(turns, call(a=0, b=1).replace("}", ""), row=2) == [(0.0, None)]  # is text


def test_the_tools_are_described_in_the_prompt_and_nowhere_else(install: Any) -> None:
    install(lambda: tools(system_prompt="Be brief."))
    row = next(rows_of(load("my-env"), "train"))
    system, question = row["prompt"]
    assert system["content"].startswith("Be brief.\n\n") and '"name": "add"' in system["content"]
    assert question == {"role": "user", "content": "0+1"}
    assert row["row"]["prompt"][0]["content"] == "Be brief." and row["answer"] == "1"


def test_rollouts_keep_their_state_and_end_by_the_limit_of_the_environment(install: Any) -> None:
    turns = install(lambda: Counting(max_turns=3, **common()))
    given = {"metadata": {"row": environment_called("my-env").environment.get_dataset()[1]}}
    _, seen, state = turns.step(given, "", "a")
    assert (seen, play(turns, "x", "y")[-1]) == ("turn 1", (0.0, "turn 2"))  # another in between
    _, seen, state = turns.step(given, state, "b")
    assert seen == "turn 2"
    assert turns.step(given, state, "2") == (1.0, None, "")


def test_a_limit_of_the_run_asks_the_rubric(install: Any) -> None:
    turns = install(lambda: Counting(**common()))
    given = {"metadata": {"row": environment_called("my-env").environment.get_dataset()[1]}}
    assert turns.has_finish
    _, _, state = turns.step(given, "", "2")
    assert turns.finish(state) == 1.0
    _, _, state = turns.step(given, "", "2")
    assert turns.finish(turns.step(given, state, "3")[2]) == 0.0


def test_an_environment_of_one_turn_is_a_verifier(install: Any) -> None:
    verify = install(lambda: vf.SingleTurnEnv(**common()))
    assert not isinstance(verify, Played)
    row = {"row": environment_called("my-env").environment.get_dataset()[2]}
    assert (verify("2+1", "it is 3", "3", row), verify("2+1", "", "3", row)) == (1.0, 0.0)
    assert verify("9+1", "10", "10", {}) == 1.0  # a row of a file


def test_a_gym_keeps_its_object_and_its_rewards(install: Any) -> None:
    turns = install(lambda: GymEnv(Halves, num_train_episodes=2, num_eval_episodes=0))
    assert play(turns, "up", "up", "any") == [
        (0.0, "1"),
        (0.0, "2\nEpisode already ended."),
        (1.0, None),
    ]


class Halves:
    """Two steps, each worth a half."""

    def reset(self, seed: int) -> str:
        self.at = 0
        return f"start {seed}"

    def step(self, _action: str) -> tuple[str, float, bool, dict[str, Any]]:
        self.at += 1
        return str(self.at), 0.5, self.at == 2, {}


class Shared(Counting):
    """Its states refer to itself and to a large table of its own."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.table = {number: str(number) for number in range(100_000)}

    async def setup_state(self, state: vf.State) -> vf.State:
        state.update(count=0, table=self.table, environment=self)
        return state

    def odd(self, messages: Any, state: vf.State) -> None:
        assert state["environment"] is self and state["table"] is self.table


def test_a_state_refers_to_what_its_environment_owns(install: Any, tmp_path: Path) -> None:
    turns = install(lambda: Shared(max_turns=3, **common()))
    given = {"metadata": {"row": environment_called("my-env").environment.get_dataset()[1]}}
    _, _, state = turns.step(given, "", "a")
    (kept,) = (tmp_path / OPEN).iterdir()
    assert kept.name == state and kept.stat().st_size < 20_000
    _, seen, _ = turns.step(given, state, "b")
    assert seen == "turn 2"


CALLED: list[str] = []  # hooks for the end of a rollout


class Renting(Counting):
    async def setup_state(self, state: vf.State) -> vf.State:
        if state["answer"] == "2":
            raise ValueError("no room")
        return await super().setup_state(state)

    def odd(self, messages: Any, state: vf.State) -> None:
        if messages[-1].content == "break":
            raise ValueError("the board is broken")

    @vf.cleanup
    async def give_back(self, state: vf.State) -> None:
        CALLED.append("environment")
        if state["completion"] and state["completion"][-1].content == "stuck":
            raise OSError("the door is stuck")


class Closing(vf.Rubric):
    @vf.cleanup
    async def close(self, state: vf.State) -> None:
        CALLED.append("rubric")


def renting(kind: type[vf.Environment] = Renting, **more: Any) -> Callable[[], vf.Environment]:
    return lambda: kind(**common() | {"rubric": Closing(funcs=[right])}, **more)


@pytest.mark.parametrize(
    "ending",
    ["by itself", "limit of the run", "given up", "step fails", "setup fails", "a hook fails"],
)
def test_the_hooks_for_the_end_are_called_once_however_a_rollout_ends(
    ending: str, install: Any
) -> None:
    CALLED.clear()
    turns = install(renting(max_turns=2))
    row = 1 if ending == "setup fails" else 0
    given = {"metadata": {"row": environment_called("my-env").environment.get_dataset()[row]}}
    if ending == "setup fails":
        with pytest.raises(ValueError, match="no room"):
            turns.step(given, "", "a")
    elif ending == "step fails":
        with pytest.raises(ValueError, match="the board is broken"):
            turns.step(given, "", "break")
    else:
        _, _, state = turns.step(given, "", "a")
        assert CALLED == [] and turns.open() == 1
        if ending == "by itself":
            assert turns.step(given, state, "1")[0] == 1.0
        elif ending == "limit of the run":
            assert turns.finish(state) == 0.0
        elif ending == "a hook fails":
            with pytest.raises(OSError, match="the door is stuck"):
                turns.step(given, state, "stuck")
        else:
            turns.close(state)
    assert CALLED == ["environment", "rubric"] and turns.open() == 0


class RentingOnce(vf.SingleTurnEnv):
    give_back = Renting.give_back


@pytest.mark.parametrize("response", ["1", "stuck"])
def test_the_hooks_of_an_environment_of_one_turn_are_called_once(
    response: str, install: Any
) -> None:
    CALLED.clear()
    verify = install(renting(RentingOnce))
    row = {"row": environment_called("my-env").environment.get_dataset()[0]}
    if response == "stuck":
        with pytest.raises(OSError, match="the door is stuck"):
            verify("0+1", response, "1", row)
    else:
        assert verify("0+1", response, "1", row) == 1.0
    assert CALLED == ["environment", "rubric"]


# Refused, or failures -----------------------------------------------------------------------------


class Rewriting(Counting):
    async def get_prompt_messages(self, state: vf.State) -> Any:
        messages = await super().get_prompt_messages(state)
        return messages[:1] + messages[2:]  # without the response


class Curious(Counting):
    def odd(self, messages: Any, state: vf.State) -> None:
        raise ValueError("the board is broken")


class Asking(Counting):
    async def env_response(self, messages: Any, state: vf.State, **_: Any) -> Any:
        await self.get_model_response(state, messages)
        return []


class Picturing(Counting):
    async def env_response(self, messages: Any, state: vf.State, **_: Any) -> Any:
        part = {"type": "image_url", "image_url": {"url": "data:"}}
        return [vf.UserMessage(content=[part])]  # type: ignore[list-item]


class Starting(Counting):
    async def setup_state(self, state: vf.State) -> vf.State:
        state["prompt"] = [vf.UserMessage(content="another prompt")]
        return state


class Locking(Counting):
    def odd(self, messages: Any, state: vf.State) -> None:
        state["lock"] = Lock()


class Sampling(Counting):
    async def get_model_response(self, state: vf.State, prompt: Any, **_: Any) -> Any:
        return await super().get_model_response(state, prompt, sampling_args={"logprobs": True})


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (Rewriting, "earlier messages differently"),
        (Asking, "more than the next message"),
        (Picturing, "image_url"),
        (Starting, "differs from the prompt of its dataset"),
        (Locking, "cannot be kept between turns"),
        (Sampling, "logprobs=True"),
    ],
)
def test_a_rollout_that_cannot_be_played_is_a_failure(
    kind: type[Counting], cause: str, install: Any
) -> None:
    turns = install(lambda: kind(**common()))
    with pytest.raises(Unsupported, match=cause):
        play(turns, "a", "b")


def test_an_error_of_the_environment_is_a_failure(install: Any) -> None:
    turns = install(lambda: Curious(**common()))
    with pytest.raises(ValueError, match="the board is broken"):
        play(turns, "a")


def broken(completion: Any) -> float:
    raise KeyError("no such column")


async def unfinished(completion: Any) -> Any:
    return None


@pytest.mark.parametrize(("function", "error"), [(broken, KeyError), (unfinished, TypeError)])
def test_an_error_of_a_reward_is_a_failure_unless_it_counts_for_nothing(
    function: Callable[..., Any], error: type[Exception], install: Any
) -> None:
    """The package takes it for a zero."""
    row = {"row": {"prompt": [{"role": "user", "content": "2+1"}], "answer": "3"}}
    verify = install(lambda: vf.SingleTurnEnv(**common(function)))
    with pytest.raises(error):
        verify("2+1", "3", "3", row)
    environment_called.cache_clear()
    verify = install(lambda: vf.SingleTurnEnv(**common(function, weight=0.0)))
    assert verify("2+1", "3", "3", row) == 1.0


def test_a_call_that_the_environment_stops_for_ends_with_its_rubric(install: Any) -> None:
    turns = install(lambda: tools(stop_errors=[TypeError]))
    assert play(turns, call(c=1), row=1) == [(0.0, None)]


def all_alike(completions: Any) -> list[float]:
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: vf.SingleTurnEnv(**common(), sampling_args={"n": 4}), "n=4 responses"),
        (lambda: vf.SingleTurnEnv(**common(), sampling_args={"top_logprobs": 5}), "top_logprobs=5"),
        (lambda: vf.SingleTurnEnv(**common(all_alike)), "rollouts of a group"),
        (lambda: vf.SingleTurnEnv(**common(), score_rollouts=False), "no rewards"),
        (lambda: vf.EnvGroup(envs=[tools()], env_names=["t"]), "name one of its members"),
        (lambda: type("SandboxMixin", (Counting,), {})(**common()), "SandboxMixin"),
        (lambda: 1 / 0, "division by zero"),
    ],
)
def test_an_environment_that_cannot_be_played_is_refused_at_the_start(
    make: Callable[[], Any], cause: str, install: Any
) -> None:
    with pytest.raises(ValueError, match=f"environment 'my-env' .*{cause}"):
        install(make)
