"""Bounds of servers, in bytes, messages, connections and descriptors. Decides nothing, since
`transport` and `connections` apply them.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import msgspec

from buffer.wire.messages import MAX_CHUNKS, Chunk, Progress

MESSAGE_BYTES = 160 << 10  # largest message to a server: the hello of an engine that joins again
PART_BYTES = 1 << 20  # of a larger message to a peer, which travels in parts
PROGRESS_BYTES = 32 << 10  # of one `Progress`
CHUNK_BYTES = 16 << 10  # of one chunk's tokens and log-probabilities
CHUNK_OVERHEAD_BYTES = 200

# Sent by a peer and not yet read by the server. A peer that has said hello sends no more than its
# credit (`credit`), and one that sends more is disconnected, as are strangers that send much.
CREDIT_BYTES = 64 << 10
UNREAD_BYTES = 96 << 10
OPENING_BYTES = MESSAGE_BYTES + (32 << 10)  # by a connection until its hello is read
STRANGERS_BYTES = 1 << 20  # by all these together, and by connections that have ended
GREETING_BYTES = 2 << 10  # by each of these in any case: handshake and a short hello
SUBSCRIBER_BYTES = 8 << 10  # by a listener, in all its time

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
    """The same tokens and then the same waits, in order, in messages that a server takes."""
    chunks: list[Chunk] = []
    num_bytes = 0
    for chunk in progress.chunks:
        for piece in _pieces(chunk):
            size = len(piece.tokens) + len(piece.logprobs) + CHUNK_OVERHEAD_BYTES
            if num_bytes + size > PROGRESS_BYTES:
                yield Progress(chunks=chunks)
                chunks, num_bytes = [], 0
            chunks.append(piece)
            num_bytes += size
    yield Progress(chunks=chunks, waits=progress.waits[:MAX_CHUNKS])
    for start in range(MAX_CHUNKS, len(progress.waits), MAX_CHUNKS):
        yield Progress(chunks=[], waits=progress.waits[start : start + MAX_CHUNKS])


def _pieces(chunk: Chunk) -> Iterator[Chunk]:
    """The same tokens in order, in chunks of bounded size."""
    num_bytes = CHUNK_BYTES // 2 if chunk.sampled else CHUNK_BYTES  # int32 beside float32, or alone
    if len(chunk.tokens) <= num_bytes:
        yield chunk
        return
    for start in range(0, len(chunk.tokens), num_bytes):
        yield msgspec.structs.replace(
            chunk,
            offset=chunk.offset + start // 4,
            tokens=chunk.tokens[start : start + num_bytes],
            logprobs=chunk.logprobs[start : start + num_bytes],
        )
