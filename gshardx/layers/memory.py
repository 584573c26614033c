"""What attention attends to: the packed sequence itself in training, a KV cache in inference.

A memory has one verb, ``attend``: it takes in a layer's new keys and values and answers the queries from all that each
may look at. Attention is written once and never asks which memory it has.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshardx.sharding import shard

Heads = Float[Array, "b t n d"]


class Memory(Protocol):
    """``attend`` takes a layer's index and its new queries, keys and values."""

    def attend(
        self, layer: Any, q: Heads, k: Float[Array, "b t q d"], v: Float[Array, "b t q d"]
    ) -> "tuple[Heads, Memory]":
        """Return what each query found, and the memory that now holds the new keys and values."""
        ...


@jax.checkpoint
def _attend(q: Heads, k: Float[Array, "b l q d"], v: Float[Array, "b l q d"], mask: Bool[Array, "b 1 t l"]) -> Heads:
    """Softmax attention whose backward pass makes the ``[b, n, t, l]`` probabilities again instead of keeping them."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Documents packed side by side: a token sees the earlier tokens of its own document."""

    mask: Bool[Array, "b 1 t t"]

    @classmethod
    def of(cls, segment_ids: Int[Array, "b t"]) -> "Packed":
        """From segment ids: one number a document, 0 for padding (which sees itself alone)."""
        t = segment_ids.shape[1]
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        causal = jnp.tril(jnp.ones((t, t), bool))
        return cls((same & causal)[:, None])

    def attend(
        self, layer: Any, q: Heads, k: Float[Array, "b t q d"], v: Float[Array, "b t q d"]
    ) -> tuple[Heads, "Packed"]:
        return _attend(q, k, v, self.mask), self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, and where in each row the tokens of this call stand.

    k, v: ``[layer, b, l, q, d]``, l the longest sequence that fits. positions ``[b, t]`` int32; a position of l or more
    (padding) is not stored.
    """

    k: Float[Array, "layer b l q d"]
    v: Float[Array, "layer b l q d"]
    positions: Int[Array, "b t"]

    AXES = "layer batch time kv_heads head_dim"

    def attend(
        self, layer: Any, q: Heads, k: Float[Array, "b t q d"], v: Float[Array, "b t q d"]
    ) -> tuple[Heads, "KVCache"]:
        # Row by row: indexed by [layer, row, position] at once, every device would be sent all rows' keys and places.
        def put(all_rows: Array, new: Array) -> Array:
            write = jax.vmap(lambda row, at, x: row.at[layer, at].set(x, mode="drop"), in_axes=(1, 0, 0), out_axes=1)
            return shard(write(all_rows, self.positions, new.astype(all_rows.dtype)), self.AXES)

        all_k, all_v = put(self.k, k), put(self.v, v)
        seen = jnp.arange(self.k.shape[2])[None, None, :] <= self.positions[:, :, None]
        heads = _attend(q, all_k[layer].astype(q.dtype), all_v[layer].astype(q.dtype), seen[:, None])
        return heads, dataclasses.replace(self, k=all_k, v=all_v)
