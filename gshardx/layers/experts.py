"""Feed-forward networks: one for all tokens, or a batch of experts, each with its own weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gshardx.layers.param import fan_in_normal, param
from gshardx.sharding import shard

Activation = Callable[..., Array]

ACTIVATIONS: dict[str, Activation] = {
    "swiglu": lambda up, gate: jax.nn.silu(gate) * up,  # arXiv 2002.05202
    "relu": jax.nn.relu,  # GShard's
}


def _input_names(activation: str) -> tuple[str, ...]:
    """One matrix into the hidden units for each argument of the activation."""
    return ("w_up", "w_gate") if activation == "swiglu" else ("w_up",)


class FeedForward(nnx.Module):
    """``[b, t, m] -> [b, t, m]`` through h hidden units."""

    def __init__(self, width: int, hidden: int, activation: str, *, rngs: nnx.Rngs, output_scale: float = 1.0) -> None:
        self.activation = activation
        for name in _input_names(activation):
            setattr(self, name, param(rngs.params(), "embed hidden", (width, hidden), fan_in_normal(width)))
        self.w_down = param(rngs.params(), "hidden embed", (hidden, width), fan_in_normal(hidden, output_scale))

    def __call__(self, x: Float[Array, "b t m"]) -> Float[Array, "b t m"]:
        with jax.named_scope("feed_forward"):
            w_in = tuple(getattr(self, name)[...].astype(x.dtype)[None] for name in _input_names(self.activation))
            rows = x.reshape(1, -1, x.shape[-1])
            out = expert_mlp(ACTIVATIONS[self.activation], rows, w_in, self.w_down[...].astype(x.dtype)[None])
            return shard(out.reshape(x.shape), "batch time model")


class Experts(nnx.Module):
    """``[e, g, c, m] -> [e, g, c, m]``: expert e transforms the slots that were sent to it."""

    def __init__(
        self, count: int, width: int, hidden: int, activation: str, *, rngs: nnx.Rngs, output_scale: float = 1.0
    ) -> None:
        self.activation = activation
        for name in _input_names(activation):
            w = param(rngs.params(), "expert embed hidden", (count, width, hidden), fan_in_normal(width))
            setattr(self, name, w)
        self.w_down = param(
            rngs.params(), "expert hidden embed", (count, hidden, width), fan_in_normal(hidden, output_scale)
        )

    def __call__(self, x: Float[Array, "e g c m"]) -> Float[Array, "e g c m"]:
        with jax.named_scope("experts"):
            e, g, c, m = x.shape
            w_in = tuple(getattr(self, name)[...].astype(x.dtype) for name in _input_names(self.activation))
            rows = x.reshape(e, g * c, m)
            out = expert_mlp(ACTIVATIONS[self.activation], rows, w_in, self.w_down[...].astype(x.dtype))
            return shard(out.reshape(e, g, c, m), "expert expert_group slot model")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_mlp(
    activation: Activation,
    x: Float[Array, "e n m"],
    w_in: tuple[Float[Array, "e m h"], ...],
    w_out: Float[Array, "e h m"],
) -> Float[Array, "e n m"]:
    """``activation(x w_in[0], x w_in[1], ...) w_out`` for each expert.

    The gradient is written out for two reasons. It keeps only x and the pre-activations, and makes the hidden units
    again. And it makes the gradients of the pre-activations once: left alone, XLA's CPU compiler computed them a second
    time, element by element in transposed order, inside each weight gradient (jax 0.10).
    """
    return _forward(activation, x, w_in, w_out)[0]


def _forward(activation: Activation, x: Array, w_in: tuple[Array, ...], w_out: Array) -> tuple[Array, Any]:
    pre = tuple(jnp.einsum("enm,emh->enh", x, w) for w in w_in)
    return jnp.einsum("enh,ehm->enm", activation(*pre), w_out), (x, pre, w_in, w_out)


def _backward(activation: Activation, saved: Any, gradient: Float[Array, "e n m"]) -> tuple[Array, Any, Array]:
    x, pre, w_in, w_out = saved
    hidden, pull_back = jax.vjp(activation, *pre)
    d_pre = pull_back(jnp.einsum("enm,ehm->enh", gradient, w_out))
    hidden, d_pre, gradient, x = jax.lax.optimization_barrier((hidden, d_pre, gradient, x))
    d_x = [jnp.einsum("enh,emh->enm", d, w) for d, w in zip(d_pre, w_in, strict=True)]
    d_w_in = tuple(jnp.einsum("enm,enh->emh", x, d) for d in d_pre)
    return sum(d_x[1:], d_x[0]), d_w_in, jnp.einsum("enh,enm->ehm", hidden, gradient)


expert_mlp.defvjp(_forward, _backward)
