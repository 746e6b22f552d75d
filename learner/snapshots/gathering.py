"""Copies a sharded model's tensors, whole, to the memory of rank 0.

Each rank casts its shard first, so that ranks exchange no more bytes than are published, and sends
many tensors at once. If ranks hold several copies of the model, those of the first one send it.
Never changes a weight. Driven by `learner.snapshots.publish`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

BUCKET_BYTES = 2**26  # of one rank; a larger shard is sent by itself


@dataclass(frozen=True, slots=True)
class Piece:
    """This rank's rows of a tensor that is sharded by rows, cast. Later ranks may have fewer."""

    name: str
    rows: torch.Tensor
    shape: torch.Size  # of the whole tensor
    rows_per_rank: int
    group: dist.ProcessGroup  # of the ranks that hold its rows, of which rank 0 is the first

    @property
    def numel(self) -> int:
        """Elements of a full share, which is that of rank 0."""
        return self.rows_per_rank * math.prod(self.shape[1:])


@torch.no_grad()
def gather_into(
    tensors: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor] | None,
    cast: Callable[[str, torch.Tensor, int], torch.Tensor],
) -> None:
    """Copy every tensor into the target of its name. A collective.

    Rank 0 has all `targets`, other ranks None. `cast` turns a tensor, or this rank's rows of it,
    into the published type; it is also given their first row's number. A model that is not sharded
    needs no process group.
    """
    bucket: list[Piece] = []
    for name, tensor in tensors.items():
        group = _owners(name, tensor) if isinstance(tensor, DTensor) else None
        if not isinstance(tensor, DTensor) or group is None or group.size() == 1:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if targets is not None:
                targets[name].copy_(cast(name, local, 0), non_blocking=True)
            continue
        per_rank = math.ceil(tensor.shape[0] / group.size())
        rows = cast(name, tensor.to_local(), group.rank() * per_rank)
        piece = Piece(name, rows, tensor.shape, per_rank, group)
        if bucket and not _fits(bucket, piece):
            _send(bucket, targets)
            bucket = []
        bucket.append(piece)
    if bucket:
        _send(bucket, targets)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # for the copies to pinned memory


def _owners(name: str, tensor: DTensor) -> dist.ProcessGroup | None:
    """The ranks of the first copy of a sharded tensor, or None on a rank of another copy."""
    mesh, (*copies, by_rows) = tensor.device_mesh, tensor.placements
    assert by_rows == Shard(0) and copies in ([], [Replicate()]), f"{name} is not sharded by rows"
    first = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
    return mesh.get_group(mesh.ndim - 1) if first else None


def _fits(bucket: list[Piece], piece: Piece) -> bool:
    size = sum(held.numel for held in bucket) + piece.numel
    same_type = bucket[0].rows.dtype == piece.rows.dtype
    return same_type and size * piece.rows.itemsize <= BUCKET_BYTES


def _send(bucket: list[Piece], targets: Mapping[str, torch.Tensor] | None) -> None:
    first = bucket[0].rows
    mine = first.new_zeros(sum(piece.numel for piece in bucket))
    start = 0
    for piece in bucket:
        mine[start : start + piece.rows.numel()] = piece.rows.flatten()
        start += piece.numel
    group = bucket[0].group
    received = (
        [torch.empty_like(mine) for _ in range(group.size())] if targets is not None else None
    )
    dist.gather(mine, received, dst=0, group=group)
    if received is None or targets is None:
        return
    start = 0
    for piece in bucket:
        target = targets[piece.name].view(-1)
        for rank, sent in enumerate(received):
            part = target[rank * piece.numel : (rank + 1) * piece.numel]
            part.copy_(sent[start : start + part.numel()], non_blocking=True)
        start += piece.numel
