"""Moving rows by index: two functions, each the other's transpose, so that no gradient is ever a scatter-add.

``slot`` says where each choice of a token goes, ``source`` which choice (``token * k + rank``) each of n places reads.
The two are inverse to each other; one past the end (n, or s * k) stands for nowhere, and reads zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Weights = Float[Array, "g s k"] | None


def inverse(slot: Int[Array, "g s k"], n: int) -> Int[Array, "g n"]:
    """``source`` for ``slot``."""
    g, s, k = slot.shape
    choices = jnp.broadcast_to(jnp.arange(s * k, dtype=jnp.int32), (g, s * k))
    empty = jnp.full((g, n), s * k, jnp.int32)
    write = jax.vmap(lambda row, at, choice: row.at[at].set(choice, mode="drop", unique_indices=True))
    return write(empty, slot.reshape(g, -1), choices)


@jax.custom_vjp
def spread(
    tokens: Float[Array, "g s m"], weights: Weights, slot: Int[Array, "g s k"], source: Int[Array, "g n"]
) -> Float[Array, "g n m"]:
    """Place n is the token that ``source`` names, times the weight of that choice (1 without weights)."""
    rows = _rows(tokens, source // slot.shape[-1])
    if weights is None:
        return rows
    by = _rows(weights.reshape(len(weights), -1, 1), source)
    return (rows * by).astype(rows.dtype)


@jax.custom_vjp
def collect(
    rows: Float[Array, "g n m"], weights: Weights, slot: Int[Array, "g s k"], source: Int[Array, "g n"]
) -> Float[Array, "g s m"]:
    """Each token is the sum of the rows in its slots, weighted; added up in fp32."""
    total: Any = 0.0
    for rank in range(slot.shape[-1]):
        part = _rows(rows, slot[..., rank]).astype(jnp.float32)
        total += part if weights is None else part * weights[..., rank, None]
    return jnp.asarray(total).astype(rows.dtype)


def _spread_forward(tokens: Array, weights: Weights, slot: Array, source: Array) -> tuple[Array, Any]:
    return spread(tokens, weights, slot, source), (tokens if weights is not None else None, weights, slot, source)


def _spread_backward(saved: Any, gradient: Float[Array, "g n m"]) -> tuple[Any, ...]:
    tokens, weights, slot, source = saved
    to_weights = None if weights is None else _products(gradient, slot, tokens)
    return collect(gradient, weights, slot, source), to_weights, _no_gradient(slot), _no_gradient(source)


def _collect_forward(rows: Array, weights: Weights, slot: Array, source: Array) -> tuple[Array, Any]:
    return collect(rows, weights, slot, source), (rows if weights is not None else None, weights, slot, source)


def _collect_backward(saved: Any, gradient: Float[Array, "g s m"]) -> tuple[Any, ...]:
    rows, weights, slot, source = saved
    to_weights = None if weights is None else _products(rows, slot, gradient)
    return spread(gradient, weights, slot, source), to_weights, _no_gradient(slot), _no_gradient(source)


spread.defvjp(_spread_forward, _spread_backward)
collect.defvjp(_collect_forward, _collect_backward)


def _products(
    rows: Float[Array, "g n m"], slot: Int[Array, "g s k"], tokens: Float[Array, "g s m"]
) -> Float[Array, "g s k"]:
    """The inner product of each token with the row of each of its choices, fp32."""
    each = [
        jnp.einsum("gsm,gsm->gs", _rows(rows, slot[..., rank]), tokens, preferred_element_type=jnp.float32)
        for rank in range(slot.shape[-1])
    ]
    return jnp.stack(each, axis=-1)


def _rows(x: Float[Array, "g n m"], index: Int[Array, "g i"]) -> Float[Array, "g i m"]:
    return jax.vmap(lambda one, at: one.at[at].get(mode="fill", fill_value=0))(x, index)


def _no_gradient(index: Int[Array, "*i"]) -> Any:
    return np.zeros(index.shape, jax.dtypes.float0)
