"""Length statistics per prompt, which outlive the buffer, and the run's own id.

One SQLite file in WAL mode, without a cache. Driven by `buffer.run_state`.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import msgspec

from darts.sizing.lengths import LengthStats


class Journal:
    """Length statistics per prompt id, where "" stands for the pool of all prompts.

    Each call commits once, so a kill loses at most the call under way and never damages the file.
    (A power cut may lose the last commits, since statistics are not worth an fsync each.)
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
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS lengths (prompt_id TEXT PRIMARY KEY, stats BLOB NOT "
                "NULL) WITHOUT ROWID"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS run (id TEXT NOT NULL)")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(
                f"journal {self.path} cannot be used ({error}): move it away to start without "
                "length statistics"
            ) from error

    def run_id(self) -> str:
        """A random name from the creation of this journal, which stays the same across resumes."""
        if self._db.execute("SELECT id FROM run").fetchone() is None:
            self._db.execute("INSERT INTO run VALUES (?)", (secrets.token_hex(8),))
        return self._db.execute("SELECT id FROM run").fetchone()[0]

    def remember_lengths(self, items: Iterable[tuple[str, LengthStats]]) -> None:
        """Keep the newest statistics of these prompts, in one commit."""
        rows = [(prompt_id, msgspec.msgpack.encode(stats)) for prompt_id, stats in items]
        if not rows:
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany("INSERT OR REPLACE INTO lengths VALUES (?, ?)", rows)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def lengths(self, prompt_ids: Iterable[str]) -> dict[str, LengthStats]:
        """The statistics of these prompts. Prompts never seen are left out."""
        found: dict[str, LengthStats] = {}
        asked = list(prompt_ids)
        for start in range(0, len(asked), 500):  # SQLite limits the number of parameters
            some = asked[start : start + 500]
            marks = ",".join("?" * len(some))
            for prompt_id, stats in self._db.execute(
                f"SELECT prompt_id, stats FROM lengths WHERE prompt_id IN ({marks})", some
            ):
                found[prompt_id] = self._decode(stats)
        return found

    def _decode(self, stats: bytes) -> LengthStats:
        try:
            return msgspec.msgpack.decode(stats, type=LengthStats)
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
