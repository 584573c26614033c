"""Single arrays of a saved step, read and written piece by piece: no mesh, no model, little memory."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from gshardx.errors import BadInput

PIECE = 1 << 24
"""Entries of an array that are in memory at once."""
_HELD = 1 << 27
"""Bytes that are being written at once, unless one array alone is more."""
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
            raise _unreadable(folder / name) from error


def convert(folder: Path, name: str, target: Path, dtype: str) -> None:
    """Write an array as another type into ``target``, a step's folder, chunked as it was.

    Raises:
        BadInput: it can't be read, or a piece of it can't be written.
        OSError: its folder can't be written.
    """
    try:
        about = {**json.loads((folder / name / "zarr.json").read_text()), "data_type": dtype, "fill_value": 0.0}
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(folder / name) from error
    (target / name).mkdir(parents=True)
    (target / name / "zarr.json").write_text(json.dumps(about))
    written = _opened(target / name)
    for where, values in pieces(folder, name):
        try:
            written[where].write(values.astype(written.dtype.numpy_dtype)).result()
        except ValueError as error:
            raise BadInput(f"{target / name}: can't be written; is there room?") from error


def create(folder: Path, name: str, shape: Sequence[int], dtype: str, chunk: Sequence[int]) -> None:
    """An array without numbers, in files of ``chunk`` each."""
    grid = {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}
    about = {"shape": list(shape), "data_type": dtype, "chunk_grid": grid, "fill_value": 0.0}
    tensorstore.open(_spec(folder / name) | {"metadata": about}, create=True).result()


class Writer:
    """Writes what arrays of a step have at an index of their first dimensions, several at a time.

    Used as a context, which ends once all is written. Each file is brought to the disk: waiting for one after the other
    would leave the disk idle while the next is read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._pending, self._held = folder, deque[tuple[str, int, Any, Callable[[], None] | None]](), 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        while self._pending:
            try:
                self._wait()
            except BadInput:
                if kind is None:
                    raise

    def put(
        self, name: str, index: tuple[int, ...], values: np.ndarray, done: Callable[[], None] | None = None
    ) -> None:
        """Start writing, as the array's type; waits while too much is under way. ``done`` is called, by this thread,
        some time after it is on the disk.

        Raises:
            BadInput: this or an earlier one can't be written.
        """
        while self._pending and self._held + values.nbytes > _HELD:
            self._wait()
        array = _opened(self._folder / name)
        writing = array[index].write(values.astype(array.dtype.numpy_dtype, copy=False))
        self._pending.append((name, values.nbytes, writing, done))
        self._held += values.nbytes

    def _wait(self) -> None:
        name, size, writing, done = self._pending.popleft()
        self._held -= size
        try:
            writing.result()
        except ValueError as error:
            raise BadInput(f"{self._folder / name}: can't be written; is there room?") from error
        if done is not None:
            done()


def get(folder: Path, name: str, index: tuple[int, ...]) -> np.ndarray:
    """What an array has at an index of its first dimensions.

    Raises:
        BadInput: it can't be read.
    """
    array = _opened(folder / name)
    try:
        return np.asarray(array[index].read().result())
    except ValueError as error:
        raise _unreadable(folder / name) from error


def _spec(path: Path) -> dict[str, Any]:
    # Zeros are written too: who reads a step takes a missing chunk for damage.
    kvstore = {"driver": "file", "path": str(path.absolute())}
    return {"driver": "zarr3", "kvstore": kvstore, "store_data_equal_to_fill_value": True}


def _opened(path: Path) -> Any:
    spec = _spec(path)
    try:
        return tensorstore.open(spec, open=True).result()
    except ValueError as error:
        raise _unreadable(path) from error


def _unreadable(path: Path) -> BadInput:
    return BadInput(f"{path}: can't be read; python -m gshardx.checkpoint verify says why")


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
