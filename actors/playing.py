"""Plays rollouts on an engine: response, step of the environment, observation, next response.

Owns the limits of a rollout and its sum of rewards, and never tokenises a response. Sends nothing:
the caller is told when a turn ends and when the next one begins. Driven by `actors.worker` during a
run, and by `tools.evaluate` after it.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from actors.environments import Environment, EnvironmentFailure
from actors.inference.generation import Generation
from actors.prompts import response_limit
from actors.rollouts import Rollout, Turn
from actors.verifiers import BadReward, finite
from buffer.wire import messages as msg
from configs.errors import one_line
from configs.schema import Config

TEXT_CHARS = 4000  # of a response, for samples.jsonl


class Sampler(Protocol):
    """The part of `actors.inference.engine.Engine` that samples responses; tests pass a fake."""

    tokenizer: Any
    eos_ids: frozenset[int]

    @property
    def died(self) -> asyncio.Event: ...
    def launch(
        self,
        request_id: str,
        prompt_ids: list[int],
        max_tokens: int,
        *,
        seed: int,
        num_continued: int,
    ) -> Generation: ...


@dataclass(frozen=True, slots=True)
class Opening:
    """A prompt in tokens, and the largest number of tokens that may be sampled after it."""

    prompt: msg.PromptPayload
    token_ids: list[int]
    max_tokens: int


@dataclass(slots=True)
class Held:
    """The state of an environment that waits for its next step, "" while there is none."""

    state: str = ""

    def release(self) -> str:
        state, self.state = self.state, ""
        return state


class Player:
    """Begins rollouts with `start`, and plays each to its end with `play`."""

    def __init__(self, config: Config, engine: Sampler, environment: Environment) -> None:
        self._config, self._engine, self._environment = config, engine, environment

    def opening(self, prompt: msg.PromptPayload) -> Opening:
        """Raises `PromptTooLong`, and `EnvironmentFailure` if the prompt cannot be tokenised."""
        try:
            token_ids = self._environment.render(prompt, self._engine.tokenizer)
        except Exception as error:  # a template or tokenizer that cannot take this prompt
            raise EnvironmentFailure(
                f"{prompt.name} cannot be turned into tokens: {one_line(error)}; "
                "see its row, or data.chat_template"
            ) from error
        return Opening(prompt, token_ids, response_limit(prompt, len(token_ids), self._config))

    def start(
        self, opening: Opening, rollout_id: int, *, seed: int, prefix: array[int] | None = None
    ) -> Rollout:
        """Launch the first response, of which another engine has sampled `prefix`."""
        prefix = prefix or array("i")
        request_id, left = str(rollout_id), opening.max_tokens - len(prefix)
        if prefix and (
            prefix[-1] in self._engine.eos_ids or left <= 0
        ):  # it had ended, and its engine died before it could say so
            generation = Generation(request_id)
            generation.end("stop" if prefix[-1] in self._engine.eos_ids else "length")
        else:
            generation = self._engine.launch(
                request_id,
                [*opening.token_ids, *prefix],
                left,
                seed=seed,
                num_continued=len(prefix),
            )
        first = Turn(array("i", opening.token_ids), generation, prefix)
        return Rollout(rollout_id, opening.prompt, seed, [first])

    async def play(
        self, rollout: Rollout, turn_changed: Callable[[], object] = lambda: None
    ) -> msg.Finished | msg.Failed | msg.Stopped | None:
        """Play the rollout from its first response on, and return its end.

        `turn_changed` is called after the last token of every response, before the environment
        answers, and when the next response begins. None if the whole engine is lost. However it
        ends, its environment is closed.
        """
        held = Held()
        try:
            return await self._play(rollout, held, turn_changed)
        finally:
            if held.state:
                self._environment.abandon(held.state)

    async def _play(
        self, rollout: Rollout, held: Held, turn_changed: Callable[[], object]
    ) -> msg.Finished | msg.Failed | msg.Stopped | None:
        rewards, texts = 0.0, rollout.texts
        while True:
            outcome = await self._end_of_turn(rollout, turn_changed)
            if not isinstance(outcome, str):
                return outcome
            text = self._text_of_turn(rollout)
            try:
                if not rollout.turn.num_sampled:  # curtailed before the turn's first token
                    rewards = finite(
                        rewards + await self._environment.finish(rollout.prompt, held.release())
                    )
                    has_room = False
                    break
                step = await self._environment.step(rollout.prompt, text, held.release())
                held.state = step.state
                rewards = finite(rewards + step.reward)
                continues = (
                    step.observation is not None
                    and outcome == "stop"
                    and len(rollout.turns) < self._config.data.max_turns
                )
                has_room = not continues or (
                    not rollout.curtailed and self._next_turn(rollout, step.observation or "")
                )
                ends = not continues or not has_room
                if ends and step.observation is not None:
                    last_reward = await self._environment.finish(rollout.prompt, held.release())
                    rewards = finite(rewards + last_reward)
            except (EnvironmentFailure, BadReward) as failure:
                return msg.Failed(rollout_id=rollout.rollout_id, error=str(failure))
            texts.append(text)
            if ends:
                break
            texts.append(step.observation or "")
            turn_changed()
        return msg.Finished(
            rollout_id=rollout.rollout_id,
            num_tokens=rollout.num_tokens,
            truncated=outcome == "length" or not has_room,
            reward=rewards,
            text="\n".join(texts)[:TEXT_CHARS],
        )

    async def _end_of_turn(
        self, rollout: Rollout, turn_changed: Callable[[], object]
    ) -> str | msg.Failed | msg.Stopped | None:
        """`stop` or `length`, else the end of the rollout, as `play` returns it."""
        try:
            outcome = await rollout.turn.generation.finished
        except Exception as error:  # of this request alone, unless the engine is gone
            line = (
                f"the engine did not accept a rollout of {rollout.prompt.name}: {one_line(error)}"
            )
            return (
                None
                if self._engine.died.is_set()
                else msg.Failed(rollout_id=rollout.rollout_id, error=line)
            )
        turn_changed()
        # One that ended by itself before its cancel took effect needs only its reward, as a rule.
        if rollout.cancelled and (outcome == "abort" or self._environment.has_turns):
            return self.stopped(rollout)
        if outcome == "abort" and rollout.curtailed:
            return "length"
        if outcome not in ("stop", "length"):
            line = f"the engine gave up on a rollout of {rollout.prompt.name}, saying {outcome!r}"
            return msg.Failed(rollout_id=rollout.rollout_id, error=line)
        return outcome

    def stopped(self, rollout: Rollout) -> msg.Stopped:
        """The answer to a cancel, with the text so far."""
        text = "\n".join([*rollout.texts, self._text_of_turn(rollout, TEXT_CHARS)])
        return msg.Stopped(
            rollout_id=rollout.rollout_id, num_tokens=rollout.num_tokens, text=text[:TEXT_CHARS]
        )

    def _text_of_turn(self, rollout: Rollout, most_tokens: int | None = None) -> str:
        return self._engine.tokenizer.decode(
            rollout.turn.response[:most_tokens],
            skip_special_tokens=not self._environment.keep_special_tokens,
        )

    def _next_turn(self, rollout: Rollout, observation: str) -> bool:
        """Decode on after the observation. False if no token is left for the response.

        Raises `EnvironmentFailure` if the observation cannot be turned into tokens.
        """
        last_token = rollout.turn.response[-1]
        try:
            given = self._environment.render_observation(
                observation, last_token, self._engine.tokenizer
            )
        except Exception as error:  # of a template or tokenizer that cannot take it
            line = f"an observation for {rollout.prompt.name} cannot be turned into tokens"
            raise EnvironmentFailure(f"{line}: {one_line(error)}") from error
        token_ids = [*rollout.token_ids, *given]
        left = min(
            self._config.sampling.max_tokens - rollout.num_tokens,
            self._config.model.max_context - len(token_ids),
        )
        if left <= 0:
            return False
        generation = self._engine.launch(
            f"{rollout.rollout_id}.{len(rollout.turns)}",
            token_ids,
            left,
            seed=rollout.seed,
            num_continued=rollout.num_tokens,
        )
        rollout.turns.append(Turn(array("i", given), generation))
        return True
