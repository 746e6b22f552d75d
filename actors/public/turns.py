"""Plays unmodified environments of the package `verifiers` as environments with turns.

Such an environment drives its own loop and asks a client for each response. Here the loop pauses
at each request: the state is pickled, the engine samples, and the next step hands the response to
the same request. So the tokens of earlier turns stay as they were sampled, and an environment that
writes earlier messages differently is refused. Imported only if the package is there, in the
worker processes of `actors.verifier_workers` alone.
"""

# From 0.3.1 on, the package makes its modules at import, where no type checker finds them.
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple

from verifiers.clients import OpenAIChatCompletionsClient
from verifiers.envs.singleturn_env import SingleTurnEnv
from verifiers.errors import ToolError
from verifiers.types import Response, ResponseMessage
from verifiers.types import ToolCall as RequestedCall
from verifiers.utils.message_utils import normalize_messages

from actors.public.state import Owned, Unsupported, pickled, unpickled
from actors.turns import Turns
from buffer.data.public_rows import load, sampling_refusal
from buffer.data.tool_calls import calls_in, result


class Message(NamedTuple):
    """What counts when messages are compared."""

    role: str
    text: str
    calls: tuple[tuple[str, str], ...] = ()


@functools.cache
def loop() -> asyncio.Runner:
    """One event loop for the life of the process, since environments keep clients open."""
    return asyncio.Runner()


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """If a signal interrupts it, its tasks end before anything else runs on the loop."""
    try:
        return loop().run(coroutine)
    except BaseException as error:
        if not isinstance(error, Exception):
            tasks = asyncio.all_tasks(loop().get_loop())
            for task in tasks:
                task.cancel()
            loop().run(_settled(tasks))
        raise


