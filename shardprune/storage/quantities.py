"""Sizes and times as they are printed."""


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
