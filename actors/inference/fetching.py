"""Fetches one snapshot after another, by their differences if it can.

Owns the newest snapshot's bytes while `weights.deltas` is set. Never loads one into an engine.
Driven by `actors.inference.weights`, from one thread at a time.
"""

from __future__ import annotations

import sys

from buffer.wire.messages import SnapshotRef
from buffer.wire.snapshots import Data, SnapshotGoneError, fetch, fetch_changed
from configs.errors import one_line
from configs.schema import Config


class SnapshotReader:
    """Called like `buffer.wire.snapshots.fetch`, and raises like it."""

    def __init__(self, config: Config) -> None:
        self._keys, self._timeout_s = config.buffer.keys, config.buffer.peer_timeout_s
        self._deltas = config.weights.deltas
        self._digest, self._held = "", b""

    def __call__(self, ref: SnapshotRef) -> Data:
        """A delta that does not work gives way to the whole snapshot."""
        data: Data | None = None
        if ref.delta_bytes and ref.base_digest == self._digest:
            data = self._changed(ref)
        if data is None:
            data = fetch(ref, self._keys, self._timeout_s)
        if self._deltas:
            self._digest, self._held = ref.digest, data
        return data

    def _changed(self, ref: SnapshotRef) -> Data | None:
        try:
            return fetch_changed(ref, self._held, self._keys, self._timeout_s)
        except (SnapshotGoneError, ValueError) as error:
            print(
                f"actors: fetches the whole of snapshot {ref.version}, because its delta does not "
                f"work: {one_line(error)}",
                file=sys.stderr,
                flush=True,
            )
            return None
