"""What a router is told of earlier tokens of a document: the mean of notes, from the memory that attention has.

A note is a short vector that a router makes of a token. Attention whose queries are zeros weighs all that a token may
look at alike, so the mean of notes is an attention without parameters, in one more layer of the memory: packed
documents stay apart in training, and whatever keeps keys and values for decoding keeps notes as well.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gshardx.errors import BadInput
from gshardx.layers.memory import Kept, Memory
from gshardx.sharding import shard


def recalled(
    notes: Float[Array, "b t n"], memory: Memory, layer: Any, kept: Kept, queries: int
) -> tuple[Float[Array, "b t n"], Memory]:
    """Mean of the notes of each token and the earlier ones of its document, fp32, and the memory that holds them now.

    Args:
        notes: of new tokens.
        memory: where the earlier ones are.
        layer: which of its layers is for these notes.
        kept: what a layer of it has room for.
        queries: heads of queries that it expects; a multiple of ``kept.heads``.

    Raises:
        BadInput: notes are wider than what is kept of a token.
    """
    b, t, n = notes.shape
    heads, width, values = kept
    room = heads * (values or width)
    if n > room:
        raise BadInput(f"the router keeps {n} values of a token, but a layer has room for {room}; use more kv_heads")
    wide = jnp.pad(notes, ((0, 0), (0, 0), (0, heads * width - n))).reshape(b, t, heads, width)
    if values is None:
        wide = shard(wide, "batch time kv_heads head_dim")
    alike = shard(jnp.zeros((b, t, queries, width), wide.dtype), "batch time heads head_dim")
    with jax.named_scope("notes"):
        found, memory = memory.attend(layer, alike, wide, wide if values is None else values)
    of_each = found[:, :, :: queries // heads]
    return of_each.reshape(b, t, -1)[..., :n].astype(jnp.float32), memory
