"""Loads a snapshot into an engine: fetched while it decodes, verified, then swapped in.

Owns the snapshot's bytes between the network and the engine, in memory that is freed with the
processes that hold it. Never decides which policy is due. Driven by `actors.worker`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from actors.inference.sealed import SealedFile
from buffer.wire.messages import PolicyLoaded, SnapshotRef
from buffer.wire.snapshots import Data

# Blocks; raises like buffer.wire.snapshots.fetch.
Fetch = Callable[[SnapshotRef], Data | SealedFile]
T = TypeVar("T")


class SwapFailed(Exception):
    """An engine could not load a policy's weights, and may now hold a mixture of two."""


class Swappable(Protocol):
    """An engine that can load the safetensors file `path` as policy `version`.

    `swap` returns the length of the pause in decoding, in seconds.
    """

    async def swap(self, path: str, version: int) -> float: ...


async def load(policy: SnapshotRef, fetch: Fetch, engine: Swappable) -> PolicyLoaded:
    """Fetch `policy` and swap it into `engine`.

    A swap that has begun is completed, even if the caller is cancelled. Raises the errors of
    `fetch`, with the engine unchanged, and `SwapFailed`.
    """
    started = time.monotonic()
    data = await in_thread(lambda: fetch(policy))
    fetch_s = time.monotonic() - started
    pause_s = await asyncio.shield(asyncio.ensure_future(swap(policy.version, data, engine)))
    return PolicyLoaded(version=policy.version, fetch_s=fetch_s, pause_s=pause_s)


async def swap(version: int, data: Data | SealedFile, engine: Swappable) -> float:
    """Make `engine` load `data`, a snapshot's bytes, as policy `version`.

    Returns the length of the pause in decoding, in seconds.
    """
    # vLLM's processes map an anonymous file. Their message queue would pickle and copy the bytes
    # several times, and a real file could be left behind.
    file = data if isinstance(data, SealedFile) else await in_thread(lambda: SealedFile.of(data))
    return await engine.swap(file.path, version)


async def in_thread(function: Callable[[], T]) -> T:
    """Like `asyncio.to_thread`, but on a daemon thread.

    A fetch that hangs must not delay the end of the process.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if not future.done():  # it may have been cancelled
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

    def run() -> None:
        try:
            result, error = function(), None
        except BaseException as raised:
            result, error = None, raised
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            return  # the loop has closed, so no task waits any more

    threading.Thread(target=run, daemon=True, name="snapshot").start()
    return await future
