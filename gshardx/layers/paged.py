"""Attention over a paged cache: every token looks up the pages of its own sequence (PagedAttention, arXiv 2309.06180).

Tokens of any sequences stand side by side, prompt chunks and single new tokens alike. Page after page is taken into a
running softmax (arXiv 1805.02867). A token's result depends on its own pages alone, in their order: a page after the
token's own position changes no bit, so neither does who else is in the batch.
"""

import dataclasses
from typing import ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gshardx.layers.kernel_pages import KernelPages, kernel_attention
from gshardx.layers.memory import Values
from gshardx.layers.pools import LatentPages, Pool
from gshardx.sharding import manual

MASKED = -1e30
"""Score of what a token may not see; finite, so that a padding token's maximum is a number."""

P = TypeVar("P", bound=Pool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paged:
    """Keys and values of every layer in pages of l tokens, and where the tokens of this call stand.

    pools: one a layer, with a leading axis b: the mesh's batch shards, each with p pages of its own.
    tables: pages of each sequence, in order, 0 where it has none. sequence: of each token, an index into ``tables``.
    positions: of each token in its sequence; -1 for padding, which is stored on page 0, where nobody looks.
    longest: pages of the longest sequence.
    """

    pools: tuple[Pool, ...]
    tables: Int[Array, "b r pages"]
    sequence: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    longest: Int[Array, ""]

    KEEPS: ClassVar[bool] = True

    def attend(
        self,
        layer: int,
        q: Float[Array, "b t n d"],
        k: Float[Array, "b t q d"],
        v: Values,
        *,
        reach: Int[Array, "b t"] | None = None,
        sinks: Float[Array, "n"] | None = None,
    ) -> "tuple[Float[Array, 'b t n c'], Paged]":
        """Store ``k`` and ``v``, then answer each query from its sequence up to its own position."""
        pool = self.pools[layer]
        by_token, by_head, by_kv_head = "batch time", "batch time heads head_dim", "batch time kv_heads head_dim"
        values = None if isinstance(pool, LatentPages) else v
        if values is None:
            by_kv_head = "batch time latent head_dim"
        stored = (by_kv_head, by_kv_head, pool.AXES)
        names = (by_head, *stored, "batch time slot", by_token, by_token, "", by_token, "heads")
        over_rows = jax.vmap(_store_and_attend, in_axes=(0,) * 7 + (None, 0, None))
        on_each = manual(over_rows, names, (by_head, pool.AXES), check_vma=False)
        out, new = on_each(q, k, values, pool, self.tables, self.sequence, self.positions, self.longest, reach, sinks)
        pools = (*self.pools[:layer], new, *self.pools[layer + 1 :])
        return out, dataclasses.replace(self, pools=pools)


def _store_and_attend(
    q: Float[Array, "t n d"],
    k: Float[Array, "t q d"],
    v: Float[Array, "t q d"] | None,
    pool: P,
    tables: Int[Array, "r pages"],
    sequence: Int[Array, "t"],
    positions: Int[Array, "t"],
    longest: Int[Array, ""],
    reach: Int[Array, "t"] | None = None,
    sinks: Float[Array, "n"] | None = None,
) -> tuple[Array, P]:
    table, size = tables[sequence], pool.shape[2]
    place = jnp.maximum(positions, 0)
    own = jnp.take_along_axis(table, place[:, None] // size, axis=1)[:, 0]
    page = jnp.where(positions < 0, 0, own)
    pool = pool.put(page, place % size, k, v)
    plain = reach is None and sinks is None  # the kernels know neither
    if plain and isinstance(pool, KernelPages) and q.dtype == pool.k.dtype:
        return kernel_attention(q, pool, table, positions), pool
    return paged_attention(q, pool, table, positions, longest, reach=reach, sinks=sinks), pool


def paged_attention(
    q: Float[Array, "t n d"],
    pool: Pool,
    table: Int[Array, "t pages"],
    positions: Int[Array, "t"],
    longest: Int[Array, ""],
    *,
    reach: Int[Array, "t"] | None = None,
    sinks: Float[Array, "n"] | None = None,
) -> Float[Array, "t n c"]:
    """Softmax attention of each token to positions 0 to its own of the sequence whose pages ``table`` lists; fp32 sums.

    Args:
        q: n query heads share q heads of keys and values.
        pool: pages of l tokens, q heads.
        table: pages of each token's sequence.
        positions: of each token; -1: padding, whose result means nothing.
        longest: how many pages of ``table`` to read.
        reach: how many positions before its own each token sees; None: all.
        sinks: a logit a head beside the scores, which takes weight and gives nothing (GPT-OSS).
    """
    t, n, d = q.shape
    _, kv_heads, size, width = pool.shape
    grouped = (q.astype(jnp.float32) * d**-0.5).reshape(t, kv_heads, n // kv_heads, d)
    first = jnp.full(grouped.shape[:3], MASKED) if sinks is None else _every_token(sinks, grouped.shape[:3])

    def take_in(number: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, found = running
        pages = jax.lax.dynamic_index_in_dim(table, number, axis=1, keepdims=False)
        at = number * size + jnp.arange(size, dtype=jnp.int32)
        seen = at <= positions[:, None]
        if reach is not None:
            seen &= at >= (positions - reach)[:, None]
        keys, values = pool.read(pages)
        scores = jnp.einsum("tqgd,tqdl->tqgl", grouped, keys)
        scores = jnp.where(seen[:, None, None], scores, MASKED)
        new_highest = jnp.maximum(highest, scores.max(-1))
        weights = jnp.where(seen[:, None, None], jnp.exp(scores - new_highest[..., None]), 0.0)
        # What a page held before is masked too, since 0 times infinity is not 0.
        values = jnp.where(seen[:, None, :, None], values, 0.0)
        kept = jnp.exp(highest - new_highest)
        found = found * kept[..., None] + jnp.einsum("tqgl,tqld->tqgd", weights, values)
        return new_highest, total * kept + weights.sum(-1), found

    total = jnp.zeros_like(first) if sinks is None else jnp.ones_like(first)
    nearest = jnp.int32(0)
    if reach is not None:  # a page that nobody sees changes no bit
        nearest = jnp.maximum(jnp.where(positions < 0, longest * size, positions - reach).min(), 0) // size
    found = jnp.zeros((*first.shape, width))
    _, total, found = jax.lax.fori_loop(nearest, longest, take_in, (first, total, found))
    return (found / jnp.maximum(total, 1e-30)[..., None]).reshape(t, n, width).astype(q.dtype)


def _every_token(sinks: Float[Array, "n"], shape: tuple[int, ...]) -> Float[Array, "t q g"]:
    return jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, *shape[1:]), shape)
