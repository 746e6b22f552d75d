"""Two real engines of a real pool load a version that crossed the network once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from buffer.wire.messages import (
    SPEAKERS,
    EngineHello,
    FetchSnapshot,
    Heartbeat,
    PolicyLoaded,
    Probed,
    Shutdown,
    SnapshotChunk,
    SnapshotGone,
    Welcome,
)
from buffer.wire.snapshots import SnapshotServer
from buffer.wire.transport import Router
from tools.warm_start import warm_start

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
MODEL = Path("models/tiny-reasoner")
ENGINES = 2


class Server(SnapshotServer):
    """Records the parts that were asked for. An engine asks again for one that is late."""

    def __init__(self) -> None:
        self.by_peer: set[bytes] = set()
        super().__init__("tcp://127.0.0.1:*")

    def _serve(self) -> None:
        while not self._closing.is_set():
            for peer, request in self._router.receive(0.1):
                assert isinstance(request, FetchSnapshot)
                answer: SnapshotChunk | SnapshotGone = self._answer(request)
                self._router.send(peer, answer)
                self.by_peer.add(peer)


def test_two_engines_of_a_pool_fetch_once(tmp_path: Path, free_port: Callable[[], int]) -> None:
    warm_start(MODEL)
    weights = (MODEL / "model.safetensors").read_bytes()
    command = [sys.executable, "-m", "actors", "--config", "configs/demo.yaml"]
    address = f"tcp://127.0.0.1:{free_port()}"
    command += [f"buffer.address={address}", f"run.dir={tmp_path}"]
    command += [f"actors.num_engines={ENGINES}", "actors.slots=8"]
    with Server() as server, Router(address, SPEAKERS) as router:
        ref = server.publish(0, weights)
        pool = subprocess.Popen(command)
        try:
            loaded, probed = set[bytes](), dict[bytes, bytes]()
            peers, beat_s = set[bytes](), 0.0
            deadline = time.monotonic() + 300
            while len(loaded) < ENGINES or len(probed) < ENGINES:
                assert pool.poll() is None and time.monotonic() < deadline
                for peer, message in router.receive(0.1):
                    if isinstance(message, EngineHello):
                        peers.add(peer)
                        router.send(peer, Welcome(policy=ref))
                    elif isinstance(message, PolicyLoaded):
                        loaded.add(peer)
                    elif isinstance(message, Probed) and message.version == ref.version:
                        probed[peer] = message.logprobs
                if time.monotonic() >= beat_s:
                    beat_s = time.monotonic() + 1
                    for peer in peers:
                        router.send(peer, Heartbeat())
            for peer in peers:
                router.send(peer, Shutdown(error=""))
            while pool.poll() is None:
                assert time.monotonic() < deadline
                router.receive(0.1)
            assert pool.returncode == 0
        finally:
            pool.terminate()  # which it passes on
            pool.wait(60)
    assert len(server.by_peer) == 1
    assert len(set(probed.values())) == 1  # both hold the same weights
