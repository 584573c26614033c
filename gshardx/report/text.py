"""Numbers and words as a page shows them."""

import math
import time
from html import escape

__all__ = ["count", "DASH", "duration", "escape", "figure", "moment", "percent", "short", "tick", "TIMES"]

DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
_LARGE = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float | None, digits: int = 3) -> str:
    """1234567 -> 1.23M, 0.01234 -> 0.0123."""
    if value is None or not math.isfinite(value):
        return DASH
    for size, letter in _LARGE:
        if abs(value) >= size * (1 - 0.5 * 10**-digits) and abs(value) < 1e15:
            return f"{float(f'{value / size:.{digits}g}'):g}{letter}"
    return exponent(f"{value:.{digits}g}")


def exponent(text: str) -> str:
    """1e-05 -> 1e-5."""
    head, found, tail = text.partition("e")
    return f"{head}e{int(tail)}" if found else text


def figure(value: float | None, decimals: int) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def percent(share: float | None) -> str:
    """Two digits at least below 10 %; never "100" for less than all."""
    if share is None or not math.isfinite(share):
        return DASH
    if share in (0, 1):
        return f"{share:.0%}"
    if 0.9995 <= share < 1:
        return "> 99.9%"
    return "< 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def duration(seconds: float) -> str:
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def moment(unix: float | None) -> str:
    """In UTC."""
    if unix is None or not 0 <= unix < 1e11:
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(unix))


def tick(value: float, step: float) -> str:
    """A label with as many decimals as the distance of the ticks asks for."""
    if abs(value) < step * 1e-6:
        return "0"
    if abs(value) < 1e-3 or step < 1e-4:
        return exponent(f"{value:.3g}")
    for size, letter in _LARGE:
        if abs(value) >= size and value / size == float(f"{value / size:.4g}"):
            return f"{value / size:g}{letter}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
