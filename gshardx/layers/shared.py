"""Dense networks beside the routed experts: how their output joins."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gshardx.layers.experts import FeedForward
from gshardx.layers.param import param


class Beside(Protocol):
    """``(x, routed) -> out``, all ``[b, t, m]``."""

    def __call__(self, x: Float[Array, "b t m"], routed: Float[Array, "b t m"]) -> Float[Array, "b t m"]: ...


def nothing(x: Float[Array, "b t m"], routed: Float[Array, "b t m"]) -> Float[Array, "b t m"]:
    """Routed experts only."""
    return routed


class Shared(nnx.Module):
    """``routed + ffn(x)``: shared experts (DeepSeekMoE, arXiv 2401.06066), or Arctic's residual dense branch."""

    def __init__(self, feed_forward: FeedForward) -> None:
        self.feed_forward = feed_forward

    def __call__(self, x: Float[Array, "b t m"], routed: Float[Array, "b t m"]) -> Float[Array, "b t m"]:
        return routed + self.feed_forward(x)


class GatedShared(nnx.Module):
    """``routed + sigmoid(x w) ffn(x)``: Qwen's shared expert."""

    def __init__(self, width: int, feed_forward: FeedForward, *, rngs: nnx.Rngs) -> None:
        self.feed_forward = feed_forward
        self.gate = param(rngs.params(), "embed", (width,), jax.nn.initializers.normal(0.02))

    def __call__(self, x: Float[Array, "b t m"], routed: Float[Array, "b t m"]) -> Float[Array, "b t m"]:
        gate = jax.nn.sigmoid(jnp.einsum("btm,m->bt", x, self.gate[...].astype(x.dtype)))
        return routed + gate[..., None] * self.feed_forward(x)


class Residual(nnx.Module):
    """``c_0 routed + c_1 ffn(x)`` with ``c = softmax(x w + b)``: PR-MoE (DeepSpeed-MoE, arXiv 2201.05596 section
    4.1).
    """

    def __init__(self, width: int, feed_forward: FeedForward, *, rngs: nnx.Rngs) -> None:
        self.feed_forward = feed_forward
        self.kernel = param(rngs.params(), "embed router", (width, 2), jax.nn.initializers.normal(0.02))
        self.bias = param(rngs.params(), "router", (2,), jax.nn.initializers.zeros)

    def __call__(self, x: Float[Array, "b t m"], routed: Float[Array, "b t m"]) -> Float[Array, "b t m"]:
        logits = jnp.einsum("btm,mc->btc", x.astype(jnp.float32), self.kernel[...]) + self.bias[...]
        share = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        return share[..., :1] * routed + share[..., 1:] * self.feed_forward(x)
