"""Trajectory payloads and the journal: exact bytes, exact contents, and no damage from peers or
kills.
"""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.records.journal import Journal
from buffer.records.trajectories import TrajectoryStore
from buffer.wire.messages import Chunk
from darts.events import ProtocolError
from darts.sizing.lengths import LengthStats

REPOSITORY = Path(__file__).parents[3]


def take(store: TrajectoryStore, chunk: Chunk, offset: int | None = None) -> None:
    """Append a chunk to the held tokens, or store it at `offset`, as the engine side does."""
    at = store.num_tokens(chunk.rollout_id) if offset is None else offset
    store.append(store.new_part(msgspec.structs.replace(chunk, offset=at)))


def given_chunk(rollout_id, tokens):
    return Chunk(
        rollout_id=rollout_id,
        offset=0,
        sampled=False,
        version=0,
        tokens=np.array(tokens, "<i4").tobytes(),
        logprobs=b"",
    )


def sampled_chunk(rollout_id, tokens, version=0, logprobs=None):
    logprobs = [-0.5] * len(tokens) if logprobs is None else logprobs
    return Chunk(
        rollout_id=rollout_id,
        offset=0,
        sampled=True,
        version=version,
        tokens=np.array(tokens, "<i4").tobytes(),
        logprobs=np.array(logprobs, "<f4").tobytes(),
    )


def finish(store, rollout_id):
    return store.trajectory(rollout_id, reward=1.0, truncated=False, advantage=0.5)


@pytest.fixture
def store():
    return TrajectoryStore(max_bytes=10_000, max_context=1 << 20)


def test_a_trajectory_holds_its_chunks_in_order(store):
    store.open(1, group_id=9, continues=None)
    take(store, given_chunk(1, [5, 6]))
    take(store, sampled_chunk(1, [7], version=3, logprobs=[-0.25]))
    take(store, sampled_chunk(1, [8, 9], version=3, logprobs=[-1.0, 0.0]))
    take(store, given_chunk(1, [10]))
    take(store, sampled_chunk(1, [11], version=3, logprobs=[-2.0]))
    take(store, sampled_chunk(1, [12], version=4, logprobs=[-4.0]))
    trajectory = finish(store, 1)
    assert np.frombuffer(trajectory.tokens, "<i4").tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert list(trajectory.sampled) == [0, 0, 1, 1, 1, 0, 1, 1]
    assert np.frombuffer(trajectory.actor_logprobs, "<f4").tolist() == [
        0,
        0,
        -0.25,
        -1,
        0,
        0,
        -2,
        -4,
    ]
    assert trajectory.versions == [(3, 4), (4, 1)]
    assert (trajectory.rollout_id, trajectory.group_id) == (1, 9)
    assert (trajectory.reward, trajectory.truncated, trajectory.advantage) == (
        1.0,
        False,
        0.5,
    )
    assert store.num_sampled(1) == 5
    assert np.frombuffer(store.prefix(1), "<i4").tolist() == [7, 8, 9, 11, 12]


def test_the_oldest_version_is_the_smallest_that_sampled(store):
    store.open(1, 0, None)
    take(store, given_chunk(1, [5]))
    with pytest.raises(ProtocolError, match="rollout 1 has no sampled token"):
        store.oldest_version(1)
    take(store, sampled_chunk(1, [6], version=4))
    take(store, sampled_chunk(1, [6], version=5))
    assert store.oldest_version(1) == 4


def test_a_continued_rollout_begins_with_the_tokens_decoded_before(store):
    store.open(1, 9, None)
    take(store, given_chunk(1, [5, 6]))
    take(store, sampled_chunk(1, [7, 8], version=1))
    store.open(2, 9, continues=1)
    store.discard(1)
    assert np.frombuffer(store.prefix(2), "<i4").tolist() == [7, 8]
    take(store, given_chunk(2, [5, 6]), offset=0)  # the new engine's prompt, which is held already
    take(store, sampled_chunk(2, [9], version=2))
    trajectory = finish(store, 2)
    assert np.frombuffer(trajectory.tokens, "<i4").tolist() == [5, 6, 7, 8, 9]
    assert trajectory.versions == [(1, 2), (2, 1)]
    assert store.oldest_version(2) == 1


