"""What a router is told of earlier tokens of a document: the mean of notes, from the memory that attention has.

A note is a short vector that a router makes of a token. Attention whose queries are zeros weighs all that a token may
look at alike, so the mean of notes is an attention without parameters, in one more layer of the memory: packed
documents stay apart in training, and whatever keeps keys and values for decoding keeps notes as well.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.memory import Kept, Memory
from gshardx.sharding import shard

MeanOf = Callable[..., tuple[Float[Array, "b t n"], Any]]
"""``(notes [b, t, n], memory, reach) -> (means, memory)``: :func:`recalled` for one layer of one memory."""


def recalled(
    notes: Float[Array, "b t n"],
    memory: Memory,
    reach: Int[Array, "b t"] | None = None,
    *,
    layer: Any,
    kept: Kept,
    queries: int,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "b t n"], Memory]:
    """Mean of the notes of each token and the earlier ones of its document, fp32, and the memory that holds them now.

    Args:
        notes: of new tokens.
        memory: where the earlier ones are.
        reach: how many positions before its own each token's mean begins, at most; None: at its document's first.
        layer: which of its layers is for these notes.
        kept: what a layer of it has room for.
        queries: heads of queries that it expects; a multiple of ``kept.heads``.
        dtype: of keys and values.

    Raises:
        BadInput: notes are wider than what is kept of a token.
    """
    b, t, n = notes.shape
    heads, width, values = kept
    room = heads * (values or width)
    if n > room:
        raise BadInput(f"the router keeps {n} values of a token, but a layer has room for {room}; use more kv_heads")
    wide = jnp.pad(notes.astype(dtype), ((0, 0), (0, 0), (0, heads * width - n))).reshape(b, t, heads, width)
    if values is None:
        wide = shard(wide, "batch time kv_heads head_dim")
    alike = shard(jnp.zeros((b, t, queries, width), wide.dtype), "batch time heads head_dim")
    with jax.named_scope("notes"):
        found, memory = memory.attend(layer, alike, wide, wide if values is None else values, reach=reach)
    of_each = found[:, :, :: queries // heads]
    return of_each.reshape(b, t, -1)[..., :n].astype(jnp.float32), memory
