"""Fetches one snapshot after another, by their differences if it can, and each once per node.

Owns the newest snapshot's bytes while `weights.deltas` is set. Never loads one into an engine.
Driven by `actors.inference.weights`, from one thread at a time.
"""

from __future__ import annotations

import math
import sys

from actors.inference.node_copies import HOLD_S, NodeCopies
from actors.inference.sealed import SealedFile
from buffer.wire.messages import SnapshotRef
from buffer.wire.snapshots import Data, SnapshotGoneError, fetch, fetch_changed
from configs.errors import one_line
from configs.schema import Config


class SnapshotReader:
    """Called like `buffer.wire.snapshots.fetch`, and raises like it.

    The file that it returns may be that of another engine on this node.
    """

    def __init__(self, config: Config) -> None:
        self._keys, self._timeout_s = config.buffer.keys, config.buffer.peer_timeout_s
        self._deltas = config.weights.deltas
        self._copies = NodeCopies(math.inf if self._deltas else HOLD_S)
        self._digest, self._held = "", memoryview(b"")

    def __call__(self, ref: SnapshotRef) -> SealedFile:
        file = self._copies.get(ref, lambda: self._fetch(ref))
        if self._deltas:
            self._digest, self._held = ref.digest, file.data
        return file

    def close(self) -> None:
        """Withdraw the newest snapshot from the other engines of this node."""
        self._copies.close()

    def _fetch(self, ref: SnapshotRef) -> Data:
        """A delta that does not work gives way to the whole snapshot."""
        data: Data | None = None
        if ref.delta_bytes and ref.base_digest == self._digest:
            data = self._changed(ref)
        return fetch(ref, self._keys, self._timeout_s) if data is None else data

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