def test_a_continued_rollout_with_another_prompt_is_refused(store):
    store.open(1, 9, None)
    take(store, given_chunk(1, [5]))
    store.open(2, 9, continues=1)
    with pytest.raises(ProtocolError, match=r"rollout 2.*same tokenizer"):
        take(store, given_chunk(2, [4, 5]), offset=0)


def test_repeated_tokens_are_taken_once_and_new_ones_behind_them(store):
    store.open(1, 9, None)
    take(store, given_chunk(1, [5]))
    take(store, sampled_chunk(1, [6, 7], version=2))
    take(store, sampled_chunk(1, [7, 8], version=2), offset=2)
    take(store, sampled_chunk(1, [6, 7, 8], version=2), offset=1)
    trajectory = finish(store, 1)
    assert np.frombuffer(trajectory.tokens, "<i4").tolist() == [5, 6, 7, 8]
    assert trajectory.versions == [(2, 3)]


@pytest.mark.parametrize(
    ("chunk", "offset"),
    [
        (sampled_chunk(1, [6, 9], version=2), 1),
        (sampled_chunk(1, [6, 7], version=3), 1),
        (sampled_chunk(1, [6, 7], version=2, logprobs=[-0.5, -0.25]), 1),
        (given_chunk(1, [6]), 1),
        (sampled_chunk(1, [5, 6], version=2), 0),
        (sampled_chunk(1, [8], version=2), 4),
        (sampled_chunk(1, [8], version=2), -1),
    ],
)
def test_gaps_and_contradictions_are_refused_and_change_nothing(store, chunk, offset):
    store.open(1, 9, None)
    take(store, given_chunk(1, [5]))
    take(store, sampled_chunk(1, [6, 7], version=2))
    with pytest.raises(ProtocolError, match="rollout 1"):
        take(store, chunk, offset)
    assert np.frombuffer(finish(store, 1).tokens, "<i4").tolist() == [5, 6, 7]


@pytest.mark.parametrize("lost", ["silent", "discarded"])
def test_a_rollout_that_continues_nothing_starts_empty(store, lost):
    store.open(1, 9, None)
    if lost == "discarded":
        take(store, given_chunk(1, [5]))
        store.discard(1)
    store.open(2, 9, continues=1)
    take(store, given_chunk(2, [5]))
    take(store, sampled_chunk(2, [7]))
    assert np.frombuffer(finish(store, 2).tokens, "<i4").tolist() == [5, 7]


def test_a_lost_rollout_and_its_continuation_share_no_data(store):
    store.open(1, 9, None)
    take(store, sampled_chunk(1, [7]))
    store.open(2, 9, continues=1)
    take(store, sampled_chunk(2, [8]))
    assert (store.num_sampled(1), store.num_sampled(2)) == (1, 2)


