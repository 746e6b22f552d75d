"""Which peers are connected to the buffer, and when each was last heard. Driven by
`buffer.service`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Peer:
    """One connection: an engine's has an `engine_id`, a learner rank's a `rank`.

    incarnation: of an engine's process, "" after the buffer's restart until it joins again.
    """

    identity: bytes
    heard_s: float
    engine_id: str = ""
    incarnation: str = ""
    rank: int = -1

    @property
    def name(self) -> str:
        return f"engine {self.engine_id}" if self.engine_id else f"learner rank {self.rank}"


@dataclass
class Peers:
    """All peers by socket identity."""

    by_identity: dict[bytes, Peer] = field(default_factory=dict[bytes, Peer])

    def add(self, peer: Peer) -> None:
        self.by_identity[peer.identity] = peer

    def remove(self, peer: Peer) -> None:
        self.by_identity.pop(peer.identity, None)

    def heard(self, identity: bytes, now_s: float) -> Peer | None:
        peer = self.by_identity.get(identity)
        if peer is not None:
            peer.heard_s = now_s
        return peer

    def engine(self, engine_id: str) -> Peer | None:
        return next((p for p in self.by_identity.values() if p.engine_id == engine_id), None)

    def rank(self, rank: int) -> Peer | None:
        return next((p for p in self.by_identity.values() if p.rank == rank), None)

    def ranks(self) -> list[Peer]:
        return [p for p in self.by_identity.values() if p.rank >= 0]

    def engines(self) -> list[Peer]:
        return [p for p in self.by_identity.values() if p.engine_id]

    def silent_since(self, limit_s: float) -> list[Peer]:
        return [p for p in self.by_identity.values() if p.heard_s < limit_s]
