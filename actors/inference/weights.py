"""A snapshot's way into an engine: fetched while it decodes, verified, then swapped in.

Owns the snapshot's bytes between the network and the engine, in memory that vanishes with this
process. Never decides which policy is due. Driven by `actors.worker`.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from buffer.wire.messages import PolicyLoaded, SnapshotRef

Fetch = Callable[[SnapshotRef], bytes]  # blocks; raises like buffer.wire.snapshots.fetch
T = TypeVar("T")


class SwapFailed(Exception):
    """An engine could not load a policy's weights; it may now hold a mixture."""


class Swappable(Protocol):
    """The interface that an engine must offer: load the safetensors file `path` as policy
    `version`, and say how long decoding paused.
    """

    async def swap(self, path: str, version: int) -> float: ...


async def load(policy: SnapshotRef, fetch: Fetch, engine: Swappable) -> PolicyLoaded:
    """Fetch `policy` and swap it into `engine`.

    Raises the errors of `fetch`, with the engine untouched, and `SwapFailed`.

    Once the swap has begun it is carried through, even if the caller is cancelled.
    """
    started = time.monotonic()
    data = await in_thread(lambda: fetch(policy))
    fetch_s = time.monotonic() - started
    pause_s = await asyncio.shield(asyncio.ensure_future(swap(policy.version, data, engine)))
    return PolicyLoaded(version=policy.version, fetch_s=fetch_s, pause_s=pause_s)


async def swap(version: int, data: bytes, engine: Swappable) -> float:
    """Have `engine` load `data`, a snapshot's bytes, as policy `version`.

    Returns the seconds that decoding paused.
    """
    # An anonymous file, which vLLM's processes map: through their message queue the bytes would be
    # pickled and copied several times, and a real file could be left behind.
    handle = os.memfd_create(f"policy-{version}")
    try:
        await in_thread(lambda: _write(handle, data))
        return await engine.swap(f"/proc/{os.getpid()}/fd/{handle}", version)
    finally:
        os.close(handle)


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


async def in_thread(function: Callable[[], T]) -> T:
    """Like `asyncio.to_thread`, but on a daemon thread: a fetch that hangs must not hold up the end
    of the process.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if not future.done():  # cancelled meanwhile
            future.set_result(result) if error is None else future.set_exception(error)  # type: ignore[arg-type]

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
