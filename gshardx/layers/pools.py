"""A layer's keys and values in pages, in full or in 8 bits: how tokens are stored, and pages read back in fp32.

p pages, q heads, l tokens of a page, d the head's width; an axis of 1 in place of d holds what a whole head shares.
Keys lie ``[p, q, d, l]``, so that scores are a product of matrices as they lie in memory: XLA's CPU compiler takes
twice the time where it must turn them (jax 0.10, 32 queries).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from gshardx.errors import BadInput
from gshardx.layers.kernel_pages import KernelPages


class Pool(Protocol):
    """What :class:`gshardx.layers.Paged` stores a layer's keys and values in."""

    AXES: ClassVar[str]
    """Of all its arrays, those in front of which the mesh's batch shards stand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """p, q, l, and the width of values."""
        ...

    def put(self, page: Int[Array, "t"], place: Int[Array, "t"], k: Float[Array, "t q d"], v: Any) -> Self:
        """Store a token's heads at ``place`` of ``page``; v ``[t, q, d]``, None where keys hold the values."""
        ...

    def read(self, page: Int[Array, "t"]) -> tuple[Float[Array, "t q d l"], Float[Array, "t q l c"]]:
        """Whole pages, fp32."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullPages:
    """As they come, in the dtype of the arrays."""

    k: Float[Array, "p q d l"]
    v: Float[Array, "p q l d"]

    AXES: ClassVar[str] = "batch slot kv_heads time head_dim"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.v.shape

    def put(
        self, page: Int[Array, "t"], place: Int[Array, "t"], k: Float[Array, "t q d"], v: Float[Array, "t q d"]
    ) -> "FullPages":
        return FullPages(
            self.k.at[page, :, :, place].set(k.astype(self.k.dtype)),
            self.v.at[page, :, place].set(v.astype(self.v.dtype)),
        )

    def read(self, page: Int[Array, "t"]) -> tuple[Float[Array, "t q d l"], Float[Array, "t q l d"]]:
        return self.k[page].astype(jnp.float32), self.v[page].astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentPages:
    """Keys alone, of one head that every device holds; the values are their first entries."""

    k: Float[Array, "p 1 d l"]
    values: int = dataclasses.field(metadata={"static": True})
    """How many entries."""

    AXES: ClassVar[str] = "batch slot latent head_dim time"

    @property
    def shape(self) -> tuple[int, ...]:
        pages, heads, _, size = self.k.shape
        return pages, heads, size, self.values

    def put(self, page: Int[Array, "t"], place: Int[Array, "t"], k: Float[Array, "t 1 d"], v: None) -> "LatentPages":
        return dataclasses.replace(self, k=self.k.at[page, :, :, place].set(k.astype(self.k.dtype)))

    def read(self, page: Int[Array, "t"]) -> tuple[Float[Array, "t 1 d l"], Float[Array, "t 1 l c"]]:
        k = self.k[page].astype(jnp.float32)
        return k, k[:, :, : self.values].swapaxes(2, 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Pages:
    """Each token's head in 8 bits with a scale of its own, ``max |x| / 127``: no token changes another's."""

    k: Int8[Array, "p q d l"]
    k_scales: Float[Array, "p q 1 l"]
    v: Int8[Array, "p q l d"]
    v_scales: Float[Array, "p q l 1"]

    AXES: ClassVar[str] = FullPages.AXES

    @property
    def shape(self) -> tuple[int, ...]:
        return self.v.shape

    def put(
        self, page: Int[Array, "t"], place: Int[Array, "t"], k: Float[Array, "t q d"], v: Float[Array, "t q d"]
    ) -> "Int8Pages":
        (k, k_scales), (v, v_scales) = _in_8_bits(k), _in_8_bits(v)
        return Int8Pages(
            self.k.at[page, :, :, place].set(k),
            self.k_scales.at[page, :, :, place].set(k_scales),
            self.v.at[page, :, place].set(v),
            self.v_scales.at[page, :, place].set(v_scales),
        )

    def read(self, page: Int[Array, "t"]) -> tuple[Float[Array, "t q d l"], Float[Array, "t q l d"]]:
        k = self.k[page].astype(jnp.float32) * self.k_scales[page]
        return k, self.v[page].astype(jnp.float32) * self.v_scales[page]


def _in_8_bits(x: Float[Array, "t q d"]) -> tuple[Int8[Array, "t q d"], Float[Array, "t q 1"]]:
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True) / 127, 1e-30)
    return jnp.round(x / scale).astype(jnp.int8), scale


def abstract_pool(
    dtype: str,
    shape: tuple[int, ...],
    kernel: str | None,
    place: Callable[[tuple[int, ...], str, str], jax.Array],
    values: int | None = None,
) -> Pool:
    """A pool of shape ``[..., p, q, l, d]``, its arrays as ``place`` makes them of shape, dtype and axes.

    Full pages are those of a platform's kernel, if it is named. ``values``: how many of a key's entries they are, where
    they have no pages of their own.

    Raises:
        BadInput: such pages have no form in 8 bits or for a kernel.
    """
    *front, pages, heads, size, width = shape
    if values is not None:
        if kernel is not None:
            raise BadInput(f"attention = pallas: no kernel of a {kernel} reads values from the keys' pages; use xla")
        if dtype == "int8":
            raise BadInput("kv_dtype = int8: pages whose keys hold the values have no form in 8 bits; use bfloat16")
        return LatentPages(place((*front, pages, heads, width, size), dtype, LatentPages.AXES), values)
    if kernel is not None:
        array = place((*front, heads, pages, size, width), dtype, KernelPages.AXES)
        return KernelPages(array, array, kernel)
    turned, axes = (*front, pages, heads, width, size), FullPages.AXES
    if dtype == "int8":
        k_scales = place((*front, pages, heads, 1, size), "float32", axes)
        v_scales = place((*front, pages, heads, size, 1), "float32", axes)
        return Int8Pages(place(turned, "int8", axes), k_scales, place(shape, "int8", axes), v_scales)
    return FullPages(place(turned, dtype, axes), place(shape, dtype, axes))
