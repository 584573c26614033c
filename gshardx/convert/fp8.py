"""Weights of eight bits (float8_e4m3fn) with a scale for each 128 x 128 of them, and how they are read.

DeepSeek-V3's own files have these, and those that the hub calls FP8: ``NAME`` ``[n, d]`` and ``NAME_scale_inv`` fp32
``[n / 128, d / 128]``, rounded up, by which a block's numbers are multiplied (README_WEIGHTS.md of DeepSeek-V3).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import BFloat16, Float32, Shaped

from gshardx.convert.packing import Packing, Shape

BLOCK = 128


def decoded(
    numbers: Shaped[np.ndarray, "n d"], scales: Float32[np.ndarray, "n_blocks d_blocks"]
) -> BFloat16[np.ndarray, "n d"]:
    """The weights: each product in fp32, then rounded to bfloat16, as DeepSeek's own fp8_cast_bf16.py does."""
    out = np.empty(numbers.shape, jnp.bfloat16)
    for row, own in enumerate(scales.astype(np.float32)):  # 128 rows in fp32, and not all of them
        rows = slice(row * BLOCK, (row + 1) * BLOCK)
        out[rows] = numbers[rows].astype(np.float32) * np.repeat(own, BLOCK)[: numbers.shape[1]]
    return out


def _shape(numbers: Shape, scales: Shape) -> Shape | None:
    return numbers if len(numbers) == 2 and scales == tuple(-(-size // BLOCK) for size in numbers) else None


PACKING = Packing("", "_scale_inv", ("F8_E4M3", np.dtype(jnp.float8_e4m3fn)), _shape, decoded)
