"""Publication beside training: the published bytes, the waiting, and failures."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from buffer.wire.messages import SnapshotRef
from buffer.wire.snapshots import fetch
from learner.background import Dropped
from learner.publication import Publication
from learner.snapshots import publish
from learner.train import train_step
from tests.families import save_family
from tests.learner_cases import make_config, make_shards, make_trajectories, single_rank


class Session:
    """Records the calls of a publication, and announces only while `gate` is set."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.gate = threading.Event()
        self.announced: list[SnapshotRef] = []
        self.check: Any = None

    def watch(self, check: Any) -> None:
        self.check = check

    def count(self, version: int) -> None:
        self.calls.append(("count", version))

    def announce(self, policy: SnapshotRef, seconds: float, probe: bytes) -> None:
        assert self.gate.wait(20) and seconds > 0 and probe == b"probe"
        self.calls.append(("announce", policy.version))
        self.announced.append(policy)


def probe() -> bytes:
    return b"probe"


@pytest.mark.parametrize(
    ("family", "transport"),
    [("qwen3", "zmq"), ("qwen3", "file"), ("qwen3_moe", "zmq")],  # the last has fused experts
)
def test_a_version_has_the_weights_of_its_step_although_training_goes_on(
    tmp_path: Path, family: str, transport: str, free_port: Any
) -> None:
    """The thread hashes and writes only after the weights have changed in place."""
    path = save_family(tmp_path / "model", family)
    address = f"tcp://127.0.0.1:{free_port()}"
    config = make_config(
        path, tmp_path / "run", weights__transport=transport, weights__address=address
    )
    other = make_config(path, tmp_path / "other", weights__transport="file")
    shard = make_shards(make_trajectories(seed=0))[0]
    with (
        single_rank(config) as state,
        publish.WeightPublisher(config, rank=0) as publisher,
        publish.WeightPublisher(other, rank=0) as synchronous,
    ):
        references: list[bytes] = []
        newest: SnapshotRef | None = None
        for version in range(4):  # more than there are buffers
            finish = publisher.copy(state.model, version)
            expected = synchronous.publish(state.model, version)
            assert finish is not None and expected is not None
            references.append(fetch(expected))
            train_step(state, shard)
            reference = finish(lambda: None)
            assert reference.digest == expected.digest
            assert fetch(reference) == references[version]
            if newest is not None:  # the one before is kept, with its own weights
                assert fetch(newest) == references[version - 1] != references[version]
            newest = reference
    weights = safetensors.torch.load(references[0])
    original = safetensors.torch.load_file(path / "model.safetensors")
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in original.items())


def test_a_slow_publication_delays_the_next_one_and_not_training(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "qwen3")
    config = make_config(path, tmp_path / "run", weights__transport="file")
    session: Any = Session()
    with (
        single_rank(config) as state,
        publish.WeightPublisher(config, rank=0) as publisher,
        Publication(publisher, session) as publication,
    ):
        publication.publish(state.model, 0, probe)
        assert session.calls == [("count", 0)]  # and training may go on
        quick = publication.take_metrics()
        assert "publish/bytes" not in quick or quick["publish/seconds"] > 0
        threading.Timer(0.3, session.gate.set).start()
        publication.publish(state.model, 1, probe)
        assert session.calls[:2] == [("count", 0), ("announce", 0)]
        publication.wait()
        assert session.calls[2:] == [("count", 1), ("announce", 1)]
        waited = publication.take_metrics()
        assert waited["publish/wait_s"] > 0.2 and 0.5 < waited["publish/wait_frac"] <= 1
        assert 0 < waited["probe/wait_s"] < waited["publish/wait_s"]
        assert waited["publish/bytes"] == session.announced[1].num_bytes
        assert publication.take_metrics()["publish/wait_s"] == 0


def test_a_failed_publication_is_raised_wherever_the_learner_waits(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "qwen3")
    (tmp_path / "file").write_text("")
    config = make_config(
        path, tmp_path / "run", weights__transport="file", weights__dir=str(tmp_path / "file")
    )
    session: Any = Session()
    with (
        single_rank(config) as state,
        publish.WeightPublisher(config, rank=0) as publisher,
        Publication(publisher, session) as publication,
    ):
        publication.publish(state.model, 0, probe)
        with pytest.raises(OSError, match="file"):
            publication.publish(state.model, 1, probe)
        with pytest.raises(OSError, match="file"):
            session.check()
    assert session.calls == [("count", 0)]


def test_a_dropped_publication_leaves_no_version(tmp_path: Path) -> None:
    path = save_family(tmp_path / "model", "qwen3")
    config = make_config(path, tmp_path / "run", weights__transport="file")

    def go_on() -> None:
        raise Dropped

    with single_rank(config) as state, publish.WeightPublisher(config, rank=0) as publisher:
        first = publisher.publish(state.model, 0)
        assert first is not None
        finish = publisher.copy(state.model, 1)
        assert finish is not None
        with pytest.raises(Dropped):
            finish(go_on)
    assert list(Path(first.path).parent.glob("*.safetensors")) == [Path(first.path)]
    assert fetch(first)
