"""Numbers as people read them, the same in the terminal and in the report."""

from __future__ import annotations


def format_count(value: float) -> str:
    """Three digits and a thousands letter: 124M, 1.24k, 950."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{_three_digits(value / factor)}{letter}"
    return _three_digits(value)


def format_bytes(value: float) -> str:
    """Decimal units, as disks are sold: 1.24 GB."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= 0.9995 * factor:
            return f"{_three_digits(value / factor)} {unit}"
    return f"{value:.0f} B"


def format_gib(size_bytes: float) -> str:
    """GiB, in which GPU memory comes, and smaller binary units for less than one: 38.4 GiB, 620 MiB."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size_bytes) >= 0.9995 * factor:
            return f"{_three_digits(size_bytes / factor)} {unit}"
    return f"{size_bytes:.0f} B"


def format_flops(flops: float) -> str:
    """FLOP/s with the prefix that fits: 138 TFLOP/s, 22.2 GFLOP/s."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if abs(flops) >= 0.9995 * factor:
            return f"{_three_digits(flops / factor)} {prefix}FLOP/s"
    return f"{_three_digits(flops / 1e6)} MFLOP/s"


def format_duration(seconds: float) -> str:
    """Two units at most: 0.42s, 12.3s, 4m 05s, 2h 13m, 5d 07h."""
    if seconds < 59.95:
        return f"{seconds:.2f}s" if seconds < 9.995 else f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h {minutes:02d}m"
    return f"{hours // 24}d {hours % 24:02d}h"


def format_seconds(seconds: float) -> str:
    """Three digits of a time that may be very short: 13.4 s, 2.65 ms; from 100 s on as a duration."""
    if seconds >= 99.95:
        return format_duration(seconds)
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= 0.9995 * factor:
            return f"{_three_digits(seconds / factor)} {unit}"
    return f"{_three_digits(seconds / 1e-6)} \N{MICRO SIGN}s"


def _three_digits(value: float) -> str:
    decimals = max(0, 2 - (len(str(int(abs(value)))) - 1))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
