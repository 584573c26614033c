"""How others choose experts and slots; same results as the product's functions."""

import jax
import jax.numpy as jnp


def one_hot_slots(experts: jax.Array, wanted: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """GShard's Algorithm 1: each rank's one-hots, summed along the group, behind those of the ranks before it."""
    taken = jnp.zeros((experts.shape[0], 1, num_experts), jnp.int32)
    slots = []
    for rank in range(experts.shape[-1]):
        mask = jax.nn.one_hot(experts[..., rank], num_experts, dtype=jnp.int32) * wanted[..., rank, None]
        place = jnp.cumsum(mask, axis=1) - mask + taken
        slots.append(jnp.sum(place * mask, axis=-1))
        taken += mask.sum(1, keepdims=True)
    return jnp.stack(slots, axis=-1), taken[:, 0]


def argmax_rounds(scores: jax.Array, k: int) -> jax.Array:
    """The k best experts by k rounds of ``jnp.argmax``."""
    ids = []
    for _ in range(k):
        ids.append(jnp.argmax(scores, axis=-1))
        scores = jnp.where(jax.nn.one_hot(ids[-1], scores.shape[-1], dtype=bool), -jnp.inf, scores)
    return jnp.stack(ids, axis=-1)
