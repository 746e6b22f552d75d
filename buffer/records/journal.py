"""Statistics per prompt, which outlive the buffer, and the run's own id.

One SQLite file in WAL mode, without a cache. Driven by `buffer.run_state`.
"""

from __future__ import annotations

import errno
import os
import secrets
import sqlite3
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from darts.sizing.lengths import LengthStats
from darts.sizing.rewards import RewardStats

Stats = TypeVar("Stats", LengthStats, RewardStats)
TABLES: dict[type, str] = {LengthStats: "lengths", RewardStats: "rewards"}
DECODERS: dict[type, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in TABLES
}


class Journal:
    """Length and reward statistics per prompt id, where "" stands for the pool of all prompts.

    Each call commits once, so a kill loses at most the call under way and never damages the file.
    (A power cut may lose the last statistics, which are not worth an fsync each. The run's id is
    durable.)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Several threads may use it, one at a time.
        self._db = sqlite3.connect(
            self.path, isolation_level=None, timeout=10, check_same_thread=False
        )
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            for table in TABLES.values():
                self._db.execute(
                    f"CREATE TABLE IF NOT EXISTS {table} (prompt_id TEXT PRIMARY KEY, stats BLOB "
                    "NOT NULL) WITHOUT ROWID"
                )
            self._db.execute("CREATE TABLE IF NOT EXISTS run (id TEXT NOT NULL)")
        except sqlite3.DatabaseError as error:
            self._db.close()
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise _no_room(self.path) from error
            raise ValueError(
                f"journal {self.path} cannot be used ({error}): move it away to start without "
                "statistics of prompts"
            ) from error

    def run_id(self) -> str:
        """A random name from the creation of this journal, which stays the same across resumes."""
        if self._db.execute("SELECT id FROM run").fetchone() is None:
            with self._whole():
                self._db.execute("INSERT INTO run VALUES (?)", (secrets.token_hex(8),))
                # Peers remember it, so it must survive a power cut. A checkpoint is synced.
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return self._db.execute("SELECT id FROM run").fetchone()[0]

    def remember_lengths(self, items: Iterable[tuple[str, LengthStats]]) -> None:
        """Keep the newest statistics of these prompts, in one commit."""
        self._remember("lengths", items)

    def remember_rewards(self, items: Iterable[tuple[str, RewardStats]]) -> None:
        """Keep the newest statistics of these prompts, in one commit."""
        self._remember("rewards", items)

    def _remember(self, table: str, items: Iterable[tuple[str, object]]) -> None:
        """Raises `OSError` if the disk is full; none of `items` is kept then."""
        rows = [(prompt_id, msgspec.msgpack.encode(stats)) for prompt_id, stats in items]
        if not rows:
            return
        with self._whole():
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", rows)
            self._db.execute("COMMIT")

    def lengths(self, prompt_ids: Iterable[str]) -> dict[str, LengthStats]:
        """The statistics of these prompts. Prompts never seen are left out."""
        return self._recall(LengthStats, prompt_ids)

    def rewards(self, prompt_ids: Iterable[str]) -> dict[str, RewardStats]:
        """The statistics of these prompts. Prompts without any are left out."""
        return self._recall(RewardStats, prompt_ids)

    def _recall(self, kind: type[Stats], prompt_ids: Iterable[str]) -> dict[str, Stats]:
        found: dict[str, Stats] = {}
        asked = list(prompt_ids)
        for start in range(0, len(asked), 500):  # SQLite limits the number of parameters
            some = asked[start : start + 500]
            marks = ",".join("?" * len(some))
            for prompt_id, stats in self._db.execute(
                f"SELECT prompt_id, stats FROM {TABLES[kind]} WHERE prompt_id IN ({marks})", some
            ):
                found[prompt_id] = self._decode(kind, stats)
        return found

    @contextmanager
    def _whole(self) -> Generator[None]:
        """A transaction that leaves nothing behind if it fails."""
        try:
            yield
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise _no_room(self.path) from error
            raise

    def _decode(self, kind: type[Stats], stats: bytes) -> Stats:
        try:
            return DECODERS[kind].decode(stats)
        except msgspec.MsgspecError as error:
            raise ValueError(
                f"journal {self.path} was written by another version ({error}): move it away to "
                "start without it"
            ) from error

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _no_room(path: Path) -> OSError:
    """The error of a full disk, as any other file raises it."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
