"""Routing traces: which experts each token chose, by layer, for studies of placement and caching.

RUN_DIR/routing/STEP.npz holds ``tokens`` and ``segments`` ``[b, t]`` (segment 0 is padding) and ``experts``
``[layer, b, t, k]``, in the smallest integers that hold them, compressed. All choices are listed, kept or not.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from gshardx.data.pipeline import Rows


class Trace(NamedTuple):
    tokens: Int[np.ndarray, "b t"]
    segments: Int[np.ndarray, "b t"]
    experts: Int[np.ndarray, "layer b t k"]


def write_trace(folder: Path, step: int, rows: Rows, experts: Int[np.ndarray, "layer b t k"]) -> Path:
    """Write RUN_DIR/routing/STEP.npz, whole or not at all, and return its path."""
    folder.mkdir(exist_ok=True)
    path, scratch = folder / f"{step}.npz", folder / "unfinished.npz"
    arrays = {"tokens": rows["tokens"], "segments": rows["segments"], "experts": experts}
    smallest: Any = {name: _smallest(array) for name, array in arrays.items()}
    np.savez_compressed(scratch, **smallest)
    return scratch.replace(path)


def read_trace(path: Path) -> Trace:
    with np.load(path) as arrays:
        return Trace(arrays["tokens"], arrays["segments"], arrays["experts"])


def _smallest(array: np.ndarray) -> np.ndarray:
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))
