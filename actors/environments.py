"""Verifiers, which score responses. (`actors.prompts` turns prompts into tokens.)

Cheap verifiers that cannot hang run inline. The others (math_verify, reasoning_gym, a user's own)
run in worker processes, `python -m actors.environments VERIFIER`, which are killed when they take
too long: neither the engine nor its event loop ever waits for one, and a failure is an
`EnvironmentFailure`, never a reward of zero. Driven by the actors' worker. Never generates, and
never learns why a rollout was launched.

To add a verifier: a function (prompt, response, answer, metadata) -> float, and a line in INLINE or
in `load_verifier`.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, cast

from actors.prompts import tokenise
from buffer.data import tagged_sum
from buffer.wire.messages import PromptPayload
from configs.errors import one_line
from configs.extras import import_extra
from configs.schema import Config

NAMES = "auto, exact, numeric, math_verify, reasoning_gym, or module:function"
NUM_WORKERS = 4  # started when they are needed
START_TIMEOUT_S = 300.0  # importing a verifier's libraries on a busy machine

Verifier = Callable[[str, str, str, dict[str, Any]], float]


class EnvironmentFailure(Exception):
    """A response could not be scored. One line: verifier, prompt, cause, and how to fix it."""


class Environment(Protocol):
    """Turns prompts into tokens and responses into rewards."""

    keep_special_tokens: bool  # the response's text must show them

    def render(self, prompt: PromptPayload, tokenizer: Any) -> list[int]:
        """The prompt's token ids, for a `transformers` tokenizer."""
        ...

    async def score(self, prompt: PromptPayload, response_text: str) -> float:
        """A finite reward. Raises `EnvironmentFailure`; safe to cancel."""
        ...

    def close(self) -> None:
        """Ends the worker processes."""
        ...


def make_environment(config: Config) -> Environment:
    """The environment that `data.environment` names.

    ValueError when there is none, or its verifier cannot be imported.
    """
    return SingleTurn(config)


class SingleTurn:
    """One response to one prompt: it only scores."""

    def __init__(self, config: Config) -> None:
        self.data = config.data
        self.verifier = _verifier_name(config)
        self.keep_special_tokens = self.verifier == "tagged_sum"
        self._workers = (
            None
            if self.verifier in INLINE
            else WorkerPool(self.verifier, config.data.verifier_timeout_s)
        )

    def render(self, prompt: PromptPayload, tokenizer: Any) -> list[int]:
        """See `actors.prompts.tokenise`."""
        messages = prompt.messages or [{"role": "user", "content": prompt.text}]
        return tokenise(messages, tokenizer, self.data)

    async def score(self, prompt: PromptPayload, response_text: str) -> float:
        if self._workers is not None:
            return await self._workers.score(prompt, response_text)
        try:
            return _finite(
                INLINE[self.verifier](_prompt_text(prompt), response_text, prompt.answer, {})
            )
        except ValueError as error:
            raise EnvironmentFailure(
                _failure(
                    self.verifier,
                    prompt,
                    f"raised {one_line(error, with_type=True)}",
                    "mend the row",
                )
            ) from error

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()


def _verifier_name(config: Config) -> str:
    """`auto` follows the form of data.train; data.eval must then be of the same form."""
    if config.data.environment != "auto":
        name = config.data.environment
        if name not in (*INLINE, "math_verify", "reasoning_gym") and not re.fullmatch(
            r"[\w.]+:\w+", name
        ):
            raise ValueError(f"data.environment={name!r} is no known verifier; it must be {NAMES}")
        return name
    train, held_out = (
        _verifier_of_source(form)
        for form in (config.data.train, config.data.eval or config.data.train)
    )
    if train != held_out:
        raise ValueError(
            f"data.environment=auto would score data.train={config.data.train} with {train} "
            f"but data.eval={config.data.eval} with {held_out}; name one verifier for both with "
            "data.environment"
        )
    return train


def _verifier_of_source(form: str) -> str:
    return (
        form.partition(":")[0]
        if form.startswith(("tagged_sum", "reasoning_gym:"))
        else "numeric_or_exact"
    )


