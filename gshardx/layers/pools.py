"""Pages of keys or values, in full or in 8 bits: how they are stored, and read back in fp32.

A pool has two verbs. Its arrays are ``[p, q, l, d]``: p pages, q heads, l tokens of a page, d the head's width; a last
axis of 1 holds what a whole head shares.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8


class Pool(Protocol):
    """What :class:`gshardx.layers.Paged` stores keys or values in."""

    @property
    def shape(self) -> tuple[int, ...]:
        """p, q, l, d."""
        ...

    def put(self, page: Int[Array, "t"], place: Int[Array, "t"], new: Float[Array, "t q d"]) -> Self:
        """Store a token's heads at ``place`` of ``page``."""
        ...

    def read(self, page: Int[Array, "t"]) -> Float[Array, "t q l d"]:
        """Whole pages, fp32."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullPages:
    """As they come, in the dtype of the array."""

    values: Float[Array, "p q l d"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def put(self, page: Int[Array, "t"], place: Int[Array, "t"], new: Float[Array, "t q d"]) -> "FullPages":
        return FullPages(self.values.at[page, :, place].set(new.astype(self.values.dtype)))

    def read(self, page: Int[Array, "t"]) -> Float[Array, "t q l d"]:
        return self.values[page].astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Pages:
    """Each token's head in 8 bits with a scale of its own, ``max |x| / 127``: no token changes another's."""

    values: Int8[Array, "p q l d"]
    scales: Float[Array, "p q l 1"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def put(self, page: Int[Array, "t"], place: Int[Array, "t"], new: Float[Array, "t q d"]) -> "Int8Pages":
        new = new.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(new).max(-1, keepdims=True) / 127, 1e-30)
        values = jnp.round(new / scale).astype(jnp.int8)
        return Int8Pages(self.values.at[page, :, place].set(values), self.scales.at[page, :, place].set(scale))

    def read(self, page: Int[Array, "t"]) -> Float[Array, "t q l d"]:
        return self.values[page].astype(jnp.float32) * self.scales[page]


def abstract_pool(dtype: str, shape: tuple[int, ...], place: Callable[[tuple[int, ...], str], jax.Array]) -> Pool:
    """A pool's arrays as ``place`` makes them of shape and dtype; ``int8`` is the one with scales."""
    if dtype == "int8":
        return Int8Pages(place(shape, "int8"), place((*shape[:-1], 1), "float32"))
    return FullPages(place(shape, dtype))
