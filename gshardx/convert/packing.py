"""Weights of fewer bits that share scales, as files have them: two tensors, which are read as one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Packing(NamedTuple):
    """One way to pack.

    Attributes:
        numbers, scales: how the names of the two tensors end, after the weights' own.
        type: of the numbers, as safetensors call it, and as NumPy does.
        shape: of the weights from those of numbers and scales; None where these don't suit each other.
        decoded: the weights, bfloat16, from numbers and scales.
    """

    numbers: str
    scales: str
    type: tuple[str, np.dtype[Any]]
    shape: Callable[[Shape, Shape], Shape | None]
    decoded: Callable[[np.ndarray, np.ndarray], np.ndarray]
