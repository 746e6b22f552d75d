"""One engine's life in a run: launch -> generate -> score -> report, and obey every cancel at once.

Owns the rollouts in flight on one engine: each is answered exactly once, by `Finished`, `Failed` or
`Stopped`, after all its tokens. Decides nothing: the buffer says what to launch and what to cancel.
Driven by commands from the buffer and by its engine; run by `actors.process`.

Consumes Launch, Cancel, PolicyPublished, Shutdown. Waits for its engine, for verifiers and for
snapshots, each in a task of its own, so that none holds up another. Unblocks the buffer with every
Progress, Finished, Failed, Stopped and PolicyLoaded.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from array import array
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from actors.environments import Environment, EnvironmentFailure
from actors.inference import weights
from actors.inference.generation import BASE_VERSION, EngineDied, Generation, Measurement
from actors.inference.probing import probe
from buffer.wire import messages as msg
from buffer.wire.snapshots import SnapshotGoneError
from buffer.wire.transport import TransportError
from configs.errors import one_line
from configs.schema import Config

LEAST_ROOM = (
    16  # tokens that a prompt must leave for the response, unless sampling.max_tokens is less
)
TEXT_CHARS = 4000  # of a response, for samples.jsonl
REPORT_S = 1.0
FETCH_ATTEMPTS, FETCH_RETRY_S = 3, 1.0  # of the first policy
RECEIVE_S = 1.0
SLOWEST_FLUSH = 10  # times actors.flush_s
CROWDED_BYTES = (
    1 << 18
)  # a Progress larger than this says that the buffer had better hear from us less often


class Sampler(Protocol):
    """The part of an engine that a worker uses: `actors.inference.engine.Engine`, or a fake in its place."""

    tokenizer: Any
    eos_ids: frozenset[int]
    version: int

    @property
    def model_type(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def cause(self) -> str: ...
    @property
    def died(self) -> asyncio.Event: ...
    def launch(
        self, request_id: str, prompt_ids: list[int], max_tokens: int, seed: int
    ) -> Generation: ...
    async def abort(self, request_ids: list[str]) -> None: ...
    async def swap(self, path: str, version: int) -> float: ...
    async def score(self, token_ids: list[int]) -> array[float]: ...
    def measure(self) -> Measurement: ...


class Link(Protocol):
    """The part of `buffer.wire.client.EngineLink` that a worker uses."""

    def send(self, message: msg.EngineMessage) -> None: ...
    def receive(self, timeout_s: float) -> Any: ...


class PolicyUnavailable(Exception):
    """The first policy cannot be had or run, and nothing is launched on an engine without one."""


@dataclass(slots=True, eq=False)
class Rollout:
    """A launched rollout until it is answered.

    `prefix`: sampled by an engine that died, and known to the buffer.
    """

    rollout_id: int
    prompt: msg.PromptPayload
    prefix: array[int]
    generation: Generation
    cancelled: bool = False

    @property
    def num_tokens(self) -> int:
        """Sampled tokens so far, those of the prefix included."""
        return len(self.prefix) + len(self.generation.tokens)

    def take_chunks(self) -> list[msg.Chunk]:
        """Return the tokens sampled since the last call."""
        return [
            msg.Chunk(
                rollout_id=self.rollout_id,
                sampled=True,
                version=run.version,
                tokens=run.tokens.tobytes(),
                logprobs=run.logprobs.tobytes(),
            )
            for run in self.generation.take()
        ]


class Worker:
    """Serves one run on one engine, from the buffer's welcome to its shutdown, or until the buffer
    is lost.
    """

    def __init__(
        self,
        config: Config,
        engine: Sampler,
        link: Link,
        environment: Environment,
        fetch: weights.Fetch,
    ) -> None:
        self._config, self._engine, self._link, self._environment, self._fetch = (
            config,
            engine,
            link,
            environment,
            fetch,
        )
        self._rollouts: dict[int, Rollout] = {}
        self._newest: msg.SnapshotRef | None = None
        self._published = asyncio.Event()
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._broken: asyncio.Future[msg.Shutdown] = asyncio.get_running_loop().create_future()

    async def run(self, welcome: msg.Welcome) -> msg.Shutdown:
        """Until the buffer ends the run. Leaves the engine empty.

        Raises `TransportError` when the buffer is lost, `EngineDied`, `SwapFailed`,
        `PolicyUnavailable`.
        """
        if welcome.policy is not None:
            self._learn_of(welcome.policy)
        threading.Thread(
            target=self._read, args=(asyncio.get_running_loop(),), daemon=True, name="commands"
        ).start()
        for loop in (
            self._flush_often(),
            self._report_often(),
            self._follow_policy(),
            self._watch_engine(),
        ):
            self._spawn(loop)
        obeying = self._spawn(self._obey())
        try:
            await asyncio.wait({obeying, self._broken}, return_when=asyncio.FIRST_COMPLETED)
            return self._broken.result() if self._broken.done() else obeying.result()
        finally:
            for task in self._tasks:
                task.cancel()
            if not self._engine.died.is_set():
                await self._engine.abort(
                    [rollout.generation.request_id for rollout in self._rollouts.values()]
                )

    def _spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not self._broken.done():
            self._broken.set_exception(error)

    # Commands -------------------------------------------------------------------------------------

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """On a thread of its own: the link's blocking `receive`, into the event loop's inbox."""
        message: Any = None
        while not isinstance(message, (msg.Shutdown, Exception)):
            try:
                message = self._link.receive(RECEIVE_S)
            except Exception as error:  # it must reach the task that waits for commands
                message = error
            if message is not None:
                try:
                    loop.call_soon_threadsafe(self._inbox.put_nowait, message)
                except RuntimeError:
                    return  # the loop has closed

    async def _obey(self) -> msg.Shutdown:
        while True:
            command = await self._inbox.get()
            if isinstance(command, msg.Launch):
                self._launch(command)
            elif isinstance(command, msg.Cancel):
                self._spawn(self._cancel(command.rollout_ids))
            elif isinstance(command, msg.PolicyPublished):
                self._learn_of(command.policy)
            elif isinstance(command, msg.Shutdown):
                return command
            elif isinstance(command, Exception):
                raise command

    def _launch(self, command: msg.Launch) -> None:
        prompt = command.prompt
        try:
            prompt_ids = self._environment.render(prompt, self._engine.tokenizer)
        except Exception as error:  # a template or tokenizer that cannot take this prompt
            line = (
                f"prompt {prompt.prompt_id} cannot be turned into tokens: {one_line(error)}; "
                "see its row, or data.chat_template"
            )
            self._fail(command.rollouts, line, fatal=False)
            return
        room = self._config.model.max_context - len(prompt_ids)
        if room < (needed := min(LEAST_ROOM, self._config.sampling.max_tokens)):
            line = (
                f"prompt {prompt.prompt_id} has {len(prompt_ids)} tokens and leaves {room} for a "
                "response in "
                f"model.max_context={self._config.model.max_context}, {needed} are needed: raise "
                "model.max_context, or drop the prompt"
            )
            self._fail(command.rollouts, line, fatal=True)
            return
        given = array("i", prompt_ids).tobytes()
        self._link.send(
            msg.Progress(
                chunks=[
                    msg.Chunk(
                        rollout_id=launched.rollout_id,
                        sampled=False,
                        version=0,
                        tokens=given,
                        logprobs=b"",
                    )
                    for launched in command.rollouts
                ]
            )
        )
        for launched in command.rollouts:
            self._start(launched, prompt, prompt_ids, min(room, self._config.sampling.max_tokens))

    def _fail(self, rollouts: Iterable[msg.LaunchedRollout], error: str, fatal: bool) -> None:
        for launched in rollouts:
            self._link.send(msg.Failed(rollout_id=launched.rollout_id, error=error, fatal=fatal))

    def _start(
        self,
        launched: msg.LaunchedRollout,
        prompt: msg.PromptPayload,
        prompt_ids: list[int],
        max_tokens: int,
    ) -> None:
        prefix = array("i", launched.prefix)
        request_id, left = str(launched.rollout_id), max_tokens - len(prefix)
        if prefix and (
            prefix[-1] in self._engine.eos_ids or left <= 0
        ):  # it had ended, and its engine died before it could say so
            generation = Generation(request_id)
            generation.end("stop" if prefix[-1] in self._engine.eos_ids else "length")
        else:
            generation = self._engine.launch(
                request_id, [*prompt_ids, *prefix], left, launched.seed
            )
        rollout = self._rollouts[launched.rollout_id] = Rollout(
            launched.rollout_id, prompt, prefix, generation
        )
        self._spawn(self._follow(rollout))

    async def _cancel(self, rollout_ids: list[int]) -> None:
        """Those that ended already are answered, or are about to be, by their `Finished`."""
        decoding = [
            rollout
            for rollout_id in rollout_ids
            if (rollout := self._rollouts.get(rollout_id))
            and not rollout.generation.finished.done()
        ]
        for rollout in decoding:
            rollout.cancelled = True
        if decoding:
            await self._engine.abort([rollout.generation.request_id for rollout in decoding])

    # A rollout's end ------------------------------------------------------------------------------

    async def _follow(self, rollout: Rollout) -> None:
        answer = await self._answer(rollout)
        del self._rollouts[rollout.rollout_id]
        if answer is not None:
            self._link.send(answer)

    async def _answer(self, rollout: Rollout) -> msg.Finished | msg.Failed | msg.Stopped | None:
        """Return the final message for the buffer, after sending the last tokens.

        None if the whole engine is lost.
        """
        try:
            outcome = await rollout.generation.finished
        except Exception as error:  # of this request alone, unless the engine is gone
            line = (
                f"the engine did not accept a rollout of prompt {rollout.prompt.prompt_id}: "
                f"{one_line(error)}"
            )
            return (
                None
                if self._engine.died.is_set()
                else msg.Failed(rollout_id=rollout.rollout_id, error=line, fatal=False)
            )
        self._send_progress([rollout])
        if outcome == "abort" and rollout.cancelled:
            return msg.Stopped(rollout_id=rollout.rollout_id, num_tokens=rollout.num_tokens)
        if outcome not in ("stop", "length"):
            line = (
                f"the engine gave up on a rollout of prompt {rollout.prompt.prompt_id}, saying "
                f"{outcome!r}"
            )
            return msg.Failed(rollout_id=rollout.rollout_id, error=line, fatal=False)
        response = [*rollout.prefix, *rollout.generation.tokens]
        text = self._engine.tokenizer.decode(
            response, skip_special_tokens=not self._environment.keep_special_tokens
        )
        try:
            reward = await self._environment.score(rollout.prompt, text)
        except EnvironmentFailure as failure:
            return msg.Failed(rollout_id=rollout.rollout_id, error=str(failure), fatal=False)
        return msg.Finished(
            rollout_id=rollout.rollout_id,
            num_tokens=rollout.num_tokens,
            truncated=outcome == "length",
            reward=reward,
            text=text[:TEXT_CHARS],
        )

    # Reports --------------------------------------------------------------------------------------

    def _send_progress(self, rollouts: Iterable[Rollout]) -> int:
        """Everything these have sampled since their last chunk, as one message.

        Returns its payload bytes.
        """
        chunks = [chunk for rollout in rollouts for chunk in rollout.take_chunks()]
        if chunks:
            self._link.send(msg.Progress(chunks=chunks))
        return sum(len(chunk.tokens) + len(chunk.logprobs) for chunk in chunks)

    async def _flush_often(self) -> None:
        fastest_s = interval_s = self._config.actors.flush_s
        while True:
            due_s = time.monotonic() + interval_s
            await asyncio.sleep(interval_s)
            late_s = time.monotonic() - due_s
            due = [
                r
                for r in self._rollouts.values()
                if r.generation.num_pending >= self._config.actors.stream_interval
            ]
            interval_s = next_flush_s(interval_s, fastest_s, late_s, self._send_progress(due))

    async def _report_often(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            measured = self._engine.measure()
            self._link.send(
                msg.EngineReport(
                    batch=measured.batch,
                    ms_per_token=measured.ms_per_token,
                    tokens_per_s=measured.tokens_per_s,
                    busy_frac=measured.busy_frac,
                )
            )

    async def _watch_engine(self) -> None:
        await self._engine.died.wait()
        cause = self._engine.cause
        if cause and self._engine.version == BASE_VERSION:  # another engine would end the same way
            model_type = self._engine.model_type
            raise PolicyUnavailable(f"vLLM cannot run {model_type} models here: {cause}")
        last_lines = "their last lines are above, if they wrote any"
        raise EngineDied(f"vLLM's processes ended by themselves: {cause or last_lines}")

    # Policies -------------------------------------------------------------------------------------

    def _learn_of(self, policy: msg.SnapshotRef) -> None:
        self._newest = policy
        self._published.set()

    async def _follow_policy(self) -> None:
        """Load the newest policy as soon as there is one; versions in between are skipped."""
        num_failed = 0
        while True:
            await self._published.wait()
            self._published.clear()
            assert self._newest is not None
            policy = self._newest
            if self._engine.version == BASE_VERSION:
                await self._probe()
            try:
                loaded = await weights.load(policy, self._fetch, self._engine)
            except SnapshotGoneError:
                continue  # a newer one has replaced it, and its publication is on the way
            except (TransportError, ValueError) as error:
                num_failed += 1
                if self._engine.version >= 0:
                    print(
                        f"actors: goes on with policy {self._engine.version} until the next one: "
                        f"{one_line(error)}",
                        file=sys.stderr,
                    )
                elif num_failed < FETCH_ATTEMPTS:
                    await asyncio.sleep(FETCH_RETRY_S)
                    self._published.set()
                else:
                    raise PolicyUnavailable(one_line(error)) from error
            else:
                num_failed = 0
                self._link.send(loaded)
                await self._probe()

    async def _probe(self) -> None:
        """Have the present weights score the probe; the buffer compares it with the learner's."""
        version, logprobs = self._engine.version, await probe(self._engine)
        model_type = self._engine.model_type
        self._link.send(msg.Probed(version=version, model_type=model_type, logprobs=logprobs))


def next_flush_s(interval_s: float, fastest_s: float, late_s: float, num_bytes: int) -> float:
    """Seconds until the next flush: longer while this process is behind (`late_s`) or its messages
    are large, else back to the fastest.
    """
    crowded = late_s > interval_s / 2 or num_bytes > CROWDED_BYTES
    return (
        min(interval_s * 1.5, SLOWEST_FLUSH * fastest_s)
        if crowded
        else max(interval_s / 1.25, fastest_s)
    )
