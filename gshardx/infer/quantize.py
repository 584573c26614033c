"""Weights in 16, 8 or 4 bits: less memory, and fewer bytes to read for each token, for a little accuracy.

Weight-only: a matrix is stored as small integers with an fp32 scale for each group of consecutive entries along the
axis that its product sums over (as GPTQ and AWQ kernels store theirs), and made whole again where a layer reads it.
Attention, feed-forward networks and experts are; embeddings, the last projection, norms and routers stay as they are.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from gshardx.models.build import Blueprint, Params, Variables

WEIGHTS = ("bfloat16", "int8", "int4")
"""What large matrices may be stored in; bfloat16 is without scales."""
LARGEST = {"int8": 127, "int4": 7}
"""Of the integers, which are symmetric about 0."""
GROUP = 64
"""Entries that share a scale: 4.5 bits an entry with int4. Smaller axes are one group."""
SUMMED = {
    "w_q": -3, "w_k": -3, "w_v": -3, "w_o": -2, "w_in": -3, "w_up": -2, "w_gate": -2, "w_down": -2,
    "w_q_a": -2, "w_q_b": -3, "w_kv_a": -2, "w_kv_b": -3,
}  # fmt: skip
"""Parameters that are quantised, and the axis that their product sums over (``w_o``: the last of two)."""


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["axis", "packed"])
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight in a model's parameters; layers read it as they read an array, ``w[...].astype(dtype)``.

    values: int8, of the weight's shape; packed: two 4-bit neighbours along ``axis`` in each, the first one below.
    scales: fp32; ``axis`` (negative) is as long as there are groups.
    """

    values: Int8[Array, "..."]
    scales: Float[Array, "..."]
    axis: int
    packed: bool

    def __getitem__(self, index: Any) -> "Quantized":
        assert index is Ellipsis
        return self

    def astype(self, dtype: DTypeLike) -> Array:
        """The weight that it stands for."""
        values = _unpacked(self.values, self.axis) if self.packed else self.values
        split = _by_group(values.astype(jnp.float32), self.scales.shape[self.axis], self.axis)
        return (split * jnp.expand_dims(self.scales, self.axis)).reshape(values.shape).astype(dtype)


def _by_group(values: Array, groups: int, axis: int) -> Array:
    """Another axis at ``axis``, inside each group."""
    place = values.ndim + axis
    return values.reshape(*values.shape[:place], groups, -1, *values.shape[place + 1 :])


def _packed(values: Int8[Array, "..."], axis: int) -> Int8[Array, "..."]:
    # Not jnp.int4: ahead-of-time compiled programs refuse their own layout of it on CPUs (jax 0.10).
    low, high = (jax.lax.slice_in_dim(values, first, None, 2, values.ndim + axis) for first in (0, 1))
    return (low & 15) | (high << 4)


def _unpacked(values: Int8[Array, "..."], axis: int) -> Int8[Array, "..."]:
    place = values.ndim + axis
    both = jnp.stack([(values << 4) >> 4, values >> 4], axis=place + 1)
    return both.reshape(*values.shape[:place], -1, *values.shape[place + 1 :])


def quantized(weight: Float[Array, "..."], bits: str, axis: int, group: int = GROUP) -> Quantized:
    """Round each group to the nearest multiple of ``max |w| / largest``.

    Args:
        weight: any shape.
        bits: int8 or int4; groups of odd length are not packed.
        axis: negative; entries that follow each other along it form a group, of ``group`` or, where that does not
            divide its length, all of it.
    """
    length = weight.shape[axis]
    group = group if length % group == 0 else length
    split = _by_group(weight.astype(jnp.float32), length // group, axis)
    scales = jnp.maximum(jnp.abs(split).max(axis) / LARGEST[bits], 1e-30)
    values = jnp.round(split / jnp.expand_dims(scales, axis)).astype(jnp.int8).reshape(weight.shape)
    packed = bits == "int4" and group % 2 == 0
    return Quantized(_packed(values, axis) if packed else values, scales, axis, packed)


def quantize(plan: Blueprint, variables: Variables, dtype: str) -> tuple[Blueprint, Variables]:
    """The same model with its large matrices in ``dtype``, one of WEIGHTS, each in its place on the mesh."""

    def change(path: tuple[Any, ...], weight: Array) -> Any:
        name = path[-1].key
        if name not in SUMMED:
            return weight
        if dtype == "bfloat16":
            return weight.astype(jnp.bfloat16)
        place, axis = weight.sharding, SUMMED[name]
        local = place.shard_shape(weight.shape)[axis]
        make = partial(quantized, bits=dtype, axis=axis, group=GROUP if local % GROUP == 0 else local)
        changed: Quantized = jax.jit(make, out_shardings=place)(weight)
        return changed

    params: Params = jax.tree.map_with_path(change, variables.params)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
    return dataclasses.replace(plan, params=abstract), variables._replace(params=params)
