"""Which peers are connected to the buffer, and when each was last heard. Driven by
`buffer.service`.
"""

from __future__ import annotations

from dataclasses import dataclass

ALIVE_S = 3.0


@dataclass(slots=True)
class Peer:
    """One connection: an engine's has an `engine_id`, a learner rank's a `rank`.

    incarnation: of an engine's process or a learner; an engine's is "" after the buffer's restart
    until it joins again.
    claim: the incarnation of another process that says hello in its name, and since when.
    """

    identity: bytes
    heard_s: float
    engine_id: str = ""
    incarnation: str = ""
    rank: int = -1
    claim: tuple[str, float] = ("", 0.0)

    @property
    def name(self) -> str:
        return f"engine {self.engine_id}" if self.engine_id else f"learner rank {self.rank}"

    def outlives(self, claimant: str, now_s: float) -> bool | None:
        """Whether this peer lives, although another process says hello in its name.

        None until that is known. Both have a heartbeat each second, and messages of a dead peer may
        still be on their way, so it must be heard, or be silent, for a while.
        """
        if self.claim[0] != claimant:
            self.claim = (claimant, now_s)
        if self.heard_s > self.claim[1] + ALIVE_S:
            return True
        return False if now_s > max(self.heard_s, self.claim[1]) + ALIVE_S else None


class Peers:
    """All peers by socket identity. An engine, and a rank, has one connection at a time."""

    def __init__(self) -> None:
        self.by_identity: dict[bytes, Peer] = {}
        self._engines: dict[str, Peer] = {}
        self._ranks: dict[int, Peer] = {}

    def add(self, peer: Peer) -> None:
        self.by_identity[peer.identity] = peer
        if peer.engine_id:
            self._engines[peer.engine_id] = peer
        else:
            self._ranks[peer.rank] = peer

    def remove(self, peer: Peer) -> None:
        if self.by_identity.pop(peer.identity, None) is None:
            return
        if peer.engine_id:
            del self._engines[peer.engine_id]
        else:
            del self._ranks[peer.rank]

    def heard(self, identity: bytes, now_s: float) -> Peer | None:
        peer = self.by_identity.get(identity)
        if peer is not None:
            peer.heard_s = now_s
        return peer

    def engine(self, engine_id: str) -> Peer | None:
        return self._engines.get(engine_id)

    def rank(self, rank: int) -> Peer | None:
        return self._ranks.get(rank)

    def ranks(self) -> list[Peer]:
        return [*self._ranks.values()]

    def engines(self) -> list[Peer]:
        return [*self._engines.values()]

    def silent_since(self, limit_s: float) -> list[Peer]:
        return [p for p in self.by_identity.values() if p.heard_s < limit_s]
