"""Sizes as people write them, in messages and reports. Runs in every process."""

from __future__ import annotations


def size_text(nbytes: int) -> str:
    """Bytes, to a tenth of the unit where that is not zero: "100 B", "64 KiB", "1.2 GiB"."""
    size, units = float(nbytes), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    for larger in units:
        if size < 1024:
            break
        size, unit = size / 1024, larger
    number = f"{size:.0f}" if size >= 100 else f"{size:.1f}".removesuffix(".0")
    return f"{number} {unit}"
