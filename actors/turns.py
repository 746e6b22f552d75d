"""A user's environment with turns: a class with `step(response)` and, if it likes, `reset(row)`,
`finish()` and `close()`.

`step` returns an observation (text before the next response), a number (the reward, which ends the
rollout), or both as a pair; the rewards of all turns are summed. `reset` returns nothing. `finish`
gives the last reward of a rollout that a limit has ended. `close` is called when a rollout is over,
however it ended. All may be `async`. The object is pickled between turns, so that a waiting rollout
occupies no process and any process may take the next step. Used in the worker processes of
`actors.verifier_workers` alone: nothing else unpickles.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import pickle
from typing import Any

from actors.open_environments import OpenEnvironments
from configs.errors import one_line

STATE_BYTES = 1 << 19  # of a pickled environment
OBSERVATION_CHARS = 1 << 17


class Turns:
    """Plays one turn of any rollout with objects of the class `kind`, made with `arguments`.

    has_close: environments have to be closed. Their states are kept in `opened`, which must be set,
    and their pool names them with keys.
    """

    opened: OpenEnvironments

    def __init__(self, kind: type, *arguments: Any) -> None:
        self._kind, self._arguments = kind, arguments
        self.has_finish = callable(getattr(kind, "finish", None))
        self.has_close = callable(getattr(kind, "close", None))

    def step(
        self, row: dict[str, Any], state: str, response: str, key: str = ""
    ) -> tuple[Any, str | None, str]:
        """Reward, observation (None at the end), and the state for the next step.

        row: prompt, answer and metadata. state: "" before the first response.
        """
        environment = self._restored(state) if state else self._made(key)
        try:
            if not state:
                _reset(environment, row)
            reward, observation = _parts(settled(environment.step(response)))
            if observation is not None:
                return reward, observation, self._kept(environment, key)
        except BaseException as error:  # the user's own, and what stops a step that takes too long
            self._close_after(error, environment, key)
            raise
        self._close(environment, key)
        return reward, None, ""

    def finish(self, state: str) -> Any:
        """Reward of a rollout that a limit has ended after a step that gave `state`."""
        environment = self._restored(state)
        try:
            reward = settled(environment.finish())
        except BaseException as error:
            self._close_after(error, environment, state)
            raise
        self._close(environment, state)
        return reward

    def close(self, key: str) -> None:
        """Close the environment of a rollout that has ended otherwise, unless it was closed."""
        try:
            if data := self.opened.take(key):
                settled(pickle.loads(data).close())
        finally:
            self.opened.closed(key)

    def close_all(self) -> None:
        """Close all that no process holds, because the engine has ended."""
        for key in self.opened.waiting() if self.has_close else ():
            try:
                self.close(key)
            except Exception as error:  # of the user's code; the others must be closed, too
                print(f"close() raised {one_line(error, with_type=True)}", flush=True)

    def _made(self, key: str) -> Any:
        environment = self._kind(*self._arguments)
        if self.has_close:
            self.opened.begin(key)
        return environment

    def _restored(self, state: str) -> Any:
        data = self.opened.hold(state) if self.has_close else base64.b64decode(state)
        return pickle.loads(data)

    def _kept(self, environment: Any, key: str) -> str:
        data = _pickled(environment)
        if not self.has_close:
            return base64.b64encode(data).decode()
        self.opened.keep(key, data)
        return key

    def _close(self, environment: Any, key: str) -> None:
        if self.has_close:
            try:
                settled(environment.close())
            except Exception:
                self.opened.forget(key)  # it is not called twice
                raise
            self.opened.forget(key)

    def _close_after(self, error: BaseException, environment: Any, key: str) -> None:
        try:
            self._close(environment, key)
        except Exception as second:
            first = one_line(error, with_type=True)
            raise RuntimeError(
                f"{first}; then close() raised {one_line(second, with_type=True)}"
            ) from error


def _reset(environment: Any, row: dict[str, Any]) -> None:
    if hasattr(environment, "reset"):
        first = settled(environment.reset(row))
        if first is not None:
            raise TypeError(
                f"reset returned {repr(first)[:100]}, but it returns nothing, since the first "
                "text that the model gets is the row's prompt"
            )


def turns_of(kind: type) -> Turns:
    """Raises TypeError if the class is no environment."""
    if not callable(getattr(kind, "step", None)):
        raise TypeError(f"class {kind.__name__} has no method step(response)")
    return Turns(kind)


def settled(result: Any) -> Any:
    """The result of a user's function, which may be `async`."""

    async def awaited() -> Any:
        return await result

    return asyncio.run(awaited()) if inspect.isawaitable(result) else result


def _parts(result: Any) -> tuple[Any, str | None]:
    """Reward and observation. A reward that is no number is refused by the caller."""
    if isinstance(result, str):
        return 0.0, _checked(result)
    if isinstance(result, tuple) and len(result) == 2:
        observation, reward = result
        if observation is None or isinstance(observation, str):
            return reward, observation and _checked(observation)
        raise TypeError(
            f"step returned {repr(result)[:100]}, which is no pair of observation (text, or None "
            "at the end) and reward"
        )
    return result, None


def _checked(observation: str) -> str:
    if len(observation) > OBSERVATION_CHARS:
        raise ValueError(
            f"its observation has {len(observation)} characters; the limit is {OBSERVATION_CHARS}"
        )
    return observation


def _pickled(environment: Any) -> bytes:
    data = pickle.dumps(environment)
    if len(data) > STATE_BYTES:
        raise ValueError(
            f"its object takes {len(data)} bytes between turns; the limit is {STATE_BYTES}: keep "
            "large data in the module or in files"
        )
    return data
