"""Snapshots fetched by their differences are those that were published, whatever goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from actors.inference.fetching import SnapshotReader
from buffer.wire.messages import FetchSnapshot, SnapshotChunk, SnapshotGone, SnapshotRef
from buffer.wire.snapshots import SnapshotServer, fetch
from configs import cli
from learner.snapshots.publish import WeightPublisher
from tests.families import save_family
from tests.learner_cases import make_config, single_rank

LOOPBACK = "tcp://127.0.0.1:*"
Read = Callable[[SnapshotRef], memoryview]
SIZE = 3_000_000  # several chunks


class Server(SnapshotServer):
    """Records which requests are for a delta."""

    def __init__(self) -> None:
        self.asked: list[bool] = []
        super().__init__(LOOPBACK, delta_width=2)

    def _answer(self, request: FetchSnapshot) -> SnapshotChunk | SnapshotGone:
        self.asked.append(request.delta)
        return super()._answer(request)

    def damage(self, version: int, delta: bytes) -> None:
        with self._lock:
            self._kept[version] = self._kept[version]._replace(delta=delta)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def reader(deltas: bool = True) -> Read:
    """Like an engine alone on its node."""
    config = cli.load([f"weights.deltas={deltas}", "buffer.peer_timeout_s=5"])
    return lone(SnapshotReader(config))


def lone(reader: SnapshotReader) -> Read:
    def read(ref: SnapshotRef) -> memoryview:
        file = reader(ref)
        reader.close()
        return file.data

    return read


def snapshots(num: int, changed: int = 5000) -> list[bytes]:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, SIZE, np.uint8)
    found = [data.tobytes()]
    for _ in range(num - 1):
        data[rng.integers(0, SIZE, changed)] ^= 1
        found.append(data.tobytes())
    return found


def test_the_first_snapshot_comes_whole_and_later_ones_as_differences(server: Server) -> None:
    read = reader()
    for version, data in enumerate(snapshots(4)):
        ref = server.publish(version, data)
        server.asked.clear()
        assert read(ref) == data == fetch(ref)
        assert server.asked[0] is (version > 0)
        assert (0 < ref.delta_bytes < SIZE / 50) is (version > 0)


def test_a_reader_that_lacks_the_base_fetches_the_whole(server: Server) -> None:
    first, second, third = snapshots(3)
    skips, fresh = reader(), reader()
    assert skips(server.publish(0, first)) == first
    server.publish(1, second)
    ref = server.publish(2, third)
    assert ref.delta_bytes
    server.asked.clear()
    assert skips(ref) == fresh(ref) == third
    assert not any(server.asked)


@pytest.mark.parametrize("kind", ["empty", "cut", "another value", "junk"])
def test_a_damaged_delta_gives_way_to_the_whole(server: Server, kind: str) -> None:
    first, second, third = snapshots(3)
    read = reader()
    read(server.publish(0, first))
    ref = server.publish(1, second)
    delta = server._kept[1].delta
    server.damage(
        1,
        {
            "empty": b"",
            "cut": delta[:-100],
            "another value": delta[:-3] + bytes([delta[-3] ^ 1]) + delta[-2:],
            "junk": b"\xff" * len(delta),
        }[kind],
    )
    server.asked.clear()
    assert read(ref) == second
    assert server.asked[0] and not server.asked[-1]
    assert read(server.publish(2, third)) == third


def test_a_large_difference_is_not_offered(server: Server) -> None:
    first, second = snapshots(2, changed=SIZE)
    server.publish(0, first)
    assert server.publish(1, second).delta_bytes == 0
    assert server.publish(2, second + b"1").delta_bytes == 0  # nor one of another length


def test_a_reader_without_deltas_holds_nothing(server: Server) -> None:
    read = reader(deltas=False)
    for version, data in enumerate(snapshots(2)):
        assert read(server.publish(version, data)) == data
    assert not any(server.asked)


def test_bits_of_a_tied_model_in_bfloat16_arrive_as_they_are(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "qwen3", tie_word_embeddings=True)
    config = make_config(path, tmp_path / "run", weights__deltas=True, model__dtype="bfloat16")
    read = lone(SnapshotReader(config))

    def published(version: int) -> tuple[SnapshotRef, dict[str, torch.Tensor]]:
        ref = publisher.publish(state.model, version)
        assert ref is not None
        data = read(ref)
        assert data == fetch(ref)
        return ref, safetensors.torch.load(bytes(data))

    with single_rank(config) as state, WeightPublisher(config, rank=0) as publisher:
        name, parameter = next(iter(state.model.named_parameters()))
        local = parameter.detach().to_local()  # pyright: ignore[reportAttributeAccessIssue]
        local[0, 0], local[0, 1] = 0.0, float("nan")
        before = published(0)[1]
        assert "lm_head.weight" not in before
        local[0, 0], local[1, 1] = -0.0, 3.0
        local[1, 2] *= 1 + 2**-20  # below the resolution of bfloat16
        ref, after = published(1)
    assert 0 < ref.delta_bytes < 100
    changed = before[name].view(torch.int16) != after[name].view(torch.int16)
    assert changed.nonzero().tolist() == [[0, 0], [1, 1]]
    assert torch.signbit(after[name][0, 0]) and after[name][0, 1].isnan()
