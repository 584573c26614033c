"""What differs between two saved steps, number by number."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gshardx.checkpoint.arrays import pieces
from gshardx.checkpoint.manifest import array_of
from gshardx.checkpoint.places import Saved

INTEGERS = "biu"
"""NumPy's kinds that are compared as integers; all others, bfloat16 too, fit into float64."""


class Gap(NamedTuple):
    """entries: how many of an array's differ; largest: the largest difference; relative: over the largest absolute
    value of the first."""

    entries: int
    largest: float
    relative: float


class Difference(NamedTuple):
    """``about`` says what; gap: None where the two can't be laid side by side."""

    array: str
    about: str
    gap: Gap | None


def differences(first: Saved, second: Saved, item: str | None) -> Iterator[Difference]:
    """Of all arrays, or of an item's. Equal files are not read. NaN equals NaN."""
    one, other = first.manifest.arrays, second.manifest.arrays
    files, others = first.manifest.files, second.manifest.files
    changed = {array_of(file) for file in files.keys() | others.keys() if files.get(file) != others.get(file)}
    for name in sorted(one.keys() | other.keys()):
        if item is not None and not name.startswith(f"{item}/"):
            continue
        if name not in one or name not in other:
            yield Difference(name, f"only in {(first if name in one else second).folder}", None)
        elif one[name][0] != other[name][0]:
            yield Difference(name, f"{one[name][0]} and {other[name][0]}", None)
        elif one[name][1] != other[name][1]:
            yield Difference(name, f"{one[name][1]} and {other[name][1]}", _gap(first, second, name))
        elif name in changed and (gap := _gap(first, second, name)).entries:
            yield Difference(name, "", gap)


def _gap(first: Saved, second: Saved, name: str) -> Gap:
    entries, largest, scale = 0, 0.0, 0.0
    others = pieces(second.folder, name)
    for (_, one), (_, other) in zip(pieces(first.folder, name), others, strict=True):
        apart = distances(one, other)
        entries += apart.size
        largest = max(largest, float(apart.max(initial=0)))
        sizes = np.abs(one.astype(np.float64))
        scale = max(scale, float(sizes[np.isfinite(sizes)].max(initial=0)))
    return Gap(entries, largest, largest / scale if scale else largest)


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How far apart two arrays are where they differ, [entries that differ] in float64; infinite where one is not
    finite. Integers are told apart exactly."""
    if one.dtype.kind in INTEGERS and other.dtype.kind in INTEGERS:
        a, b = one.astype(np.uint64), other.astype(np.uint64)  # modulo 2**64, and so their difference is right again
        return np.where(one > other, a - b, b - a)[one != other].astype(np.float64)
    x, y = one.astype(np.float64), other.astype(np.float64)
    differ = (x != y) & ~(np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        gap = np.abs(x - y)[differ]
    return np.where(np.isfinite(gap), gap, np.inf)
