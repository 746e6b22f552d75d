"""Whether this machine has the ports, keys, disk, shared memory and clock that a run needs.

Never changes anything: a port is bound for a moment, to see whether it is free.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from buffer.wire.keys import ROLES, check_keys
from buffer.wire.transport import is_loopback, next_port
from configs.errors import one_line
from configs.memory.learner import saved_bytes
from configs.memory.shape import GIB, ModelShape, gib
from configs.schema import Config
from tools.checking.findings import Finding

SHARED_MEMORY = Path("/dev/shm")
SHARED_GIB = 1.0  # NCCL and vLLM exchange between processes through it; containers have 64 MiB
UNSYNCHRONISED = 5  # the kernel's TIME_ERROR


def check_machine(config: Config, shape: ModelShape | None) -> Iterator[Finding]:
    """Ports, keys, disk and clock, and shared memory."""
    yield _ports(config)
    yield _keys(config)
    yield _disk(config, shape)
    yield check_shared_memory(config, SHARED_MEMORY)
    yield check_clock(config, _clock_state)


def _ports(config: Config) -> Finding:
    addresses = (config.buffer.address, next_port(config.buffer.address))
    for address in addresses:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("" if host == "*" else host, int(port)))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and not is_loopback(address):
                return Finding("note", "ports", f"{address} is an address of another machine")
            result = f"buffer.address={config.buffer.address}: {address}: {one_line(error)}"
            return Finding("error", "ports", f"{result}; end the other run, or use another port")
    return Finding("ok", "ports", f"{' and '.join(addresses)} are free")


def _keys(config: Config) -> Finding:
    addresses = (config.buffer.address, config.weights.address)
    if not config.buffer.keys:
        if all(map(is_loopback, addresses)):
            return Finding("ok", "keys", "none needed on one machine: tools.launch makes its own")
        return Finding(
            "error",
            "keys",
            "buffer.keys is empty, and connections beyond this machine require keys; make them "
            "with `python -m tools.keys keys`, copy them as it says, and set buffer.keys=keys",
        )
    try:
        check_keys(config.buffer.keys, ROLES)
    except ValueError as error:
        return Finding("error", "keys", str(error))
    return Finding("ok", "keys", f"{config.buffer.keys} has those of every role")


def _disk(config: Config, shape: ModelShape | None) -> Finding:
    """Each checkpoint holds float32 weights and two moments of each."""
    folder = Path(config.run.dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if not os.access(existing, os.W_OK):
        return Finding("error", "disk", f"run.dir={config.run.dir}: {existing} is not writable")
    # One more than are kept, while a new one is written.
    number = config.learner.keep_checkpoints + 1
    checkpoints = number * saved_bytes(config) * shape.parameters if shape else 0
    log = config.buffer.keep_event_bytes
    rows = 3 * config.buffer.keep_row_bytes  # metrics, ledger, samples
    needed = checkpoints + log + rows
    result = (
        f"{gib(free)} are free for run.dir={config.run.dir}, and a run needs about {gib(needed)}: "
        f"{gib(checkpoints)} for {number} checkpoints, and in the course of a long run {gib(log)} "
        f"for the event log (buffer.keep_event_bytes) and {gib(rows)} for metrics, ledger and "
        "samples (three times buffer.keep_row_bytes)"
    )
    if free >= needed:
        return Finding("ok", "disk", result)
    advice = "; free some space, set run.dir to another disk, or lower learner.keep_checkpoints"
    return Finding("warning" if free > checkpoints else "error", "disk", result + advice)


def check_shared_memory(config: Config, folder: Path) -> Finding:
    """Only several GPUs that work together exchange data through it."""
    name = str(folder)
    if not folder.is_dir():
        return Finding("warning", name, "does not exist; mount it if several GPUs work together")
    size = shutil.disk_usage(folder).total
    several = config.actors.tensor_parallel > 1 or config.learner.num_ranks > 1
    if size >= SHARED_GIB * GIB or not several:
        return Finding("ok", name, gib(size))
    return Finding(
        "warning",
        name,
        f"{gib(size)}, and GPUs that work together exchange data through it; in a container, start "
        "it with --shm-size=8g or --ipc=host",
    )


def check_clock(config: Config, state: Callable[[], int]) -> Finding:
    """Runs measure time by clocks that never jump. Only the times in logs of several machines have
    to agree.
    """
    if state() != UNSYNCHRONISED:
        return Finding("ok", "clock", "synchronised with a time server")
    alone = is_loopback(config.buffer.address)
    result = "not synchronised with a time server"
    if alone:
        return Finding("ok", "clock", f"{result}, which one machine does not need")
    return Finding(
        "warning", "clock", f"{result}, so times in logs of several machines disagree; run chrony"
    )


def _clock_state() -> int:
    """The kernel's verdict. A call that changes nothing, and that every user may make."""
    unchanged = ctypes.create_string_buffer(512)  # a struct timex of zeros, with room to spare
    return ctypes.CDLL(None).adjtimex(unchanged)
