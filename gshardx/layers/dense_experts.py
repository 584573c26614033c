"""Experts for few tokens: read those that somebody chose, or all at once where that is most of them.

What a token gets depends on its own row alone: each of its experts' results is added in order of expert, in fp32,
whether the experts are computed one by one or together.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gshardx.layers.dispatch.dense import Shown
from gshardx.sharding import axis_size, manual

Activation = Callable[..., Array]
Weights = tuple[
    tuple[Float[Array, "e m h"], ...],
    tuple[Float[Array, "e h"], ...],
    Float[Array, "e h m"],
    Float[Array, "e m"] | None,
]
"""Into the hidden units, their biases if any, and out of them; as they are stored, quantised ones too."""


def as_dtype(weights: Weights, dtype: DTypeLike) -> Weights:
    """To compute with."""
    w_in, b_in, w_out, b_out = weights
    into, biases = (tuple(part.astype(dtype) for part in parts) for parts in (w_in, b_in))
    return into, biases, w_out.astype(dtype), None if b_out is None else b_out.astype(dtype)


def _of_one(weights: Weights, expert: Int[Array, ""]) -> Weights:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False), weights)


def dense_experts(activation: Activation, x: Shown, weights: Weights) -> Float[Array, "g s m"]:
    """The weighted sum of each token's experts.

    Args:
        activation: of the pre-activations.
        x: tokens and choices.
        weights: of all experts; on each device its own, along ``expert``.
    """
    devices, slices = axis_size("expert"), axis_size("tensor")

    def on_one(values: Array, experts: Array, gates: Array, scales: Array | None, weights: Weights) -> Array:
        b_out, count = weights[3], len(jax.tree.leaves(weights[2])[0])
        rows, own, gates = values.reshape(-1, values.shape[-1]), _flat(experts), _flat(gates)
        scales = None if scales is None else _flat(scales)
        if devices > 1:
            rows, own, gates, scales = jax.tree.map(
                lambda leaf: jax.lax.all_gather(leaf, "expert", tiled=True), (rows, own, gates, scales)
            )
            own -= jax.lax.axis_index("expert") * count
        gates = jnp.where((own >= 0) & (own < count), gates, 0.0)
        compute = _those_chosen if own.size < count else _all
        total = compute(activation, rows, own, gates, scales, weights, count)
        total = jax.lax.psum(total, "tensor") if slices > 1 else total
        if b_out is not None:
            exact = jax.lax.Precision.HIGHEST
            total += jnp.dot(_by_expert(gates, own, count), b_out.astype(jnp.float32), precision=exact)
        if devices > 1:
            total = jax.lax.psum_scatter(total, "expert", scatter_dimension=0, tiled=True)
        return total.astype(values.dtype).reshape(values.shape)

    by_expert = ("expert model hidden", "expert hidden", "expert hidden model", "expert model")
    on_each = manual(
        lambda values, experts, gates, scales, w_in, b_in, w_out, b_out: on_one(
            values, experts, gates, scales, (w_in, b_in, w_out, b_out)
        ),
        ("group", "group", "group", "group", *by_expert),
        "group",
        check_vma=False,
    )
    return on_each(x.values, x.experts, x.weights, x.input_weights, *weights)


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _by_expert(values: Float[Array, "n k"], own: Int[Array, "n k"], experts: int) -> Float[Array, "n e"]:
    return jnp.where(own[..., None] == jnp.arange(experts), values[..., None], 0.0).sum(1)


def _those_chosen(
    activation: Activation,
    rows: Float[Array, "n m"],
    own: Int[Array, "n k"],
    gates: Float[Array, "n k"],
    scales: Float[Array, "n k"] | None,
    weights: Weights,
    count: int,
) -> Float[Array, "n m"]:
    """One expert after the other, as many as have a token here: no other's weights are read."""
    by_expert = _by_expert(gates, own, count)
    by_scale = None if scales is None else _by_expert(scales, own, count)
    wanted = (by_expert != 0).any(0)
    order = jnp.argsort(~wanted, stable=True)

    def add(number: Array, total: Float[Array, "n m"]) -> Float[Array, "n m"]:
        expert = order[number]
        x = rows if by_scale is None else (rows * by_scale[:, expert, None]).astype(rows.dtype)
        w_in, b_in, w_out, _ = as_dtype(_of_one(weights, expert), rows.dtype)
        pre = tuple(x @ w for w in w_in)
        if b_in:
            pre = tuple(p + b for p, b in zip(pre, b_in, strict=True))
        return total + _weighted(activation(*pre) @ w_out, by_expert[:, expert])

    return jax.lax.fori_loop(0, wanted.sum(), add, jnp.zeros(rows.shape, jnp.float32))


def _all(
    activation: Activation,
    rows: Float[Array, "n m"],
    own: Int[Array, "n k"],
    gates: Float[Array, "n k"],
    scales: Float[Array, "n k"] | None,
    weights: Weights,
    count: int,
) -> Float[Array, "n m"]:
    """All at once, each with all tokens."""
    w_in, b_in, w_out, _ = as_dtype(weights, rows.dtype)
    e, (n, m) = count, rows.shape
    # Broadcast first: XLA's CPU compiler would transpose the weights for a product without a batch axis on the left.
    x = jnp.broadcast_to(rows, (e, n, m))
    if scales is not None:
        x = (x * _by_expert(scales, own, e).T[..., None]).astype(rows.dtype)
    pre = tuple(jnp.einsum("enm,emh->enh", x, w) for w in w_in)
    if b_in:
        pre = tuple(p + b[:, None] for p, b in zip(pre, b_in, strict=True))
    out = jnp.einsum("enh,ehm->enm", activation(*pre), w_out)

    order = jnp.argsort(own, axis=-1)
    experts, gates = (jnp.take_along_axis(x, order, axis=-1) for x in (own, gates))
    total = jnp.zeros((n, m), jnp.float32)
    for rank in range(own.shape[-1]):
        chosen = out[jnp.clip(experts[:, rank], 0, e - 1), jnp.arange(n)]
        total += _weighted(chosen, gates[:, rank])
    return total


def _weighted(out: Float[Array, "n m"], gate: Float[Array, "n"]) -> Float[Array, "n m"]:
    """0 times what is not finite is not 0; nor may a compiler fuse this product with the sum in one of the two ways."""
    return jnp.where(gate[:, None] != 0, out.astype(jnp.float32) * gate[:, None], 0.0)