# Verifiers ----------------------------------------------------------------------------------------


def final_answer(text: str) -> str:
    r"""What a text says in the end: in its last <answer> tag, else in its last \boxed{}, else after
    its last ####, else all of it.
    """
    if tags := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL):
        return tags[-1].strip()
    if boxes := re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text):
        return boxes[-1].strip()
    return text.rpartition("####")[2].strip()


def exact(_prompt: str, response: str, answer: str, _metadata: dict[str, Any]) -> float:
    """1 iff the final answer is the reference, character by character (outer space aside)."""
    return float(final_answer(response) == final_answer(answer))


def numeric(_prompt: str, response: str, answer: str, _metadata: dict[str, Any]) -> float:
    """1 iff the last number of the final answer equals the reference to nine digits; `1,200` and
    `1200.0` are one number.
    """
    reference = _numbers(final_answer(answer))
    if not reference:
        raise ValueError(f"the reference answer {answer[:60]!r} holds no number")
    given = _numbers(final_answer(response))
    return float(
        bool(given) and math.isclose(given[-1], reference[-1], rel_tol=1e-9, abs_tol=1e-12)
    )


def numeric_or_exact(prompt: str, response: str, answer: str, metadata: dict[str, Any]) -> float:
    """Files' own verifier: numeric if the reference is a number and nothing else, else exact."""
    is_number = re.fullmatch(_NUMBER, final_answer(answer)) is not None
    return (numeric if is_number else exact)(prompt, response, answer, metadata)


def _tagged_sum(prompt: str, response: str, _answer: str, _metadata: dict[str, Any]) -> float:
    return tagged_sum.score(prompt, response)


_NUMBER = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"


def _numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(_NUMBER, text)]


INLINE: dict[str, Verifier] = {
    "tagged_sum": _tagged_sum,
    "exact": exact,
    "numeric": numeric,
    "numeric_or_exact": numeric_or_exact,
}


def load_verifier(name: str) -> Verifier:
    """The function behind a verifier that runs in a worker process.

    Raises any error of the import that it needs.
    """
    if name == "math_verify":
        math_verify = import_extra("math_verify", "data.environment=math_verify", "data")
        parse, verify = math_verify.parse, math_verify.verify

        def verify_math(
            _prompt: str, response: str, answer: str, _metadata: dict[str, Any]
        ) -> float:
            # Without the dollars the library would look for a number only; its own time limits
            # leave a response unproven: 0.
            reference = parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$")
            if not reference:
                raise ValueError(
                    f"the reference answer {answer[:60]!r} is no mathematical expression"
                )
            return float(verify(reference, parse(response)))

        return verify_math
    if name == "reasoning_gym":
        reasoning_gym = import_extra("reasoning_gym", "data.environment=reasoning_gym", "data")

        def score_entry(
            _prompt: str, response: str, _answer: str, metadata: dict[str, Any]
        ) -> float:
            score_answer = cast(
                Callable[..., float],
                reasoning_gym.get_score_answer_fn(metadata["metadata"]["source_dataset"]),
            )
            return float(score_answer(final_answer(response), metadata))

        return score_entry
    module, _, function = name.partition(":")
    verifier = getattr(importlib.import_module(module), function)
    if not callable(verifier):
        raise TypeError(f"{function} is a {type(verifier).__name__}, not a function")
    return cast(Verifier, verifier)


# Worker processes ---------------------------------------------------------------------------------


