"""Long series made short without losing what matters in them."""

import numpy as np

from gshardx.report.read import Floats, Series

LONGEST_WINDOW = 500
RECENT = 0.1
"""Share of a run that "now" means, from its end."""


def thin(series: Series, limit: int) -> Series:
    """At most ``limit`` (4 or more) points: the least and greatest of each stretch, the first and the last.

    A stretch without a finite value keeps one NaN, which a chart draws as a gap.
    """
    count = len(series.steps)
    if count <= limit:
        return series
    stretches = (limit - 2) // 2
    length = -(-count // stretches)
    values = np.full(stretches * length, np.nan)
    values[:count] = series.values
    rows = values.reshape(stretches, length)
    starts = np.arange(stretches) * length
    least = starts + np.where(np.isfinite(rows), rows, np.inf).argmin(1)
    greatest = starts + np.where(np.isfinite(rows), rows, -np.inf).argmax(1)
    kept = np.unique(np.concatenate([least, greatest, [0, count - 1]]))
    kept = kept[kept < count]
    return Series(series.steps[kept], series.values[kept])


def window(count: int) -> int:
    """Points that :func:`smooth` averages in a curve of so many."""
    return min(LONGEST_WINDOW, count // 50)


def smooth(series: Series, width: int) -> Series:
    """Centred means of ``width`` logged points, fewer at the ends; NaN where none of them is finite."""
    if width < 2:
        return series
    good = np.isfinite(series.values)
    ones = np.ones(min(width, len(series.values)))
    sums = np.convolve(np.where(good, series.values, 0.0), ones, "same")
    counts = np.round(np.convolve(good.astype(np.float64), ones, "same"))
    return Series(series.steps, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))


def recent(series: Series) -> float | None:
    """Mean of the last tenth of the finite values, of 5 at least."""
    values: Floats = series.finite.values
    if not len(values):
        return None
    return float(values[-max(5, int(len(values) * RECENT)) :].mean())
