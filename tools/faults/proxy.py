"""A TCP proxy in front of the buffer that resets, delays, throttles and cuts its connections.

There is one per peer, on its own thread. It does not interpret the bytes that it carries.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Coroutine
from typing import Any, Self

BLOCK = 1 << 14
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


class Proxy:
    """Listens on `port` and connects to `target` on the loopback interface. A context manager."""

    def __init__(self, port: int, target: int) -> None:
        self.port, self._target = port, target
        self._delay_s = 0.0
        self._bytes_per_s = 0.0  # 0: no limit
        self._cut_until_s = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True, name=f"proxy {port}")
        self._listening = threading.Event()
        self._thread.start()
        self._listening.wait()

    def reset(self) -> None:
        """Reset every connection, both ways."""
        self._loop.call_soon_threadsafe(self._reset)

    def shape(self, delay_s: float = 0.0, bytes_per_s: float = 0.0) -> None:
        """Delay every block and limit the rate; 0 disables either."""
        self._delay_s, self._bytes_per_s = delay_s, bytes_per_s

    def cut(self, seconds: float) -> None:
        """Carry nothing for some seconds. Connections stay open, and later bytes wait."""
        self._cut_until_s = time.monotonic() + seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._accept, "127.0.0.1", self.port)
        )
        self._listening.set()
        self._loop.run_forever()
        server.close()
        self._reset()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()  # the buffer is down; its peer will try again
            return
        self._writers |= {writer, far_writer}
        self._spawn(self._carry(reader, far_writer))
        self._spawn(self._carry(far_reader, writer))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while block := await reader.read(BLOCK):
                while (left_s := self._cut_until_s - time.monotonic()) > 0:
                    await asyncio.sleep(left_s)
                rate = self._bytes_per_s
                await asyncio.sleep(self._delay_s + (len(block) / rate if rate else 0.0))
                writer.write(block)
                await writer.drain()
        except OSError:
            pass  # the connection was reset, by this proxy or by an end that died
        finally:
            self._writers.discard(writer)
            writer.close()

    def _reset(self) -> None:
        for writer in self._writers:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.transport.abort()
        self._writers.clear()
