"""Deltas of snapshots: any change comes back bit for bit, and a delta never exceeds the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.wire import deltas


@st.composite
def pairs(draw: st.DrawFn) -> tuple[bytes, bytes, int]:
    """An old snapshot, a new one of the same length, and a width of words."""
    width = draw(st.sampled_from([2, 4]))
    length = draw(st.integers(0, 5000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    old = rng.integers(0, 256, length, np.uint8)
    new = old.copy()
    if draw(st.booleans()):  # a few words far apart, or a share of all bytes
        places = rng.integers(0, max(1, length), draw(st.integers(0, 4)))
        new[places[places < length]] ^= 1
    else:
        share = draw(st.floats(0, 1))
        new = np.where(rng.random(length) < share, rng.integers(0, 256, length, np.uint8), old)
    return old.tobytes(), new.tobytes(), width


@settings(max_examples=300)
@given(pairs())
def test_a_delta_gives_the_new_bytes_and_is_smaller(pair: tuple[bytes, bytes, int]) -> None:
    old, new, width = pair
    delta = deltas.encode(old, new, width)
    if delta is None:
        whole = len(new) // width * width
        words = np.frombuffer(old, f"<u{width}", whole // width)
        changed = np.count_nonzero(words != np.frombuffer(new, f"<u{width}", whole // width))
        assert 9 + len(new) - whole + changed * (width + 1) + len(words) // 255 >= len(new)
        return
    assert len(delta) < len(new)
    target = bytearray(old)
    deltas.apply(delta, target)
    assert target == new


@pytest.mark.parametrize("stride", [1, 7, 256, 1000])
def test_strides_change_nothing(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    old = rng.integers(0, 2**16, 3000, np.uint16)
    new = old.copy()
    new[[0, 254, 255, 256, 511, 1023, 1800, 2999]] += 1
    whole = deltas.encode(old.tobytes(), new.tobytes(), 2)
    monkeypatch.setattr(deltas, "STRIDE", stride)
    delta = deltas.encode(old.tobytes(), new.tobytes(), 2)
    assert delta is not None and delta == whole
    target = bytearray(old.tobytes())
    deltas.apply(delta, target)
    assert target == new.tobytes()


def test_bits_count_and_not_values() -> None:
    """-0.0 equals 0.0, and NaN never equals itself, in floating point."""
    old = np.array([0.0, np.nan, np.nan, 1.0] + [2.0] * 40, np.float32)
    new = old.copy()
    new[0] = -0.0
    new.view(np.uint32)[1] ^= 1  # another NaN
    delta = deltas.encode(old.tobytes(), new.tobytes(), 4)
    assert delta is not None and len(delta) == 9 + 2 * (1 + 4)
    target = bytearray(old.tobytes())
    deltas.apply(delta, target)
    assert target == new.tobytes()


@settings(max_examples=300)
@given(pairs(), st.binary(max_size=40), st.integers(0, 200), st.booleans())
def test_a_damaged_delta_is_refused_or_gives_other_bytes_of_the_same_length(
    pair: tuple[bytes, bytes, int], junk: bytes, place: int, cut: bool
) -> None:
    old, new, width = pair
    delta = deltas.encode(old, new, width) or b""
    damaged = delta[:place] + junk + (b"" if cut else delta[place + len(junk) :])
    target = bytearray(old)
    try:
        deltas.apply(damaged, target)
    except ValueError:
        return
    assert len(target) == len(old)
