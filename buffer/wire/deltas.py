"""The difference between two snapshots of one layout: the words that changed, bit for bit.

Owns the encoding. Compares bits, so that NaN and -0.0 survive, and knows nothing of tensors. Driven
by `buffer.wire.snapshots`, which checks the digest of each result.

    u8 width | u64 number of gap bytes | gaps | new words | bytes after the last whole word

A gap counts the equal words before a changed one. A byte of 255 adds 255 to the gap that follows.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

HEAD = struct.Struct("<BQ")
WORDS = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
LONG = 255  # a gap byte that is not the last one of its gap
STRIDE = 2**23  # words or gap bytes handled at once

Bytes = bytes | bytearray | memoryview
Places = npt.NDArray[np.int64]


def encode(
    old: Bytes, new: Bytes, width: int, go_on: Callable[[], None] = lambda: None
) -> bytes | None:
    """The delta from `old` to `new` in words of `width` bytes; None if `new` is not larger.

    `go_on` is called at short intervals, and may raise to end early.
    """
    if len(old) != len(new):
        return None
    whole = len(new) // width * width
    before = np.frombuffer(old, WORDS[width], whole // width)
    after = np.frombuffer(new, WORDS[width], whole // width)
    gaps, words, size, last = list[bytes](), list[bytes](), HEAD.size + len(new) - whole, -1
    for start in range(0, len(after), STRIDE):
        go_on()
        part = after[start : start + STRIDE]
        places = np.flatnonzero(before[start : start + STRIDE] != part)
        if not len(places):
            continue
        gaps.append(_gap_bytes(places + start, last))
        words.append(part[places].tobytes())
        last = start + int(places[-1])
        size += len(gaps[-1]) + len(words[-1])
        if size >= len(new):
            break
    if size >= len(new):
        return None
    return b"".join(
        [HEAD.pack(width, sum(map(len, gaps))), *gaps, *words, bytes(memoryview(new)[whole:])]
    )


def apply(delta: Bytes, target: bytearray) -> None:
    """Turn `target` from the old snapshot into the new one. Raises `ValueError` if it cannot fit.

    A delta that fits may still be damaged: check the digest of the result.
    """
    if len(delta) < HEAD.size:
        raise ValueError(f"a delta of {len(delta)} bytes has no head")
    width, num_gap_bytes = HEAD.unpack_from(delta)
    if width not in WORDS:
        raise ValueError(f"a delta has words of {width} bytes, and 2 or 4 are allowed")
    whole = len(target) // width * width
    end = HEAD.size + num_gap_bytes
    if end > len(delta):
        raise ValueError(f"a delta of {len(delta)} bytes claims {num_gap_bytes} bytes of gaps")
    gaps = np.frombuffer(delta, np.uint8, num_gap_bytes, HEAD.size)
    num_words = int(np.count_nonzero(gaps != LONG))
    if len(delta) != end + num_words * width + len(target) - whole:
        raise ValueError(f"a delta of {len(delta)} bytes does not have {num_words} words")
    words = np.frombuffer(delta, WORDS[width], num_words, end)
    into = np.frombuffer(target, WORDS[width], whole // width)
    done = 0
    for places in _places(gaps):
        if len(places) and places[-1] >= len(into):
            raise ValueError(f"a delta changes word {places[-1]} of {len(into)}")
        into[places] = words[done : done + len(places)]
        done += len(places)
    target[whole:] = delta[end + num_words * width :]


def _gap_bytes(places: Places, last: int) -> bytes:
    """The gaps before ascending `places`, of which the one before is `last`."""
    gaps = np.diff(places, prepend=last) - 1
    ends = np.cumsum(gaps // LONG + 1) - 1
    encoded = np.full(int(ends[-1]) + 1, LONG, np.uint8)
    encoded[ends] = gaps % LONG
    return encoded.tobytes()


def _places(gaps: npt.NDArray[np.uint8]) -> Iterator[Places]:
    """The places of changed words, in strides."""
    last = -1
    for start in range(0, len(gaps), STRIDE):
        part = gaps[start : start + STRIDE]
        ends = part != LONG
        reached = last + np.cumsum(part.astype(np.int64) + ends)
        yield reached[ends]
        last = int(reached[-1])