@pytest.mark.parametrize(
    ("chunk", "complaint"),
    [
        (
            Chunk(
                rollout_id=1,
                offset=0,
                sampled=True,
                version=0,
                tokens=b"\0" * 6,
                logprobs=b"\0" * 6,
            ),
            "multiple of 4",
        ),
        (
            Chunk(
                rollout_id=1,
                offset=0,
                sampled=True,
                version=0,
                tokens=b"\0" * 8,
                logprobs=b"\0" * 4,
            ),
            "one float32 per sampled token",
        ),
        (
            Chunk(rollout_id=1, offset=0, sampled=True, version=0, tokens=b"\0" * 8, logprobs=b""),
            "one float32 per sampled token",
        ),
        (
            Chunk(
                rollout_id=1,
                offset=0,
                sampled=False,
                version=0,
                tokens=b"\0" * 8,
                logprobs=b"\0" * 8,
            ),
            "expected none",
        ),
        (sampled_chunk(1, [5], version=-1), "version is -1"),
        (sampled_chunk(1, [5, 6], logprobs=[-1.0, float("nan")]), "not finite"),
        (sampled_chunk(1, [5], logprobs=[float("-inf")]), "not finite"),
        (sampled_chunk(1, [-5]), "an id that is negative"),
        (sampled_chunk(1, [100]), "not below the vocabulary's size, 100"),
        (sampled_chunk(1, [5] * 16), "max_context=16 is the limit"),
    ],
)
def test_a_malformed_chunk_is_refused_and_changes_nothing(store, chunk, complaint):
    store.vocab_size, store.max_context = 100, 16
    store.open(1, 0, None)
    take(store, sampled_chunk(1, [5]))
    with pytest.raises(ProtocolError, match=f"rollout 1.*{complaint}"):
        take(store, chunk)
    assert store.bytes_held == 8
    assert np.frombuffer(finish(store, 1).tokens, "<i4").tolist() == [5]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (sampled_chunk(2, [5], logprobs=[float("nan")]), "not finite"),
        (sampled_chunk(2, [100]), "vocabulary's size, 100"),
    ],
)
def test_a_wrong_value_names_its_rollout_and_no_chunk_of_its_message_is_stored(
    store, wrong, complaint
):
    store.vocab_size = 100
    for rollout_id in (1, 2, 3):
        store.open(rollout_id, 0, None)
    with pytest.raises(ProtocolError, match=f"rollout 2: .*{complaint}"):
        store.append(sampled_chunk(1, [5]), wrong, sampled_chunk(3, [6]))
    assert store.bytes_held == 0


def test_a_rollout_that_is_not_held_is_named(store):
    for ask in (
        store.num_sampled,
        store.prefix,
        store.oldest_version,
        lambda id: finish(store, id),
        lambda id: take(store, given_chunk(id, [1])),
    ):
        with pytest.raises(ProtocolError, match="rollout 42 is not held"):
            ask(42)
    store.discard(42)
    assert 42 not in store


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "continue", "given", "sampled", "discard"]),
        st.integers(0, 5),
        st.integers(0, 4),
    ),
    max_size=80,
)


@given(OPERATIONS)
def test_bytes_held_is_exact_after_any_sequence_of_calls(operations):
    store, next_id, ids = TrajectoryStore(max_bytes=1, max_context=1 << 20), 0, []
    for what, which, size in operations:
        target = ids[which % len(ids)] if ids else None
        if what == "open" or (what == "continue" and target is not None):
            store.open(next_id, 0, target if what == "continue" else None)
            ids.append(next_id)
            next_id += 1
        elif target is not None and what == "discard":
            store.discard(target)
            ids.remove(target)
        elif target is not None:
            chunk = (
                given_chunk(target, [1]) if what == "given" else sampled_chunk(target, [2] * size)
            )
            take(store, chunk)
        held = sum(
            len(finish(store, id).tokens) + len(finish(store, id).actor_logprobs) for id in ids
        )
        assert store.bytes_held == held
        assert store.full == (held >= 1)
        assert len(store) == len(ids)
    for id in ids:
        store.discard(id)
    assert store.bytes_held == 0


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=30
    )
)
def test_a_trajectory_is_consistent_with_itself(chunks):
    store = TrajectoryStore(max_bytes=1, max_context=1 << 20)
    store.open(1, 0, None)
    for sampled, version, size in chunks:
        take(
            store,
            sampled_chunk(1, range(size), version) if sampled else given_chunk(1, range(size)),
        )
    trajectory = finish(store, 1)
    expected = [version for sampled, version, size in chunks if sampled for _ in range(size)]
    assert [
        version for version, num_tokens in trajectory.versions for _ in range(num_tokens)
    ] == expected
    assert all(
        left[0] != right[0]
        for left, right in zip(trajectory.versions, trajectory.versions[1:], strict=False)
    )
    assert sum(trajectory.sampled) == len(expected) == store.num_sampled(1)
    assert len(trajectory.sampled) * 4 == len(trajectory.tokens) == len(trajectory.actor_logprobs)


