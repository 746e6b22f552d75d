"""Numbers and durations in a few characters, for pages and for the terminal."""

from __future__ import annotations


def compact(value: float) -> str:
    """1234567 -> '1.23M', three significant digits."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """12.3 -> '12.3 s', 123 -> '2 min 03 s', 12345 -> '3 h 25 min'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {rest:02d} s"
        if minutes
        else f"{seconds:.1f} s"
    )
