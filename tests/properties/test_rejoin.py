"""An engine rejoins after any messages were lost: then it and the core have the same rollouts, and
no token is lost or held twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from buffer.records.trajectories import TrajectoryStore
from buffer.rejoin import reconcile
from buffer.wire import messages as msg
from tests.fakes import FIRST_TOKEN, PROMPT, FakeRollout

LENGTH = 12  # of every rollout


@dataclass
class Case:
    """A rollout before the engine rejoins. The engine has at least the tokens of the buffer."""

    of_core: str  # "running", "cancelled" or "over"
    listed: bool
    start: int  # length of the prefix
    num_held: int  # row tokens held by the buffer; 0: not even the prompt
    num_sampled: int  # tokens sampled by the engine
    has_ended: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    start = draw(st.integers(0, 3))
    num_sampled = draw(st.integers(start, LENGTH))
    least = len(PROMPT) + start if start else 0
    return Case(
        of_core=draw(st.sampled_from(["running", "cancelled", "over"])),
        listed=draw(st.booleans()),
        start=start,
        num_held=draw(
            st.sampled_from([least, *range(len(PROMPT) + start, len(PROMPT) + num_sampled + 1)])
        ),
        num_sampled=num_sampled,
        has_ended=draw(st.booleans()),
    )


def row(num_tokens: int) -> list[int]:
    return [*PROMPT, *range(FIRST_TOKEN, FIRST_TOKEN + LENGTH)][:num_tokens]


def store_of(numbered: dict[int, Case]) -> TrajectoryStore:
    store = TrajectoryStore(max_bytes=1 << 30, max_context=1 << 20)
    for i, case in numbered.items():
        if case.of_core == "running":
            store.open(i, 0, None)
            sent = FakeRollout(i, 0, LENGTH, [0] * case.num_sampled)
            take(store, sent.take(), case.num_held)
    return store


def take(store: TrajectoryStore, chunks: list[msg.Chunk], at_most: int = 1 << 30) -> None:
    for chunk in chunks:
        if chunk.offset + len(chunk.tokens) // 4 <= at_most:
            store.append(store.new_part(chunk))


def engine_of(numbered: dict[int, Case]) -> dict[int, FakeRollout]:
    engine: dict[int, FakeRollout] = {}
    for i, case in numbered.items():
        if case.listed:
            versions = [0] * (case.num_sampled - case.start)
            engine[i] = FakeRollout(i, case.start, LENGTH, versions, num_sent=1000)
            if case.has_ended:
                engine[i].answer = msg.Stopped(rollout_id=i, num_tokens=case.num_sampled)
    return engine


@given(st.lists(cases(), max_size=12))
def test_engine_and_core_agree_and_every_token_is_held_once(drawn: list[Case]) -> None:
    numbered = dict(enumerate(drawn))
    store, engine = store_of(numbered), engine_of(numbered)
    in_flight = {i: c.of_core == "running" for i, c in numbered.items() if c.of_core != "over"}
    had = {i: rollout.num_tokens for i, rollout in engine.items()}

    agreed = reconcile(in_flight, set(engine))
    for i in agreed.stopped:
        assert not in_flight.pop(i)
    for i in agreed.forget:
        del engine[i]
    for i in agreed.launch:
        assert i not in engine
        engine[i] = FakeRollout(i, len(store.prefix(i)) // 4, LENGTH)
    for i in agreed.resend:
        engine[i].num_sent = store.num_tokens(i)

    assert engine.keys() == in_flight.keys()
    assert set(agreed.cancel) == {i for i, runs in in_flight.items() if not runs}
    for i, runs in in_flight.items():
        if not runs:
            continue
        take(store, engine[i].take())
        num_tokens = store.num_sampled(i)
        assert num_tokens >= had.get(i, 0)
        if num_tokens or had.get(i) is not None:
            trajectory = store.trajectory(i, 1.0, False, [1.0])
            assert np.frombuffer(trajectory.tokens, "<i4").tolist() == row(3 + num_tokens)
        engine[i].versions += [1] * (LENGTH - engine[i].num_tokens)
        take(store, engine[i].take())
        trajectory = store.trajectory(i, 1.0, False, [1.0])
        assert np.frombuffer(trajectory.tokens, "<i4").tolist() == row(3 + LENGTH)
        assert sum(n for _, n in trajectory.versions) == LENGTH


@given(st.dictionaries(st.integers(0, 20), st.booleans()), st.sets(st.integers(0, 20)))
def test_every_rollout_is_in_one_list(in_flight: dict[int, bool], listed: set[int]) -> None:
    agreed = reconcile(in_flight, listed)
    lists = (agreed.resend, agreed.launch, agreed.cancel, agreed.stopped, agreed.forget)
    everything = [i for some in lists for i in some]
    assert sorted(everything) == sorted(in_flight.keys() | listed)
