"""Processes that run one verifier each, so that nothing that it does can harm the engine.

Owns their number, their time limit and their end: every process that a verifier started ends with
its worker. Sees to it that environments with `close` are closed, however their rollouts end: `step`
takes one over, and hands it back only with a state for the next step. Every fault is a
`VerifierFailure` that names it, never a reward. The worker's own side is `actors.verifier_process`.
Driven by `actors.environments`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from actors.open_environments import OpenEnvironments
from actors.verifier_limit import Limit
from actors.verifier_load import Step, VerifierFailure, VerifierLoad, VerifierTimeout
from actors.verifier_process import ALONE
from buffer.processes.child import in_words
from buffer.processes.descendants import CLOSE_S, kill_processes_of, marks
from buffer.wire.messages import PromptPayload, VerifierReport
from configs.schema import DataConfig

START_TIMEOUT_S = 300.0  # importing a verifier's libraries on a busy machine
POLL_S = 0.25  # within which a cancel is noticed
LEAVE_S = 5.0  # for a worker to end all that its verifier started
OUTPUT_BYTES = 1 << 20  # that one verification may print
READ_BYTES, REPLY_BYTES = 1 << 16, 1 << 22
LAST_OUTPUT_BYTES = 300
MOST_WORKERS = 16  # unless data.verifier_workers says otherwise
FIX = "fix the verifier, or choose another with data.environment"


class WorkerPool:
    """Up to data.verifier_workers processes, started when they are needed.

    Waiting for a free one does not count as the verifier's time.
    """

    def __init__(self, verifier: str, data: DataConfig) -> None:
        self._verifier, self._data = verifier, data
        num_workers = data.verifier_workers or min(MOST_WORKERS, max(1, (os.cpu_count() or 1) // 2))
        self._load = VerifierLoad(num_workers)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="verifier")
        self._submitted: set[Future[Step]] = set()
        self._lock = threading.Lock()
        self._workers: set[WorkerProcess] = set()
        self._closed = False
        self._idle: queue.LifoQueue[WorkerProcess] = queue.LifoQueue()
        self._folder = Path(tempfile.mkdtemp(prefix="environments-"))
        self._opened = OpenEnvironments(self._folder)
        try:
            first = self._start()  # at once, so that an import that fails is known at start
        except BaseException:
            shutil.rmtree(self._folder)
            raise
        self.has_turns, self.has_finish = first.has_turns, first.has_finish
        self.has_close = first.has_close
        self._idle.put(first)

    async def score(self, prompt: PromptPayload, response: str) -> float:
        return (await self.step(prompt, response)).reward

    async def step(self, prompt: PromptPayload, response: str | None, state: str = "") -> Step:
        """`state`: of the last step, "" for the first response. A response of None: there is none,
        because a limit has ended the rollout.
        """
        key = state or (uuid.uuid4().hex if self.has_close else "")
        request = [
            prompt_text(prompt),
            response,
            prompt.answer,
            json.loads(prompt.metadata or "{}"),
            state,
            key,
        ]
        limit = Limit(self._load.deadline_s(self._data.verifier_timeout_s))
        submitted = self._threads.submit(self._step, request, time.monotonic(), limit)
        self._submitted.add(submitted)
        submitted.add_done_callback(self._submitted.discard)
        try:
            return await asyncio.wrap_future(submitted)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                limit.cancel()
            submitted.add_done_callback(lambda _: self.close_environment(key))
            raise

    def close_environment(self, key: str) -> None:
        """Close the environment of a rollout that is over, unless it was closed. Does not wait.

        The end of the pool closes all that are left.
        """
        if self.has_close and self._opened.remains(key):
            with self._lock:
                if not self._closed:
                    self._threads.submit(self._close_environment, key)

    def _close_environment(self, key: str) -> None:
        try:
            worker = self._take()
            try:
                worker.call(["", None, "", {}, "", key], Limit(self._data.verifier_timeout_s))
            finally:
                self._put_back(worker)
        except VerifierFailure as error:  # its rollout has ended, so that no other line says it
            line = f"actors: close() of {self._verifier} {error}"
            print(line, file=sys.stderr, flush=True)

    def measure(self) -> VerifierReport:
        """How busy the workers are, and their work since the last call."""
        submitted = list(self._submitted)
        num_busy = sum(one.running() for one in submitted)
        num_done = sum(one.done() for one in submitted)
        return self._load.take(len(submitted) - num_busy - num_done, num_busy)

    def _step(self, request: list[Any], queued_s: float, limit: Limit) -> Step:
        try:
            worker = self._take()
        except VerifierFailure as error:
            self._load.ended(time.monotonic() - queued_s, 0.0, error)
            raise
        started_s, failure = time.monotonic(), None
        try:
            step = worker.call(request, limit)
            self._load.rewarded(time.monotonic() - started_s)
            return step
        except VerifierFailure as error:
            failure = None if limit.cancelled else error
            raise
        finally:
            self._load.ended(started_s - queued_s, time.monotonic() - started_s, failure)
            self._put_back(worker)

    def _put_back(self, worker: WorkerProcess) -> None:
        if worker.usable:
            self._idle.put(worker)
        else:
            self._end(worker)

    def _take(self) -> WorkerProcess:
        """The worker used last, or a new one; there are never more than there are threads."""
        while True:
            try:
                worker = self._idle.get_nowait()
            except queue.Empty:
                return self._start()
            if worker.lives:
                return worker
            self._end(worker)  # killed while it was idle, for lack of memory say

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(self._verifier, self._data.verifier_memory_mb, self._folder)
        with self._lock:
            self._workers.add(worker)
            closed = self._closed
        try:
            if closed:
                raise VerifierFailure("was not started, because the engine ends")
            worker.await_start()
        except BaseException:
            self._end(worker)
            raise
        return worker

    def _end(self, worker: WorkerProcess) -> None:
        with self._lock:
            self._workers.discard(worker)
        worker.kill()

    def close(self) -> None:
        """End all workers; verifications that are under way fail, and environments are closed."""
        with self._lock:
            self._closed = True
            workers = list(self._workers)
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.dismiss()
        for worker in workers:
            worker.kill()
        self._threads.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


class WorkerProcess:
    """One verifier in a session of its own; JSON lines over pipes. `usable`: it can be called."""

    def __init__(self, verifier: str, memory_mb: int, opened: Path) -> None:
        self.usable = self.has_turns = self.has_finish = self.has_close = False
        self._busy, self._ending, self._ended = threading.Lock(), threading.Lock(), False
        self._folder = Path(tempfile.mkdtemp(prefix="verifier-"))
        here = os.pathsep.join(path for path in sys.path if path)
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "actors.verifier_process", verifier]
            + [str(requests), str(replies), str(memory_mb), str(opened)],
            stdin=subprocess.PIPE,  # its end tells the worker that this process has ended
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(requests, replies),
            env={**os.environ, "PYTHONPATH": here, **marks(self._folder)},
            start_new_session=True,
        )
        os.close(requests)
        os.close(replies)
        assert self._process.stdout is not None
        self._output: int | None = self._process.stdout.fileno()
        self._last_output = b""
        os.set_blocking(self._requests, False)

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def await_start(self) -> None:
        """Raises VerifierFailure if the verifier cannot be imported."""
        reply = self._exchange(b"", Limit(START_TIMEOUT_S))
        if (error := reply.get("error")) is not None:
            raise VerifierFailure(f"cannot be imported ({error})")
        self.has_turns, self.has_finish = bool(reply["has_turns"]), bool(reply["has_finish"])
        self.has_close = bool(reply["has_close"])

    def call(self, request: list[Any], limit: Limit) -> Step:
        """Raises VerifierFailure; if it is not `usable` then, it has to be killed."""
        self.usable = False
        reply = self._exchange(json.dumps(request).encode() + b"\n", limit)
        self.usable = "lost" not in reply
        if isinstance(reward := reply.get("reward"), float):
            return Step(reward, reply.get("observation"), reply.get("state", ""))
        raise VerifierFailure(f"{reply.get('error', 'gave no reward')}; {FIX}")

    def dismiss(self) -> None:
        """Tell it that the engine ends: it closes the environments that are left."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def kill(self) -> None:
        """End it, and all that its verifier started. May be called from any thread, and twice."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                if not self._process.stdin.closed:
                    os.write(self._process.stdin.fileno(), ALONE)
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LEAVE_S + CLOSE_S * self.has_close)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            kill_processes_of(self._folder)
            self._process.wait()
            with self._busy:  # no thread reads from the pipes any more
                os.close(self._requests)
                os.close(self._replies)
                self._process.stdout.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _exchange(self, request: bytes, limit: Limit) -> dict[str, Any]:
        """Send a request and wait for the reply. Raises VerifierFailure if none comes."""
        with self._busy:
            if self._ended:
                raise VerifierFailure("was stopped, because the engine ends")
            return _parsed(self._talk(memoryview(request), limit))

    def _talk(self, request: memoryview, limit: Limit) -> bytes:
        limit.start()
        reply, num_printed = b"", 0
        while not reply.endswith(b"\n"):
            ready = self._wait(bool(request), limit)
            if not ready:
                raise VerifierTimeout(
                    f"took longer than {limit.timeout_s:g} s and was stopped; raise "
                    f"data.verifier_timeout_s, or {FIX}"
                )
            if self._output in ready:
                num_printed += self._read_output()
                if num_printed > OUTPUT_BYTES:
                    raise VerifierFailure(f"printed more than {OUTPUT_BYTES} bytes; {FIX}")
            if self._requests in ready:
                request = self._send(request)
            if self._replies in ready:
                data = os.read(self._replies, READ_BYTES)
                if not data:
                    raise VerifierFailure(f"{self._how_it_ended()}; {FIX}")
                reply += data
                if len(reply) > REPLY_BYTES:
                    raise VerifierFailure(f"wrote to the pipe of its rewards; {FIX}")
        return reply

    def _wait(self, sends: bool, limit: Limit) -> set[int]:
        """The pipes that are ready; none once it is too late."""
        poller = select.poll()  # not select(): a busy engine holds more than 1,024 descriptors
        poller.register(self._replies, select.POLLIN)
        if self._output is not None:
            poller.register(self._output, select.POLLIN)
        if sends:
            poller.register(self._requests, select.POLLOUT)
        while (left_s := limit.left_s) > 0:
            if ready := poller.poll(min(left_s, POLL_S) * 1000):
                return {fd for fd, _ in ready}
        return set()

    def _read_output(self) -> int:
        assert self._output is not None
        text = os.read(self._output, 1 << 16)
        self._last_output = (self._last_output + text)[-LAST_OUTPUT_BYTES:]
        if not text:
            self._output = None  # every process that could print has ended
        return len(text)

    def _send(self, request: memoryview) -> memoryview:
        try:
            return request[os.write(self._requests, request) :]
        except BlockingIOError:
            return request
        except BrokenPipeError:
            return request[:0]  # the end of the replies will say why

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            return "closed the pipe of its rewards"
        if status > 128:
            status = 128 - status
        said = self._last_output.decode(errors="replace").split()
        return in_words(status) + (f", saying {' '.join(said)!r}" if said else "")


def _parsed(reply: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(reply)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise VerifierFailure(f"wrote to the pipe of its rewards; {FIX}")
    return parsed


def prompt_text(prompt: PromptPayload) -> str:
    return prompt.text or "\n\n".join(message["content"] for message in prompt.messages)
