"""Spans of time, bytes and large numbers as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """In words: `0.013 s`, `3.2 s`, `41 s`, `5 min 3 s`, `1,234 h 5 min`."""
    if seconds < 0.1:
        return f"{max(0.0, seconds):.3f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def clock(seconds: float) -> str:
    """As on a clock, for what counts up or down: `2:05`, or `1:02:05`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def gigabytes(number: float) -> str:
    """Bytes, such as `1.5 GiB` or `320 MiB`."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.0f} MiB"


def short(number: int) -> str:
    """Such as 899 K or 3.75 B."""
    for power, letter in ((9, "B"), (6, "M"), (3, "K")):
        if number >= 0.9995 * 10**power:  # 999,600 are 1 M in three digits
            return f"{float(f'{number / 10**power:.3g}'):g} {letter}"
    return str(number)
