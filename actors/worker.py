"""One engine's life in a run: launch -> generate -> score -> report, and obey every cancel at once.

Owns the rollouts of one engine, with all their tokens: each is answered by `Finished`, `Failed` or
`Stopped`, after all its tokens, and kept until the buffer has `Settled` it. It outlives its link:
while that is down the engine decodes on, and after the next welcome the buffer gets the tokens and
answers that it lacks. Decides nothing: the buffer says what to launch and what to cancel. Driven by
commands from the buffer and by its engine; run by `actors.process`.

Consumes Launch, Cancel, Curtail, Settled, PolicyPublished, Shutdown. Waits for its engine, for
verifiers and for snapshots, each in a task of its own, so that none holds up another. Unblocks the
buffer with every Progress, Finished, Failed, Stopped and PolicyLoaded.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from array import array
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import msgspec

from actors.environments import Environment, EnvironmentFailure
from actors.inference import weights
from actors.inference.generation import BASE_VERSION, EngineDied, Measurement
from actors.inference.probing import probe
from actors.playing import Opening, Player, Sampler
from actors.prompts import PromptTooLong
from actors.rollouts import Rollout
from buffer.wire import messages as msg
from buffer.wire.client import LinkLost
from buffer.wire.snapshots import SnapshotGoneError
from buffer.wire.transport import TransportError
from configs.errors import one_line
from configs.schema import Config

REPORT_S = 1.0
FETCH_RETRY_S = 1.0  # of the first policy
ABORT_S = 5.0  # for the last aborts, when the worker ends
RECEIVE_S = 1.0
RECONNECT_S = 0.5  # between the loss of a link and the next attempt
SLOWEST_FLUSH = 10  # times actors.flush_s
CROWDED_BYTES = (
    1 << 18
)  # a Progress larger than this says that the buffer had better hear from us less often


class Engine(Sampler, Protocol):
    """The part of `actors.inference.engine.Engine` that a worker uses; tests pass a fake."""

    version: int

    @property
    def model_type(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def cause(self) -> str: ...
    async def abort(self, request_ids: list[str]) -> None: ...
    async def swap(self, path: str, version: int) -> float: ...
    async def score(self, token_ids: list[int]) -> array[float]: ...
    def measure(self) -> Measurement: ...


class Link(Protocol):
    """The part of `buffer.wire.client.EngineLink` that a worker uses."""

    def connect(self, hello: msg.EngineHello, timeout_s: float) -> msg.Welcome: ...
    def send(self, message: msg.EngineMessage) -> None: ...
    def receive(self, timeout_s: float) -> Any: ...


class PolicyUnavailable(Exception):
    """The first policy cannot be had or run, and nothing is launched on an engine without one."""


class Worker:
    """Serves one run on one engine, from the buffer's welcome to its shutdown, or until the buffer
    stays away for `buffer.rejoin_timeout_s`.

    `hello`: as the engine joined; it joins again with its policy version and rollouts of then.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        link: Link,
        environment: Environment,
        fetch: weights.Fetch,
        *,
        hello: msg.EngineHello,
    ) -> None:
        self._config, self._engine, self._link, self._environment, self._fetch = (
            config,
            engine,
            link,
            environment,
            fetch,
        )
        self._player = Player(config, engine, environment)
        self._hello = hello
        self._joined = True  # else the link is down, and nothing is sent
        self._loaded: msg.PolicyLoaded | None = None  # the newest, in case that the link breaks
        self._probed: msg.Probed | None = None
        self._rollouts: dict[int, Rollout] = {}
        self._newest: msg.SnapshotRef | None = None
        self._published = asyncio.Event()
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._broken: asyncio.Future[msg.Shutdown] = asyncio.get_running_loop().create_future()

    async def run(self, welcome: msg.Welcome) -> msg.Shutdown:
        """Until the buffer ends the run. Leaves the engine empty.

        Raises `TransportError` when the buffer is lost for good, `EngineDied`, `SwapFailed`,
        `PolicyUnavailable`.
        """
        self._enter(welcome)
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
            decoding = [rollout for rollout in self._rollouts.values() if rollout.decodes]
            for task in self._tasks:
                task.cancel()
            if not self._engine.died.is_set():
                # An engine that hangs answers nothing; its process is about to end.
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._abort(decoding), ABORT_S)

    def hand_over(self) -> None:
        """Tell the buffer that other engines are to continue all rollouts, from their last token.

        Nothing is sent after that; the caller ends `run`.
        """
        self._send_progress(self._rollouts.values())
        self._send(msg.Leaving())
        self._joined = False

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

    def _enter(self, welcome: msg.Welcome) -> None:
        """The buffer has welcomed this engine: serve it over the present connection."""
        if welcome.policy is not None:
            self._learn_of(welcome.policy)
        threading.Thread(
            target=self._read, args=(asyncio.get_running_loop(),), daemon=True, name="commands"
        ).start()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """On a thread of its own, one per connection: the link's blocking `receive`, into the event
        loop's inbox.
        """
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
            elif isinstance(command, msg.Curtail):
                self._spawn(self._curtail(command.rollout_ids))
            elif isinstance(command, msg.Settled):
                for rollout_id in command.rollout_ids:
                    self._rollouts.pop(rollout_id, None)
            elif isinstance(command, msg.PolicyPublished):
                self._learn_of(command.policy)
            elif isinstance(command, msg.Shutdown):
                return command
            elif isinstance(command, LinkLost):
                await self._join_again(command)
            elif isinstance(command, Exception):
                raise command

    def _launch(self, command: msg.Launch) -> None:
        try:
            opening = self._player.opening(command.prompt)
        except (EnvironmentFailure, PromptTooLong) as error:
            unusable = isinstance(error, PromptTooLong)
            for rollout in command.rollouts:
                failed = msg.Failed(
                    rollout_id=rollout.rollout_id, error=str(error), unusable=unusable
                )
                self._send(failed)
            return
        launched = [r for r in command.rollouts if r.rollout_id not in self._rollouts]
        self._send_progress([self._start(r, opening) for r in launched])

    def _start(self, launched: msg.LaunchedRollout, opening: Opening) -> Rollout:
        prefix = array("i", launched.prefix)
        rollout = self._player.start(
            opening, launched.rollout_id, seed=launched.seed, prefix=prefix
        )
        self._rollouts[launched.rollout_id] = rollout
        rollout.follower = self._spawn(self._follow(rollout))
        return rollout

    async def _cancel(self, rollout_ids: list[int]) -> None:
        """Stop decoding them, or waiting for their rewards. Answered ones are left alone."""
        found = [self._rollouts[i] for i in rollout_ids if i in self._rollouts]
        for rollout in found:
            if rollout.waits:
                self._stop_scoring(rollout)
        decoding = [rollout for rollout in found if rollout.decodes]
        for rollout in decoding:
            rollout.cancelled = True
        await self._abort(decoding)

    async def _curtail(self, rollout_ids: list[int]) -> None:
        """End them where they are. One that waits for its environment gets no further turn."""
        found = [self._rollouts[i] for i in rollout_ids if i in self._rollouts]
        for rollout in found:
            rollout.curtailed = True
        await self._abort([rollout for rollout in found if rollout.decodes])

    def _stop_scoring(self, rollout: Rollout) -> None:
        """Its verifier has not answered, and need not any more."""
        assert rollout.follower is not None
        rollout.follower.cancel()
        self._send_progress([rollout])
        rollout.answer = self._player.stopped(rollout)
        self._send(rollout.answer)

    async def _abort(self, rollouts: list[Rollout]) -> None:
        if rollouts:
            await self._engine.abort([rollout.turn.generation.request_id for rollout in rollouts])

    # Joining again --------------------------------------------------------------------------------

    def _send(self, message: msg.EngineMessage) -> None:
        """Nothing is sent while the link is down: after the next welcome, all that the buffer lacks
        is sent again.
        """
        if not self._joined:
            return
        try:
            self._link.send(message)
        except LinkLost:
            self._joined = False  # `receive` raises it too, and then this engine joins again

    async def _join_again(self, lost: LinkLost) -> None:
        self._joined = False
        limit_s = self._config.buffer.rejoin_timeout_s
        print(
            f"actors: {self._hello.engine_id}: {lost}; it decodes on and joins again "
            f"(for up to {limit_s:g} s)",
            file=sys.stderr,
            flush=True,
        )
        await asyncio.sleep(RECONNECT_S)
        hello = msgspec.structs.replace(
            self._hello,
            policy_version=self._engine.version,
            rollouts=list(self._rollouts),
        )
        welcome = await weights.in_thread(partial(self._link.connect, hello, limit_s))
        self._joined = True
        self._enter(welcome)
        self._catch_up(welcome, hello.policy_version)

    def _catch_up(self, welcome: msg.Welcome, known_version: int) -> None:
        """Send everything that the buffer lacks, and free the rollouts that it does not want."""
        if self._loaded is not None and self._loaded.version > known_version:
            self._send(self._loaded)
        if self._probed is not None:
            self._send(self._probed)
        unable = [i for i, n in welcome.resend.items() if not self._rollouts[i].resume(n)]
        given_up = [self._rollouts.pop(i) for i in [*welcome.forget, *unable]]
        self._spawn(self._abort([rollout for rollout in given_up if rollout.decodes]))
        for rollout in given_up:
            assert rollout.follower is not None
            rollout.follower.cancel()
        for rollout_id in unable:
            error = "the buffer lost records of this rollout, so it cannot go on"
            self._send(msg.Failed(rollout_id=rollout_id, error=error))
        for rollout in self._rollouts.values():
            if rollout.rollout_id in welcome.resend:
                self._send_progress([rollout])  # a message each, since it may be long
            if rollout.answer is not None:
                self._send(rollout.answer)

    # A rollout's end ------------------------------------------------------------------------------

    async def _follow(self, rollout: Rollout) -> None:
        answer = await self._player.play(rollout, lambda: self._send_progress([rollout]))
        if answer is not None:
            rollout.answer = answer
            self._send(answer)

    # Reports --------------------------------------------------------------------------------------

    def _send_progress(self, rollouts: Iterable[Rollout]) -> int:
        """Everything these have sampled since their last chunk, as one message, which also says
        which of them wait for their environment.

        Returns its payload bytes.
        """
        rollouts = list(rollouts)
        chunks = [chunk for rollout in rollouts for chunk in rollout.take_chunks()]
        waits = [r.rollout_id for r in rollouts if self._environment.has_turns and r.waits]
        if chunks or waits:
            self._send(msg.Progress(chunks=chunks, waits=waits))
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
                if r.num_pending >= self._config.actors.stream_interval
            ]
            interval_s = next_flush_s(interval_s, fastest_s, late_s, self._send_progress(due))

    async def _report_often(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            measured = self._engine.measure()
            self._send(
                msg.EngineReport(
                    batch=measured.batch,
                    ms_per_token=measured.ms_per_token,
                    tokens_per_s=measured.tokens_per_s,
                    busy_frac=measured.busy_frac,
                    verifier=self._environment.measure(),
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
        limit_s = self._config.buffer.rejoin_timeout_s
        deadline: float | None = None  # for the first policy, once it could not be had
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
                now = time.monotonic()
                if self._engine.version >= 0:
                    print(
                        f"actors: goes on with policy {self._engine.version} until the next one: "
                        f"{one_line(error)}",
                        file=sys.stderr,
                    )
                    continue
                # Its learner may be gone, and the next one takes a while to start.
                if deadline is None:
                    deadline = now + limit_s
                    print(
                        f"actors: {self._hello.engine_id}: tries for {limit_s:g} s to get its "
                        f"first policy: {one_line(error)}",
                        file=sys.stderr,
                        flush=True,
                    )
                if now >= deadline:
                    raise PolicyUnavailable(one_line(error)) from error
                await asyncio.sleep(FETCH_RETRY_S)
                self._published.set()
            else:
                self._loaded = loaded
                self._send(loaded)
                await self._probe()

    async def _probe(self) -> None:
        """Have the present weights score the probe; the buffer compares it with the learner's."""
        version, logprobs = self._engine.version, await probe(self._engine)
        model_type = self._engine.model_type
        self._probed = msg.Probed(version=version, model_type=model_type, logprobs=logprobs)
        self._send(self._probed)


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
