"""What attention attends to: the packed sequence itself in training, a KV cache in inference.

A memory has one verb, ``attend``: it takes in a layer's new keys and values and answers the queries from all that each
may look at. Attention is written once and never asks which memory it has.

Values, c wide, may be a part of the keys, which then is stored once: ``v`` is how many of a key's first entries they
are.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshardx.sharding import shard

Heads = Float[Array, "b t n d"]
Values = Float[Array, "b t q c"] | int


class Kept(NamedTuple):
    """What inference keeps of a token in a layer: ``heads`` keys of ``width`` entries, and as wide values.

    ``values``: how many of a key's first entries they are instead.
    """

    heads: int
    width: int
    values: int | None = None


class Memory(Protocol):
    """``attend`` takes a layer's index and its new queries, keys and values.

    reach: how many positions before its own each query may look at; None: all. sinks: a logit a head beside the scores,
    which takes weight and gives nothing.
    """

    KEEPS: ClassVar[bool]
    """Whether keys and values outlive the call, so that narrow ones are worth more products."""

    def attend(
        self,
        layer: Any,
        q: Heads,
        k: Float[Array, "b t q d"],
        v: Values,
        *,
        reach: Int[Array, "b t"] | None = None,
        sinks: Float[Array, "n"] | None = None,
    ) -> "tuple[Heads, Memory]":
        """Return what each query found, as wide as values, and the memory that now holds the new keys and values."""
        ...


@jax.checkpoint
def _attend(
    q: Heads,
    k: Float[Array, "b l q d"],
    v: Float[Array, "b l q c"],
    mask: Bool[Array, "b 1 t l"],
    sinks: Float[Array, "n"] | None = None,
) -> Heads:
    """Softmax attention whose backward pass makes the ``[b, n, t, l]`` probabilities again instead of keeping them."""
    if sinks is None and v.shape[-1] == k.shape[-1]:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    b, t, n, d = q.shape
    grouped = q.reshape(b, t, k.shape[2], -1, d)
    scores = jnp.einsum("btqgd,blqd->bqgtl", grouped, k, preferred_element_type=jnp.float32) * d**-0.5
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        beside = jnp.broadcast_to(sinks.reshape(*scores.shape[1:3], 1, 1), (*scores.shape[:4], 1))
        scores = jnp.concatenate([scores, beside], axis=-1)
    share = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]]
    return jnp.einsum("bqgtl,blqc->btqgc", share.astype(v.dtype), v).reshape(b, t, n, v.shape[-1])


def _values(k: Float[Array, "b l q d"], v: Values) -> Float[Array, "b l q c"]:
    return k[..., :v] if isinstance(v, int) else v


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Documents packed side by side: a token sees the earlier tokens of its own document."""

    mask: Bool[Array, "b 1 t t"]

    KEEPS: ClassVar[bool] = False

    @classmethod
    def of(cls, segment_ids: Int[Array, "b t"]) -> "Packed":
        """From segment ids: one number a document, 0 for padding (which sees itself alone)."""
        t = segment_ids.shape[1]
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        causal = jnp.tril(jnp.ones((t, t), bool))
        return cls((same & causal)[:, None])

    def attend(
        self,
        layer: Any,
        q: Heads,
        k: Float[Array, "b t q d"],
        v: Values,
        *,
        reach: Int[Array, "b t"] | None = None,
        sinks: Float[Array, "n"] | None = None,
    ) -> tuple[Heads, "Packed"]:
        mask = self.mask
        if reach is not None:
            place = jnp.arange(q.shape[1], dtype=jnp.int32)
            mask &= (place[:, None] - place <= reach[:, :, None])[:, None]
        return _attend(q, k, _values(k, v), mask, sinks), self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, and where in each row the tokens of this call stand.

    k, v: ``[layer, b, l, q, d]``, l the longest sequence that fits; v None: values are a part of the keys. positions
    ``[b, t]`` int32; a position of l or more (padding) is not stored.
    """

    k: Float[Array, "layer b l q d"]
    v: Float[Array, "layer b l q d"] | None
    positions: Int[Array, "b t"]

    KEEPS: ClassVar[bool] = True
    AXES: ClassVar[str] = "layer batch time kv_heads head_dim"
    SHARED: ClassVar[str] = "layer batch time latent head_dim"
    """Where keys that have the values in them are: one head, which every device needs."""

    def attend(
        self,
        layer: Any,
        q: Heads,
        k: Float[Array, "b t q d"],
        v: Values,
        *,
        reach: Int[Array, "b t"] | None = None,
        sinks: Float[Array, "n"] | None = None,
    ) -> tuple[Heads, "KVCache"]:
        # Row by row: indexed by [layer, row, position] at once, every device would be sent all rows' keys and places.
        def put(all_rows: Array, new: Array) -> Array:
            write = jax.vmap(lambda row, at, x: row.at[layer, at].set(x, mode="drop"), in_axes=(1, 0, 0), out_axes=1)
            return shard(write(all_rows, self.positions, new.astype(all_rows.dtype)), axes)

        axes = self.SHARED if isinstance(v, int) else self.AXES
        all_k = put(self.k, k)
        all_v = None if self.v is None or isinstance(v, int) else put(self.v, v)
        at = jnp.arange(self.k.shape[2])[None, None, :]
        seen = at <= self.positions[:, :, None]
        if reach is not None:
            seen &= at >= (self.positions - reach)[:, :, None]
        seen_k = all_k[layer].astype(q.dtype)
        seen_v = _values(seen_k, v) if all_v is None else all_v[layer].astype(q.dtype)
        heads = _attend(q, seen_k, seen_v, seen[:, None], sinks)
        return heads, dataclasses.replace(self, k=all_k, v=all_v)
