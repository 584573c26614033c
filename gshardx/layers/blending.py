"""Experts merged by weight: every token of a stretch goes through one network, a weighted mean of the experts.

    W_n = sum_e R_ne W_e,  b_n = sum_e R_ne b_e           for stretch n and each matrix of an expert; fp32
    y = W_n,out act(W_n,in x + b_n,in) + b_n,out

No token is sent anywhere: where experts are split over devices, their weights are.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gshardx.layers.routing import Routing
from gshardx.sharding import axis_size, manual

_EXACT = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blend:
    """n stretches of l tokens in each group, and how much of each expert the network of a stretch has; fp32."""

    tokens: Float[Array, "g n l m"]
    mix: Float[Array, "g n e"]


@dataclasses.dataclass(frozen=True)
class Blending:
    """For routers that say how long a stretch is (``Routing.stretch``). Tokens stay where they are."""

    def dispatch(self, tokens: Float[Array, "g s m"], routing: Routing) -> Blend:
        if routing.stretch is None:
            raise TypeError("Blending merges experts for stretches of tokens; pair it with a router that has some")
        g, s, m = tokens.shape
        stretches = g, s // routing.stretch, routing.stretch
        experts, weights = (x.reshape(*stretches, -1) for x in (routing.experts, routing.weights))
        # All real tokens of a stretch have the same; so the first one's. Not their maximum: recomputed with other
        # rounding it equals none of them, and its gradient is 0 / 0 (XLA's CPU compiler without optimisation).
        real = routing.keep.any(-1).reshape(stretches)
        first = real & (jnp.cumsum(real, axis=-1) == 1)
        weights = jnp.where(first[..., None], weights, 0.0).sum(2)
        chosen = experts[:, :, 0, :, None] == jnp.arange(routing.num_experts, dtype=experts.dtype)
        mix = jnp.where(chosen, weights[..., None], 0.0).sum(2)
        return Blend(tokens.reshape(*stretches, m), mix)

    def combine(self, expert_out: Float[Array, "g n l m"], routing: Routing) -> Float[Array, "g s m"]:
        g, s, _ = routing.keep.shape
        return jnp.where(routing.keep.any(-1, keepdims=True), expert_out.reshape(g, s, -1), 0.0)


def through_blends(
    activation: Callable[..., Array],
    mlp: Callable[..., Array],
    x: Blend,
    w_in: tuple[Float[Array, "e m h"], ...],
    b_in: tuple[Float[Array, "e h"], ...],
    w_out: Float[Array, "e h m"],
    b_out: Float[Array, "e m"] | None,
) -> Float[Array, "g n l m"]:
    """Each token through the network of its stretch; ``mlp`` is :func:`gshardx.layers.experts.expert_mlp`.

    Where experts are split over devices, all their weights are gathered there: once a layer, whatever the number of
    stretches, and what is gathered or merged is not kept. The backward pass makes it again, and sends each device the
    sum of its experts' gradients.
    """
    devices, slices = axis_size("expert"), axis_size("tensor")

    @jax.checkpoint
    def on_one(tokens: Array, mix: Array, *experts: Any) -> Array:
        if devices > 1:
            experts = jax.tree.map(partial(jax.lax.all_gather, axis_name="expert", tiled=True), experts)
        g, n, stretch, m = tokens.shape
        mix = mix.reshape(g * n, -1)
        w_in, b_in, w_out, b_out = experts
        if stretch == 1:
            out = _mixed(activation, tokens.reshape(g * n, m), mix, w_in, b_in, w_out)[:, None]
        else:
            merged = (jax.tree.map(partial(_merged, mix), part) for part in (w_in, b_in, w_out))
            out = mlp(activation, tokens.reshape(g * n, stretch, m), *merged, None)
        out = jax.lax.psum(out, "tensor") if slices > 1 else out
        if b_out is not None:
            out += _merged(mix, b_out)[:, None]
        return out.reshape(tokens.shape)

    axes = ("group", "group", "expert model hidden", "expert hidden", "expert hidden model", "expert model")
    return manual(on_one, axes, "group", check_vma=False)(x.tokens, x.mix, w_in, b_in, w_out, b_out)


def _merged(mix: Float[Array, "r e"], weights: Float[Array, "e *w"]) -> Float[Array, "r *w"]:
    """Added up in fp32."""
    total = jnp.einsum("re,e...->r...", mix, weights.astype(jnp.float32), precision=_EXACT)
    return total.astype(weights.dtype)


def _mixed(
    activation: Callable[..., Array],
    tokens: Float[Array, "r m"],
    mix: Float[Array, "r e"],
    w_in: tuple[Float[Array, "e m h"], ...],
    b_in: tuple[Float[Array, "e h"], ...],
    w_out: Float[Array, "e h m"],
) -> Float[Array, "r m"]:
    """The same where each token has a network of its own, without its weights: ``x sum_e R_e W_e`` is ``sum_e R_e x
    W_e``. As many FLOPs as merging takes, and e rows a token instead of a matrix."""

    def product(x: Array, weights: Array) -> Array:
        scaled = (mix[..., None] * x[:, None].astype(jnp.float32)).astype(x.dtype)
        return jnp.einsum("rei,eio->ro", scaled, weights)

    pre = [product(tokens, w) for w in w_in]
    if b_in:
        pre = [p + _merged(mix, b) for p, b in zip(pre, b_in, strict=True)]
    return product(activation(*pre), w_out)