# The journal -------------------------------------------------------------------------------------


def stats(mean_log):
    return LengthStats(weight=2.0, mean_log=mean_log, var_log=0.5)


def test_lengths_are_remembered_across_restarts(tmp_path):
    with Journal(tmp_path / "run" / "journal.sqlite") as journal:
        journal.remember_lengths([("", stats(0.0)), ("a", stats(1.0)), ("b", stats(2.0))])
        journal.remember_lengths([("a", stats(3.0))])
        journal.remember_lengths([])
    with Journal(tmp_path / "run" / "journal.sqlite") as journal:
        assert journal.lengths(["a", "b", "", "never seen"]) == {
            "": stats(0.0),
            "a": stats(3.0),
            "b": stats(2.0),
        }
        assert journal.lengths([]) == {}


def test_any_number_of_prompts_can_be_looked_up(tmp_path):
    items = {f"prompt {number}": stats(float(number)) for number in range(1234)}
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.remember_lengths(items.items())
        assert journal.lengths(iter(items)) == items


def test_a_failed_call_leaves_nothing_behind(tmp_path):
    with Journal(tmp_path / "journal.sqlite") as journal:
        with pytest.raises(sqlite3.Error):
            journal.remember_lengths([("a", stats(1.0)), (["no id"], stats(2.0))])
        journal.remember_lengths([("b", stats(2.0))])
        assert journal.lengths(["a", "b"]) == {"b": stats(2.0)}


def test_a_kill_loses_no_committed_entry(tmp_path):
    path = tmp_path / "journal.sqlite"
    program = (
        "import sys\nfrom buffer.records.journal import Journal\n"
        "from darts.sizing.lengths import LengthStats\n"
        "journal, number = Journal(sys.argv[1]), 0\n"
        "while True:\n"
        "    journal.remember_lengths([(f'a{number}', LengthStats(1.0, number, 1.0)), "
        "(f'b{number}', LengthStats(1.0, number, 1.0))])\n"
        "    print(number, flush=True)\n    number += 1\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 200:
            os.kill(process.pid, signal.SIGKILL)
            break
    committed = max([200, *(int(line) for line in process.stdout.read().splitlines() if line)])
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    with Journal(path) as journal:
        found = journal.lengths(
            [f"{half}{number}" for number in range(committed + 2) for half in "ab"]
        )
    assert all(
        found[f"a{number}"].mean_log == found[f"b{number}"].mean_log == number
        for number in range(committed + 1)
    )
    assert (f"a{committed + 1}" in found) == (f"b{committed + 1}" in found)


def test_a_file_that_is_not_a_journal_is_refused(tmp_path):
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"not a database, by any measure " * 100)
    with pytest.raises(ValueError, match=r"journal\.sqlite cannot be used"):
        Journal(path)


def test_a_journal_of_another_version_is_refused(tmp_path):
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.remember_lengths([("a", stats(1.0))])
    with sqlite3.connect(path) as database:
        database.execute("UPDATE lengths SET stats = x'80'")
    database.close()
    with Journal(path) as journal, pytest.raises(ValueError, match="another version"):
        journal.lengths(["a"])


def test_a_full_disk_keeps_the_journal_as_it_was(tmp_path: Path) -> None:
    path, kept = tmp_path / "journal.sqlite", LengthStats(1.0, 2.0, 3.0)
    with Journal(path) as journal:
        journal.remember_lengths([("a", kept)])
        pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
        journal._db.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(OSError, match="No space left") as caught:
            journal.remember_lengths([("a" * 9000, kept), ("b", kept)])
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
        assert journal.lengths(["a", "b"]) == {"a": kept}
        journal._db.execute("PRAGMA max_page_count=1000000")
        journal.remember_lengths([("b", kept)])
        assert set(journal.lengths(["a", "b"])) == {"a", "b"}
