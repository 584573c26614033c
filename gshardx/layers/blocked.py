"""Grouped matrix multiplication for CPUs, where XLA's ragged_dot multiplies every row with every expert's matrix.

Each expert's rows are cut into blocks, the last one of an expert filled up with zeros, and each block is one dense
product with its expert's matrix. At most e blocks are partly empty, whatever the loads.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

BLOCK = 64
"""Rows of a block: enough to make a matrix product efficient, few enough that e partly empty blocks cost little."""


class _Blocks(NamedTuple):
    """n = r // BLOCK + e blocks are enough."""

    expert: Int[Array, "n"]
    used: Bool[Array, "n"]
    row: Int[Array, "n block"]
    """The row that each place of a block reads; r for an empty place."""
    place: Int[Array, "r"]
    """The place of each row among those of all blocks; past the end for rows after the last expert's."""


@jax.custom_vjp
def blocked_matmul(
    rows: Float[Array, "r a"], weights: Float[Array, "e a b"], sizes: Int[Array, "e"]
) -> Float[Array, "r b"]:
    """As :func:`gshardx.layers.grouped.grouped_matmul`; rows after the last expert's become 0."""
    return _forward(rows, weights, sizes)[0]


def _forward(rows: Array, weights: Array, sizes: Array) -> tuple[Array, Any]:
    blocks = _cut(sizes, len(rows))
    tiles = _rows(rows, blocks.row)

    def product(block: tuple[Array, Array, Array]) -> Array:
        tile, expert, used = block
        return jax.lax.cond(used, lambda: tile @ weights[expert], lambda: _zeros_like_product(tile, weights))

    out = jax.lax.map(product, (tiles, blocks.expert, blocks.used))
    return _rows(out.reshape(-1, weights.shape[2]), blocks.place), (tiles, weights, blocks)


def _backward(saved: Any, gradient: Float[Array, "r b"]) -> tuple[Array, Array, Any]:
    tiles, weights, blocks = saved

    def step(d_weights: Array, block: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        tile, d_tile, expert, used = block

        def add() -> tuple[Array, Array]:
            product = jnp.dot(tile.T, d_tile, preferred_element_type=jnp.float32)
            return d_weights.at[expert].add(product), d_tile @ weights[expert].T

        return jax.lax.cond(used, add, lambda: (d_weights, jnp.zeros_like(tile)))

    d_tiles = _rows(gradient, blocks.row)
    per_block = (tiles, d_tiles, blocks.expert, blocks.used)
    d_weights, d_rows = jax.lax.scan(step, jnp.zeros(weights.shape, jnp.float32), per_block)
    no_gradient = np.zeros(len(weights), jax.dtypes.float0)
    return _rows(d_rows.reshape(-1, weights.shape[1]), blocks.place), d_weights.astype(weights.dtype), no_gradient


blocked_matmul.defvjp(_forward, _backward)


def _cut(sizes: Int[Array, "e"], rows: int) -> _Blocks:
    blocks = -(-sizes // BLOCK)
    last_block, last_row = jnp.cumsum(blocks), jnp.cumsum(sizes)
    first_block, first_row = last_block - blocks, last_row - sizes

    number = jnp.arange(rows // BLOCK + len(sizes), dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(last_block, number, side="right"), len(sizes) - 1)
    offset = (number - first_block[expert])[:, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    row = jnp.where(offset < sizes[expert, None], first_row[expert, None] + offset, rows)

    each = jnp.arange(rows, dtype=jnp.int32)
    of_row = jnp.minimum(jnp.searchsorted(last_row, each, side="right"), len(sizes) - 1)
    place = first_block[of_row] * BLOCK + each - first_row[of_row]
    return _Blocks(expert, number < last_block[-1], row, jnp.where(each < last_row[-1], place, row.size))


def _rows(x: Float[Array, "r a"], index: Int[Array, "*i"]) -> Float[Array, "*i a"]:
    return x.at[index].get(mode="fill", fill_value=0)


def _zeros_like_product(tile: Float[Array, "block a"], weights: Float[Array, "e a b"]) -> Float[Array, "block b"]:
    return jnp.zeros((tile.shape[0], weights.shape[2]), tile.dtype)
