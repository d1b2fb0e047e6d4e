"""Parsing and printing of sizes and rates such as `80GB`, `1.5TiB` and `100Gbit/s`."""

import re

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?(b|bytes?|bit)(/s)?", re.IGNORECASE)


def parse_bytes(text: str, rate: bool = False) -> int:
    """Parse a number of bytes, or with `rate` a number of bytes per second, which may also be given in bits.

    Raises:
        ValueError: the text is no such quantity.
    """
    match = QUANTITY.fullmatch(text.strip())
    example = "a rate such as 25GB/s or 100Gbit/s" if rate else "a size such as 80GB or 640GiB"
    if not match:
        raise ValueError(f"use {example}")
    bits = match[3].lower() == "bit"
    if (bits and not rate) or (match[4] and not rate):
        raise ValueError(f"use {example}")
    value = int(float(match[1]) * UNITS[(match[2] or "").lower()] / (8 if bits else 1))
    if value < 1:
        raise ValueError("use more than nothing")
    return value


def gigabytes(count: float) -> str:
    """Format bytes in gigabytes of 10^9."""
    value = count / 1e9
    return f"{value:,.1f} GB" if value < 1000 else f"{value:,.0f} GB"


def duration(seconds: float) -> str:
    """Format seconds as seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
