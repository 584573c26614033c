"""From values to places on a chart."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gshardx.report.read import Floats
from gshardx.report.text import tick

LOGARITHMIC_FROM = 50.0
"""Greatest over least value that makes a chart logarithmic where it may be."""


@dataclasses.dataclass(frozen=True)
class Axis:
    low: float
    high: float
    logarithmic: bool = False

    def place(self, values: Floats) -> Floats:
        """0 at the low end, 1 at the high end."""
        if self.logarithmic:
            values = np.log(np.maximum(values, self.low * 1e-3))
            low, high = math.log(self.low), math.log(self.high)
        else:
            low, high = self.low, self.high
        return (values - low) / (high - low)

    def ticks(self, wanted: int) -> list[tuple[float, str]]:
        """Places and labels of round values, ``wanted`` of them or up to twice as many."""
        if self.logarithmic and self.high / self.low >= LOGARITHMIC_FROM / 5:
            found = _decades(self.low, self.high, wanted)
            labels = [tick(value, value) for value in found]
        else:
            step = round_step((self.high - self.low) / wanted)
            first = math.ceil(self.low / step - 1e-9)
            found = [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
            labels = [tick(value, step) for value in found]
        return list(zip(self.place(np.array(found)).tolist(), labels, strict=True))


def fit(parts: Sequence[Floats], floor: float | None, may_be_logarithmic: bool) -> Axis | None:
    """An axis that holds every finite value, down to ``floor`` where there is one; None for no values."""
    values = np.concatenate([part[np.isfinite(part)] for part in parts]) if parts else np.zeros(0)
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    positive = values[values > 0]
    if may_be_logarithmic and len(positive) == len(values) and high / low > LOGARITHMIC_FROM:
        return Axis(low / 1.15, high * 1.15, logarithmic=True)
    if floor is not None:
        low = min(low, floor)
    room = (high - low) * 0.06 or max(abs(high) * 0.1, 1e-9)
    return Axis(low if low == floor else low - room, high + room)


def round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, at most ``step``."""
    size = 10.0 ** math.floor(math.log10(step) + 1e-9)
    return next(size * one for one in (5, 2, 1) if size * one <= step * (1 + 1e-6))


def _decades(low: float, high: float, wanted: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    few = last - first <= 3
    found = [m * 10.0**e for e in range(first, last + 1) for m in ((1, 2, 5) if few else (1,))]
    found = [value for value in found if low <= value <= high]
    return found[:: max(1, math.ceil(len(found) / (2 * wanted)))]
