"""An engine's hello on another connection: the same process continues its rollouts, and a new
process replaces the old one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from buffer.service import Service
from buffer.wire import messages as msg
from configs import cli
from darts import events as ev
from tests.fakes import PROMPT, chunk


class Scene:
    """A service with one engine, `e`, which has four rollouts in flight. Keeps messages to it."""

    def __init__(self, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        self.service, self.run = service, service.run
        self.sent: list[tuple[bytes, msg.Message]] = []
        self.closed: set[bytes] = set()  # connections
        monkeypatch.setattr(self.run.router, "send", self._send)
        monkeypatch.setattr(self.run.router, "reply", self._send)
        service._recover()
        service._apply([ev.PolicyPublished(0)])
        self.hello(b"1", version=0)
        service._apply(self.run.due_events())
        service._apply(service.engines.flush())
        self.rollouts = sorted(self.run.core.rollouts)

    def _send(self, identity: bytes, message: msg.Message) -> bool:
        self.sent.append((identity, message))
        return identity in {b"1", b"2"} - self.closed

    def hello(
        self, identity: bytes, *rollouts: int, version: int = 0, incarnation: str = "a"
    ) -> msg.Welcome:
        """Over a new connection, which follows the end of the others. Returns the answer; all that
        follows in the same turn of the loop is sent after it.
        """
        self.closed = {b"1", b"2"} - {identity}
        return self.answer(identity, *rollouts, version=version, incarnation=incarnation)[0]

    def answer(
        self, identity: bytes, *rollouts: int, version: int, incarnation: str
    ) -> list[msg.Welcome]:
        self.sent.clear()
        hello = msg.EngineHello(
            engine_id="e",
            engine_type="t",
            slots=4,
            policy_version=version,
            pid=1,
            incarnation=incarnation,
            rollouts=list(rollouts),
        )
        self.service._receive(identity, hello)
        self.service._apply(self.service.engines.flush())
        return [m for to, m in self.sent if isinstance(m, msg.Welcome) and to == identity]

    def progress(self, rollout_id: int, *tokens: int) -> None:
        given = chunk(rollout_id, 0, PROMPT, None)
        sampled = chunk(rollout_id, len(PROMPT), list(tokens), 0)
        self.service._receive(b"1", msg.Progress(chunks=[given, sampled]))

    def launched(self) -> dict[int, int]:
        """Rollout id -> length of the prefix, for each launch that was sent."""
        launches = [m for _, m in self.sent if isinstance(m, msg.Launch)]
        return {r.rollout_id: len(r.prefix) // 4 for m in launches for r in m.rollouts}


@pytest.fixture
def scene(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    service = Service(
        cli.load(
            [
                f"run.dir={tmp_path}", "run.trackers=[]", "batch.groups=2", "darts.group_size=2",
                "redundancy.rule=none", "sampling.max_tokens=40", "eval.every=0",
                "darts.relative_limit=2",
                f"buffer.address=tcp://127.0.0.1:{free_port()}", "data.num_prompts=50",
            ]
        )
    )  # fmt: skip
    yield Scene(service, monkeypatch)
    service.run.close("")


def test_the_same_process_continues_from_the_held_tokens(scene: Scene) -> None:
    mine, other, *lost = scene.rollouts
    scene.progress(mine, 7, 8)
    welcome = scene.hello(b"2", mine, other)
    assert welcome.resend == {mine: 5, other: 0} and welcome.forget == []
    assert scene.launched() == dict.fromkeys(lost, 0)
    assert sorted(scene.run.core.rollouts) == scene.rollouts
    scene.service._receive(b"2", msg.Progress(chunks=[chunk(mine, 4, [8, 9], 0)]))
    assert scene.run.store.num_sampled(mine) == 3 == scene.run.core.rollouts[mine].tokens


def test_a_lost_launch_is_repeated_with_the_held_tokens(scene: Scene) -> None:
    mine = scene.rollouts[0]
    scene.progress(mine, 7, 8)
    scene.hello(b"2", *scene.rollouts[1:])
    assert scene.launched() == {mine: 2}


def test_a_hello_repeated_before_its_answer_changes_nothing(scene: Scene) -> None:
    first = scene.hello(b"2", scene.rollouts[0])
    again = scene.hello(b"2", scene.rollouts[0])
    assert first == again
    assert scene.launched() == dict.fromkeys(scene.rollouts[1:], 0)
    assert sorted(scene.run.core.rollouts) == scene.rollouts


def test_a_cancel_is_repeated_or_needs_no_answer(scene: Scene) -> None:
    listed, unlisted, *rest = scene.rollouts
    scene.service._apply([ev.RunEnded()])
    welcome = scene.hello(b"2", listed, *rest)
    assert welcome.resend == {} and welcome.forget == []
    cancelled = [i for _, m in scene.sent if isinstance(m, msg.Cancel) for i in m.rollout_ids]
    assert sorted(cancelled) == [listed, *rest]
    assert unlisted not in scene.run.core.rollouts and listed in scene.run.core.rollouts


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_rollout_that_has_to_end_early_is_told_again(scene: Scene, is_listed: bool) -> None:
    """Also one of which the engine has heard neither the launch nor that."""
    short, long, *rest = scene.rollouts
    scene.progress(short, 7)
    finished = msg.Finished(rollout_id=short, num_tokens=1, truncated=False, reward=1.0, text="")
    scene.service._receive(b"1", finished)
    scene.progress(long, 7, 8, 9)
    assert scene.run.core.rollouts[long].curtailed
    scene.hello(b"2", *([long] if is_listed else []), *rest)
    told = [m.rollout_ids for _, m in scene.sent if isinstance(m, msg.Curtail)]
    assert told == [[long]]
    order = [type(m) for to, m in scene.sent if to == b"2"]
    assert order.index(msg.Welcome) < order.index(msg.Curtail)
    assert is_listed or order.index(msg.Launch) < order.index(msg.Curtail)


def test_rollouts_that_are_over_are_forgotten(scene: Scene) -> None:
    mine = scene.rollouts[0]
    scene.progress(mine, 7)
    finished = msg.Finished(rollout_id=mine, num_tokens=1, truncated=False, reward=1.0, text="")
    scene.service._receive(b"1", finished)
    scene.sent.clear()
    scene.service._apply(scene.service.engines.flush())
    assert (b"1", msg.Settled(rollout_ids=[mine])) in scene.sent
    assert scene.hello(b"2", mine, 10**9).forget == [mine, 10**9]
    scene.service._receive(b"2", finished)  # repeated, which changes nothing
    assert scene.run.store.text(mine) == "" and "e" in scene.run.core.engines.by_id


def test_a_policy_loaded_while_the_link_was_down_is_known(scene: Scene) -> None:
    scene.service._apply([ev.PolicyPublished(1)])
    scene.hello(b"2", *scene.rollouts, version=1)
    assert scene.run.core.engines.by_id["e"].version == 1
    assert sorted(scene.run.core.rollouts) == scene.rollouts


@pytest.mark.parametrize(
    ("version", "incarnation"),
    [(0, "b"), (-1, "a"), (7, "a")],
    ids=["another process", "a process without a policy", "a policy that is not known"],
)
def test_rollouts_of_another_process_are_launched_again(
    scene: Scene, version: int, incarnation: str
) -> None:
    welcome = scene.hello(b"2", *scene.rollouts, version=version, incarnation=incarnation)
    assert welcome.forget == scene.rollouts and welcome.resend == {}
    assert not set(scene.run.core.rollouts) & set(scene.rollouts)
    told = [m.error for to, m in scene.sent if isinstance(m, msg.Shutdown) and to == b"1"]
    assert len(told) == (incarnation == "b") and all("taken the place" in e for e in told)


@pytest.mark.parametrize(("version", "goes_on"), [(0, True), (-1, False)])
def test_a_restarted_buffer_knows_a_process_by_its_policy(
    scene: Scene, version: int, goes_on: bool
) -> None:
    scene.run.peers.by_identity.clear()
    scene.service.engines.restore(0.0)
    welcome = scene.hello(b"2", *scene.rollouts, version=version, incarnation="any")
    assert (welcome.forget == []) == goes_on
    assert (set(scene.run.core.rollouts) >= set(scene.rollouts)) == goes_on


def test_a_heartbeat_of_an_unknown_connection_is_answered_by_hello_again(scene: Scene) -> None:
    scene.sent.clear()
    for message in (msg.Heartbeat(), msg.Stopped(rollout_id=0, num_tokens=0)):
        scene.service._receive(b"stranger", message)
    scene.service._receive(b"1", msg.Heartbeat())
    assert scene.sent == [(b"stranger", msg.HelloAgain())]


def test_a_process_that_lives_keeps_its_name(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one of that name is refused once the first was heard long enough after its hello."""
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    for _ in range(5):
        scene.service._receive(b"1", msg.Heartbeat())
        assert scene.answer(b"2", version=-1, incarnation="b") == []
        now_s += 1
    (refusal,) = [m for to, m in scene.sent if isinstance(m, msg.Shutdown) and to == b"2"]
    assert "names must be unique" in refusal.error
    assert sorted(scene.run.core.rollouts) == scene.rollouts


def test_a_process_that_is_silent_loses_its_name(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    scene.service._receive(b"1", msg.Heartbeat())
    assert scene.answer(b"2", version=-1, incarnation="b") == []
    now_s += 2
    assert scene.answer(b"2", version=-1, incarnation="b") == []
    now_s += 2
    assert len(scene.answer(b"2", version=-1, incarnation="b")) == 1
    assert not set(scene.rollouts) & set(scene.run.core.rollouts)