async def _settled(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


class Loaded(NamedTuple):
    """errors: receives every error of the environment's reward functions."""

    environment: Any
    errors: list[Exception]
    owned: Owned


@functools.cache
def environment_called(name: str) -> Loaded:
    """Raises ValueError if it cannot be played here."""
    environment, errors = load(name), list[Exception]()
    for rubric in _rubrics(environment.rubric):
        rubric.funcs = [
            _recorded(function, errors) if weight else function
            for function, weight in zip(rubric.funcs, rubric.weights, strict=True)
        ]
    return Loaded(environment, errors, Owned(environment))


def turns_of_environment(name: str) -> Turns | Callable[[str, str, str, dict[str, Any]], float]:
    """A verifier if it has only one turn. Raises ValueError if it cannot be played here."""
    if not isinstance(environment_called(name).environment, SingleTurnEnv):
        return Turns(PublicRollout, name)

    def verify(prompt: str, response: str, answer: str, metadata: dict[str, Any]) -> float:
        rollout = PublicRollout(name)
        try:
            rollout.reset({"prompt": prompt, "answer": answer, "metadata": metadata})
            return rollout.step(response)
        finally:
            rollout.close()

    verify.has_close = True  # pyright: ignore[reportFunctionMemberAccess]
    return verify


class PublicRollout:
    """A rollout of the environment `name`. Between steps it waits at a request to the model.

    asked: the messages of that request.
    """

    def __init__(self, name: str, state: Any = None, asked: list[Any] | None = None) -> None:
        self._name, self._state, self._asked = name, state, asked or []
        self._cleaned: list[Any] = []  # environment and rubric, once their hooks were called
        self._environment, self._errors, self._owned = environment_called(name)

    def __reduce__(self) -> Any:
        data = pickled((self._state, self._asked), self._owned)
        return _restored, (self._name, data)

    def reset(self, row: dict[str, Any]) -> None:
        run(self._reset(row))

    def step(self, response: str) -> Any:
        """The messages before the next response as a text, or the reward at the end."""
        return run(self._step(response))

    def finish(self) -> Any:
        """The rubric's reward for the rollout as far as it got."""
        self._state["is_completed"] = self._state["is_truncated"] = True
        return run(self._score())

    def close(self) -> None:
        """Call the environment's hooks for the end of a rollout, unless they have been called."""
        if self._state is not None:
            run(self._clean_up())

    async def _reset(self, row: dict[str, Any]) -> None:
        given = row["metadata"].get("row") or {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "answer": row["answer"],
            "info": row["metadata"],
            "example_id": 0,
        }
        state = await self._environment.init_state(given, EngineClient(), "policy", {})
        shown = _comparable(state["prompt"])
        state["timing"].generation.start = time.time()
        self._state = state  # so that it is cleaned up even if its setup fails
        self._state = await self._environment.setup_state(state) or state
        asked = await self._next_request()
        if asked is None or _comparable(asked) != shown:
            raise Unsupported(
                "its first request differs from the prompt of its dataset, whose tokens the model "
                "has been given"
            )
        self._asked = asked

    async def _step(self, response: str) -> Any:
        message = _as_message(response, bool(self._state["tool_defs"]))
        client: EngineClient = self._state["client"]
        client.expect(self._asked, message)
        answer = await self._environment.get_model_response(self._state, self._asked)
        client.check_asked()
        await self._environment.add_model_response(self._state, self._asked, answer)
        past = [*_comparable(self._asked), *_comparable([message])]
        if self._is_late():
            self._environment.mark_timed_out(self._state)
        asked = await self._next_request()
        if asked is None:
            return await self._score()
        self._asked = asked
        return _observation(past, _comparable(asked))

    async def _next_request(self) -> list[Any] | None:
        """The messages that the model is to answer, None at the end."""
        environment, state = self._environment, self._state
        while not state["is_completed"] and not await environment.is_completed(state):
            try:
                asked = normalize_messages(await environment.get_prompt_messages(state))
            except ToolError as error:  # of the model's call, with which the environment ends
                state["error"] = error
                continue
            if state.get("final_env_response") is None:
                return asked
        return None

    async def _score(self) -> Any:
        await self._clean_up(before_scoring=True)
        self._errors.clear()
        await self._environment.rubric.score_rollout(self._state)
        await self._clean_up()
        if self._errors:  # the rubric has taken them for zeros
            raise self._errors[0]
        return self._state["reward"]

    async def _clean_up(self, before_scoring: bool = False) -> None:
        """The environment's hooks, and then the rubric's, each once, whatever the others raise."""
        owners = (self._environment, self._environment.rubric)[: 1 if before_scoring else 2]
        async with contextlib.AsyncExitStack() as stack:
            for owner in [each for each in reversed(owners) if each not in self._cleaned]:
                self._cleaned.append(owner)
                stack.push_async_callback(owner.cleanup, self._state)

    def _is_late(self) -> bool:
        limit_s = self._environment.timeout_seconds
        return limit_s is not None and time.time() > (
            self._state["timing"].generation.start + limit_s
        )


class EngineClient(OpenAIChatCompletionsClient):
    """Gives the response that the engine has sampled to the one request that it answers."""

    def __init__(self) -> None:
        super().__init__(None)  # there is no server
        self._asked: list[Message] = []
        self._response: ResponseMessage | None = None

    def expect(self, asked: list[Any], response: ResponseMessage) -> None:
        self._asked, self._response = _comparable(asked), response

    def check_asked(self) -> None:
        if self._response is not None:
            raise Unsupported("it took a response from elsewhere than its client")

    async def get_response(
        self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any
    ) -> Response:
        if reason := sampling_refusal(sampling_args or {}):
            raise Unsupported(reason)
        if self._response is None or _comparable(prompt) != self._asked:
            raise Unsupported(
                "it asks the model for more than the next message of its conversation"
            )
        response, self._response = self._response, None
        return Response(id="", created=0, model=model, message=response)


def _restored(name: str, data: bytes) -> PublicRollout:
    return PublicRollout(name, *unpickled(data, environment_called(name).owned))


# Messages -----------------------------------------------------------------------------------------


def _as_message(response: str, has_tools: bool) -> ResponseMessage:
    text, calls = calls_in(response) if has_tools else (response, [])
    requested = [
        RequestedCall(id=f"call_{number}", name=call.name, arguments=call.arguments)
        for number, call in enumerate(calls)
    ]
    return ResponseMessage(
        content=text,
        tool_calls=requested or None,
        finish_reason="tool_calls" if calls else "stop",
        is_truncated=False,
    )


def _comparable(messages: Any) -> list[Message]:
    return [
        Message(
            message.role,
            _text_of(message.content),
            tuple(
                (call.name, call.arguments) for call in getattr(message, "tool_calls", None) or ()
            ),
        )
        for message in normalize_messages(messages)
    ]


def _text_of(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part if isinstance(part, dict) else part.model_dump() for part in content]
    if other := next((part["type"] for part in parts if part["type"] != "text"), None):
        raise Unsupported(f"a message holds {other}, but only text can be given to the model")
    return "".join(part["text"] for part in parts)


def _observation(past: list[Message], asked: list[Message]) -> str:
    """The text of the messages behind `past`, which are those between two responses."""
    new = asked[len(past) :]
    if asked[: len(past)] != past:
        raise Unsupported(
            "it writes earlier messages differently before later ones, so that the next response "
            "cannot continue the sampled tokens"
        )
    if not new or any(message.role not in ("user", "text", "tool") for message in new):
        roles = ", ".join(message.role for message in new) or "none"
        raise Unsupported(
            f"messages of a user or a tool must follow a response, but these do: {roles}"
        )
    return "\n".join(result(m.text) if m.role == "tool" else m.text for m in new)


# Rewards ------------------------------------------------------------------------------------------


def _rubrics(rubric: Any) -> Iterator[Any]:
    yield rubric
    for member in getattr(rubric, "rubrics", ()):
        yield from _rubrics(member)


def _recorded(function: Callable[..., Any], errors: list[Exception]) -> Callable[..., Any]:
    """The function, which the package calls by the names of its parameters."""

    @functools.wraps(function)
    async def recorded(*args: Any, **kwargs: Any) -> float:
        try:
            reward = function(*args, **kwargs)
            return float(await reward if inspect.isawaitable(reward) else reward)
        except Exception as error:  # of the environment's own code
            errors.append(error)
            raise

    return recorded
