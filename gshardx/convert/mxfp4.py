"""Weights of four bits with a scale for each 32 of them (OCP Microscaling Formats 1.0, MXFP4), and how they are read.

GPT-OSS's files have these for experts: ``NAME_blocks`` uint8 ``[e, n, blocks, 16]``, two values a byte, the lower bits
first, and ``NAME_scales`` uint8 ``[e, n, blocks]``, the power of two that a block's values are multiplied by, plus 127.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import BFloat16, UInt8

from gshardx.convert.packing import Packing, Shape

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Of four bits: sign, two of the exponent, one of the mantissa."""
BLOCK = 32
_FACTORS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
_PAIRS = np.stack([VALUES[np.arange(256) & 15], VALUES[np.arange(256) >> 4]], axis=-1)


def decoded(
    blocks: UInt8[np.ndarray, "e n blocks 16"], scales: UInt8[np.ndarray, "e n blocks"]
) -> BFloat16[np.ndarray, "e d n"]:
    """The weights, d = 32 blocks, with their input in front; exact, but what is too small for a bfloat16. A scale of
    255 stands for NaN."""
    e, n, count = scales.shape
    out = np.empty((e, count * BLOCK, n), jnp.bfloat16)
    for expert in range(e):  # a few times a matrix in memory, and not of all experts
        values = _PAIRS[blocks[expert]].reshape(n, count, BLOCK) * _FACTORS[scales[expert]][..., None]
        out[expert] = values.reshape(n, -1).T
    return out


def _shape(blocks: Shape, scales: Shape) -> Shape | None:
    if len(scales) != 3 or blocks != (*scales, BLOCK // 2):
        return None
    e, n, count = scales
    return e, count * BLOCK, n


PACKING = Packing("_blocks", "_scales", ("U8", np.dtype(np.uint8)), _shape, decoded)
