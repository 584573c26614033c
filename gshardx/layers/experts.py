"""Feed-forward networks: one for all tokens, or a batch of experts, each with its own weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gshardx.layers.blending import Blend, through_blends
from gshardx.layers.dense import Shown
from gshardx.layers.dispatch.contract import Rows, Slots
from gshardx.layers.grouped import grouped_matmul
from gshardx.layers.param import fan_in_normal, param
from gshardx.sharding import axis_size, manual, shard

Activation = Callable[..., Array]


def clamped_swiglu(up: Array, gate: Array) -> Array:
    """GPT-OSS: ``(up + 1) * gate * sigmoid(1.702 * gate)``, gate at most 7 and up within 7 of 0."""
    gate = jnp.minimum(gate, 7.0)
    return (jnp.clip(up, -7.0, 7.0) + 1.0) * gate * jax.nn.sigmoid(1.702 * gate)


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": lambda up, gate: jax.nn.silu(gate) * up,  # arXiv 2002.05202
    "geglu": lambda up, gate: jax.nn.gelu(gate) * up,  # the same paper
    "clamped_swiglu": clamped_swiglu,
    "relu": jax.nn.relu,  # GShard's
    "gelu": jax.nn.gelu,
}
"""Of the hidden units; those with two arguments are gated."""


def _input_names(activation: str) -> tuple[str, ...]:
    """One matrix into the hidden units for each argument of the activation."""
    return ("up", "gate") if activation.endswith("glu") else ("up",)


class FeedForward(nnx.Module):
    """``[b, t, m] -> [b, t, m]`` through h hidden units."""

    def __init__(self, width: int, hidden: int, activation: str, *, rngs: nnx.Rngs, output_scale: float = 1.0) -> None:
        self.activation = activation
        for name in _input_names(activation):
            w = param(rngs.params(), "embed hidden", (width, hidden), fan_in_normal(width))
            setattr(self, f"w_{name}", w)
        self.w_down = param(rngs.params(), "hidden embed", (hidden, width), fan_in_normal(hidden, output_scale))

    def __call__(self, x: Float[Array, "b t m"]) -> Float[Array, "b t m"]:
        with jax.named_scope("feed_forward"):
            w_in = tuple(
                getattr(self, f"w_{name}")[...].astype(x.dtype)[None] for name in _input_names(self.activation)
            )
            rows = x.reshape(1, -1, x.shape[-1])
            out = expert_mlp(ACTIVATIONS[self.activation], rows, w_in, (), self.w_down[...].astype(x.dtype)[None], None)
            return shard(out.reshape(x.shape), "batch time model")


class Experts(nnx.Module):
    """Expert e transforms the tokens that were sent to it: slots ``[e, g, c, m]``, or :class:`Rows`; the same comes
    back. Of a :class:`Blend` all together transform each stretch.

    Args:
        count: e.
        width: m.
        hidden: h.
        activation: a name of :data:`ACTIVATIONS`.
        biases: add a bias to each of an expert's matrix products.
        output_scale: factor on the initial output matrix.
    """

    def __init__(
        self,
        count: int,
        width: int,
        hidden: int,
        activation: str,
        *,
        biases: bool = False,
        rngs: nnx.Rngs,
        output_scale: float = 1.0,
    ) -> None:
        self.activation, self.biases = activation, biases
        zeros = jax.nn.initializers.zeros
        for name in _input_names(activation):
            w = param(rngs.params(), "expert embed hidden", (count, width, hidden), fan_in_normal(width))
            setattr(self, f"w_{name}", w)
            if biases:
                setattr(self, f"b_{name}", param(rngs.params(), "expert hidden", (count, hidden), zeros))
        down = fan_in_normal(hidden, output_scale)
        self.w_down = param(rngs.params(), "expert hidden embed", (count, hidden, width), down)
        self.b_down = param(rngs.params(), "expert embed", (count, width), zeros) if biases else None

    def __call__(self, x: Slots | Rows | Blend) -> Any:
        if isinstance(x, Shown):
            raise TypeError("Dense shows every token to every expert; pair it with MergedExperts(experts)")
        with jax.named_scope("experts"):
            given = x.values if isinstance(x, Rows) else x.tokens if isinstance(x, Blend) else x
            dtype = given.dtype
            names = _input_names(self.activation)
            w_in = tuple(getattr(self, f"w_{name}")[...].astype(dtype) for name in names)
            b_in = tuple(getattr(self, f"b_{name}")[...].astype(dtype) for name in names if self.biases)
            b_out = None if self.b_down is None else self.b_down[...].astype(dtype)
            weights = (w_in, b_in, self.w_down[...].astype(dtype), b_out)
            if isinstance(x, Rows):
                return _on_rows(ACTIVATIONS[self.activation], x, *weights)
            if isinstance(x, Blend):
                return through_blends(ACTIVATIONS[self.activation], expert_mlp, x, *weights)
            e, g, c, m = x.shape
            out = expert_mlp(ACTIVATIONS[self.activation], x.reshape(e, g * c, m), *weights)
            return shard(out.reshape(e, g, c, m), "expert expert_group slot model")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_mlp(
    activation: Activation,
    x: Float[Array, "e n m"],
    w_in: tuple[Float[Array, "e m h"], ...],
    b_in: tuple[Float[Array, "e h"], ...],
    w_out: Float[Array, "e h m"],
    b_out: Float[Array, "e m"] | None,
) -> Float[Array, "e n m"]:
    """``activation(x w_in[0] + b_in[0], ...) w_out + b_out`` for each expert; ``b_in`` is empty without biases.

    The gradient is written out for two reasons. It keeps only x and the pre-activations, and makes the hidden units
    again. And it makes the gradients of the pre-activations once: left alone, XLA's CPU compiler computed them a second
    time, element by element in transposed order, inside each weight gradient (jax 0.10).
    """
    return _forward(activation, x, w_in, b_in, w_out, b_out)[0]


def _forward(
    activation: Activation,
    x: Array,
    w_in: tuple[Array, ...],
    b_in: tuple[Array, ...],
    w_out: Array,
    b_out: Array | None,
) -> tuple[Array, Any]:
    pre = tuple(jnp.einsum("enm,emh->enh", x, w) for w in w_in)
    if b_in:
        pre = tuple(p + b[:, None] for p, b in zip(pre, b_in, strict=True))
    out = jnp.einsum("enh,ehm->enm", activation(*pre), w_out)
    return out if b_out is None else out + b_out[:, None], (x, pre, w_in, b_in, w_out, b_out)


def _backward(activation: Activation, saved: Any, gradient: Float[Array, "e n m"]) -> tuple[Any, ...]:
    x, pre, w_in, b_in, w_out, b_out = saved
    hidden, pull_back = jax.vjp(activation, *pre)
    d_pre = pull_back(jnp.einsum("enm,ehm->enh", gradient, w_out))
    hidden, d_pre, gradient, x = jax.lax.optimization_barrier((hidden, d_pre, gradient, x))
    d_x = [jnp.einsum("enh,emh->enm", d, w) for d, w in zip(d_pre, w_in, strict=True)]
    d_w_in = tuple(jnp.einsum("enm,enh->emh", x, d) for d in d_pre)
    d_b_in = tuple(d.sum(1) for d in d_pre[: len(b_in)])
    d_b_out = None if b_out is None else gradient.sum(1)
    return sum(d_x[1:], d_x[0]), d_w_in, d_b_in, jnp.einsum("enh,enm->ehm", hidden, gradient), d_b_out


expert_mlp.defvjp(_forward, _backward)


def _on_rows(
    activation: Activation,
    x: Rows,
    w_in: tuple[Float[Array, "e m h"], ...],
    b_in: tuple[Float[Array, "e h"], ...],
    w_out: Float[Array, "e h m"],
    b_out: Float[Array, "e m"] | None,
) -> Rows:
    """The same for rows sorted by expert, on each device with its own experts."""
    partial_sums = axis_size("tensor") > 1

    def on_one(
        values: Float[Array, "1 r m"],
        sizes: Int[Array, "1 e"],
        w_in: tuple[Array, ...],
        b_in: tuple[Array, ...],
        w_out: Array,
        b_out: Array | None,
    ) -> Float[Array, "1 r m"]:
        rows, counts = values[0], sizes[0]
        pre = tuple(grouped_matmul(rows, w, counts) for w in w_in)
        if b_in:
            pre = tuple(p + _of_each_row(b, counts, p) for p, b in zip(pre, b_in, strict=True))
        out = grouped_matmul(activation(*pre), w_out, counts)
        out = jax.lax.psum(out, "tensor") if partial_sums else out
        return (out if b_out is None else out + _of_each_row(b_out, counts, out))[None]

    axes = ("group", "group", "expert model hidden", "expert hidden", "expert hidden model", "expert model")
    on_each = manual(on_one, axes, "group", check_vma=False)
    return x.with_values(on_each(x.values, x.sizes, w_in, b_in, w_out, b_out))


def _of_each_row(biases: Float[Array, "e h"], counts: Int[Array, "e"], like: Float[Array, "r h"]) -> Array:
    """Its expert's bias for each row, by a one-hot product, so that the gradient is one too and adds up in fp32."""
    end = jnp.cumsum(counts)
    row = jnp.arange(len(like), dtype=counts.dtype)[:, None]
    one_hot = ((row < end) & (row >= end - counts)).astype(jnp.float32)
    return jnp.dot(one_hot, biases.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST).astype(like.dtype)
