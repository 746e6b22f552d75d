"""Bounds of servers, in bytes, messages, connections and descriptors. Decides nothing, since
`transport` and `connections` apply them.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

from buffer.wire.messages import Chunk, Progress

MESSAGE_BYTES = 1 << 20  # largest message to a server, one rollout's tokens aside
PART_BYTES = 1 << 20  # of a larger message to a peer, which travels in parts
PROGRESS_BYTES = 256 << 10  # of tokens in one `Progress`, unless a single chunk is larger
CHUNK_OVERHEAD_BYTES = 200

# Received from one peer within a window: far more than an engine sends, and far less than a flood.
WINDOW_S = 1.0
WINDOW_MESSAGES = 10_000
WINDOW_BYTES = 64 << 20

# Waiting for a peer that does not read, besides the largest message.
QUEUED_BYTES = 64 << 20
TOTAL_QUEUED_BYTES = 2 << 30

PEERS = 4096  # engines and learner ranks
ENGINE_TYPES = 64
CONNECTIONS = 8192
OPENING_S = 10.0  # for a connection to say hello
FAREWELL_S = 2.0  # for a dismissed peer to read the reason
# Kept for files, databases and child processes, and for connections that are accepted before the
# server notices (libzmq waits for it once 1000 of them are unnoticed).
RESERVED_DESCRIPTORS = 256
UNNOTICED_CONNECTIONS = 1000


def largest_message(max_context: int) -> int:
    """Size of the largest honest message to the buffer, in bytes: a whole rollout's tokens."""
    return MESSAGE_BYTES + 8 * max_context


def most_connections() -> int:
    """Connections that one server may hold beside the descriptors that are open and in reserve.

    Allows this process as many descriptors as its hard limit does. The buffer has two servers.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return CONNECTIONS
    share = (hard - len(os.listdir("/proc/self/fd")) - RESERVED_DESCRIPTORS) // 2
    # With few descriptors, a burst of strangers may take the reserve for a moment.
    return max(16, min(CONNECTIONS, max(share - UNNOTICED_CONNECTIONS, share // 2)))


def split(progress: Progress) -> Iterator[Progress]:
    """The same chunks in order, in messages that a server takes."""
    chunks: list[Chunk] = []
    num_bytes = 0
    for chunk in progress.chunks:
        size = len(chunk.tokens) + len(chunk.logprobs) + CHUNK_OVERHEAD_BYTES
        if chunks and num_bytes + size > PROGRESS_BYTES:
            yield Progress(chunks=chunks)
            chunks, num_bytes = [], 0
        chunks.append(chunk)
        num_bytes += size
    yield Progress(chunks=chunks)