class WorkerPool:
    """Up to NUM_WORKERS processes, one response each at a time.

    Waiting for a free one does not count as the verifier's time.
    """

    def __init__(self, verifier: str, timeout_s: float) -> None:
        self.verifier, self.timeout_s = verifier, timeout_s
        self._threads = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="verifier")
        self._idle: queue.LifoQueue[WorkerProcess] = queue.LifoQueue()
        self._idle.put(
            WorkerProcess(verifier)
        )  # at once, so that a failing import is known at start

    async def score(self, prompt: PromptPayload, response: str) -> float:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, self._score, prompt, response
        )

    def _score(self, prompt: PromptPayload, response: str) -> float:
        mend = "mend the verifier, or choose another with data.environment"
        request = [
            _prompt_text(prompt),
            response,
            prompt.answer,
            json.loads(prompt.metadata or "{}"),
        ]
        try:
            worker = self._take()
        except ValueError as error:
            raise EnvironmentFailure(
                _failure(self.verifier, prompt, f"could not be started again ({error})", mend)
            ) from error
        try:
            reply = worker.call(request, self.timeout_s)
        except OSError as error:
            worker.kill()
            if isinstance(error, TimeoutError):
                what, mend = (
                    f"took longer than {self.timeout_s:g} s and was stopped",
                    f"raise data.verifier_timeout_s, or {mend}",
                )
            else:
                what = f"ended its process ({error})"
            raise EnvironmentFailure(_failure(self.verifier, prompt, what, mend)) from error
        self._idle.put(worker)
        if "error" in reply:
            raise EnvironmentFailure(
                _failure(self.verifier, prompt, f"raised {reply['error']}", mend)
            )
        return reply["reward"]

    def _take(self) -> WorkerProcess:
        """The worker used last, or a new one; there are never more than there are threads."""
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return WorkerProcess(self.verifier)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get_nowait().kill()


class WorkerProcess:
    """One verifier in its own process; JSON lines over pipes.

    ValueError when the verifier cannot be imported.
    """

    def __init__(self, verifier: str) -> None:
        here = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "actors.environments", verifier],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": here},
        )  # fmt: skip
        error = f"not imported within {START_TIMEOUT_S:g} s"
        try:
            error = self._receive(time.monotonic() + START_TIMEOUT_S).get("error", "")
        except OSError as died:  # TimeoutError is one
            error = str(died) or error
        if error:
            self.kill()
            raise ValueError(
                f"data.environment={verifier}: {error}; it must be {NAMES}, importable from "
                f"{os.getcwd()}"
            )

    def call(self, request: list[Any], timeout_s: float) -> dict[str, Any]:
        """The reply, {"reward"} or {"error"}. TimeoutError: not within `timeout_s`; another
        OSError: the process died.
        """
        deadline = time.monotonic() + timeout_s
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self._receive(deadline)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # data was still buffered for a dead process
                continue

    def _receive(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        poller = select.poll()  # not select(): a busy engine holds more than 1,024 descriptors
        poller.register(self._process.stdout, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            received = os.read(self._process.stdout.fileno(), 65536)
            if not received:
                raise ConnectionError(f"its process ended with exit status {self._process.wait()}")
            line += received
        return json.loads(line)


def serve(name: str) -> None:
    """The worker's side: says {} when ready, then answers each request; ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a verifier's prints must not look like a reply
    requests: queue.Queue[list[Any]] = queue.Queue()
    try:
        verifier = load_verifier(name)
    except (Exception, SystemExit) as error:
        print(
            json.dumps({"error": f"cannot be imported ({one_line(error, with_type=True)})"}),
            file=replies,
        )
        return

    def read() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os._exit(0)  # the parent is gone, even if the verifier is still busy

    threading.Thread(target=read, daemon=True).start()
    print("{}", file=replies)
    while True:
        request = requests.get()
        try:
            reply = {"reward": _finite(verifier(*request))}
        except (
            Exception,
            SystemExit,
        ) as error:  # reported to the parent, which raises it as an EnvironmentFailure
            reply = {"error": one_line(error, with_type=True)}
        print(json.dumps(reply), file=replies)


def _finite(reward: Any) -> float:
    if isinstance(reward, (str, bytes)) or reward is None or not math.isfinite(reward):
        raise ValueError(f"returned {reward!r}, which is not a finite number")
    return float(reward)


def _prompt_text(prompt: PromptPayload) -> str:
    return prompt.text or "\n\n".join(message["content"] for message in prompt.messages)


def _failure(verifier: str, prompt: PromptPayload, what: str, mend: str) -> str:
    return f"verifier {verifier} on prompt {prompt.prompt_id}: {what}; {mend}"


if __name__ == "__main__":
    serve(sys.argv[1])
