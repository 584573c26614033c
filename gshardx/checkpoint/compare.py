"""What differs between two saved steps, number by number."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gshardx.checkpoint.arrays import pieces
from gshardx.checkpoint.places import Saved


class Difference(NamedTuple):
    """``about`` says what; entries: how many of an array's differ; largest: the largest difference, relative: over the
    largest absolute value of the first."""

    array: str
    about: str
    entries: int = 0
    largest: float = 0.0
    relative: float = 0.0


def differences(first: Saved, second: Saved, item: str | None) -> Iterator[Difference]:
    """Of all arrays, or of an item's. Equal files are not read. NaN equals NaN."""
    one, other = first.manifest.arrays, second.manifest.arrays
    for name in sorted(one.keys() | other.keys()):
        if item is not None and not name.startswith(f"{item}/"):
            continue
        if name not in one or name not in other:
            yield Difference(name, f"only in {(first if name in one else second).folder}")
        elif one[name][0] != other[name][0]:
            yield Difference(name, f"{one[name][0]} and {other[name][0]}")
        elif one[name][1] != other[name][1] or _files(first, name) != _files(second, name):
            found = _compared(first, second, name)
            if found.entries or one[name][1] != other[name][1]:
                types = "" if one[name][1] == other[name][1] else f"{one[name][1]} and {other[name][1]}"
                yield found._replace(about=types)


def _files(saved: Saved, name: str) -> dict[str, object]:
    return {file: told for file, told in saved.manifest.files.items() if file.startswith(f"{name}/")}


def _compared(first: Saved, second: Saved, name: str) -> Difference:
    entries, largest, scale = 0, 0.0, 0.0
    others = pieces(second.folder, name)
    for (_, one), (_, other) in zip(pieces(first.folder, name), others, strict=True):
        a, b = (_wide(x) for x in (one, other))
        differ = (a != b) & ~(np.isnan(a) & np.isnan(b))
        entries += int(differ.sum())
        with np.errstate(invalid="ignore"):
            gap = np.abs(a - b)[differ]
        largest = max(largest, float(np.where(np.isfinite(gap), gap, np.inf).max(initial=0)))
        scale = max(scale, float(np.abs(a[np.isfinite(a)]).max(initial=0)))
    return Difference(name, "", entries, largest, largest / scale if scale else largest)


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)
