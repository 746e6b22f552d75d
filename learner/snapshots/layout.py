"""The place of every tensor in a snapshot: a safetensors file in one buffer of fixed size.

All snapshots of a run have one layout, so that a tensor is gathered straight into its place. Never
reads a weight. Driven by `learner.snapshots.publish`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch

ALIGNMENT = 64  # of the first tensor; the others follow without gaps, larger elements first
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Layout:
    """The layout of tensors with the names, shapes and types of `tensors`, which may be on meta."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
        end, entries = 0, dict[str, object]()
        for name, tensor in self._tensors.items():
            begin, end = end, end + tensor.nbytes
            entries[name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
        size = 8 + len(header)
        header += b" " * (math.ceil(size / ALIGNMENT) * ALIGNMENT - size)
        self._head = len(header).to_bytes(8, "little") + header
        self.num_bytes = len(self._head) + end

    def buffer(self, pinned: bool) -> torch.Tensor:
        """A buffer for one snapshot, with its header. `pinned` memory takes copies from a GPU."""
        buffer = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=pinned)
        buffer[: len(self._head)] = torch.frombuffer(bytearray(self._head), dtype=torch.uint8)
        return buffer

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every tensor in `buffer`, by its name. Writing to it writes the snapshot."""
        views, begin = dict[str, torch.Tensor](), len(self._head)
        for name, tensor in self._tensors.items():
            end = begin + tensor.nbytes
            views[name] = buffer[begin:end].view(tensor.dtype).view(tensor.shape)
            begin = end
        return views
