"""Single arrays of a saved step, read and written piece by piece: no mesh, no model, little memory."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from gshardx.errors import BadInput

PIECE = 1 << 24
"""Entries of an array that are in memory at once."""
FLOATS = ("float32", "bfloat16")


def pieces(folder: Path, name: str) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Where each piece of an array lies, and its values.

    Args:
        folder: of a step.
        name: such as ``params/final_norm.scale``.

    Raises:
        BadInput: it can't be read.
    """
    array = _opened(folder / name)
    for where in _boxes(array.shape):
        try:
            yield where, np.asarray(array[where].read().result())
        except ValueError as error:
            raise BadInput(f"{folder / name}: can't be read; python -m gshardx.checkpoint verify says why") from error


def convert(folder: Path, name: str, target: Path, dtype: str) -> None:
    """Write an array as another type into ``target``, a step's folder, chunked as it was.

    Raises:
        BadInput: it can't be read.
    """
    about = json.loads((folder / name / "zarr.json").read_text())
    about["data_type"], about["fill_value"] = dtype, 0.0
    (target / name).mkdir(parents=True)
    (target / name / "zarr.json").write_text(json.dumps(about))
    written = _opened(target / name)
    for where, values in pieces(folder, name):
        written[where].write(values.astype(written.dtype.numpy_dtype)).result()


def _opened(path: Path) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path.absolute())}}
    try:
        return tensorstore.open(spec, open=True).result()
    except ValueError as error:
        raise BadInput(f"{path}: can't be read; python -m gshardx.checkpoint verify says why") from error


def _boxes(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Parts of at most :data:`PIECE` entries, cut along the first axes."""
    axis, inner = len(shape), 1
    while axis > 0 and inner * shape[axis - 1] <= PIECE:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield (slice(None),) * len(shape)
        return
    rows = max(1, PIECE // inner)
    for outer in np.ndindex(*shape[: axis - 1]):
        for first in range(0, shape[axis - 1], rows):
            yield (*(slice(n, n + 1) for n in outer), slice(first, min(first + rows, shape[axis - 1])))


def count(shape: list[int]) -> int:
    """Entries of an array."""
    return math.prod(shape)
