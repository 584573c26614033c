"""Experts arranged for inference: few tokens, and no more of the weights read than somebody needs.

What a token gets depends on its own row alone: each of its experts' results is added in order of expert, in fp32,
whether the experts are computed one by one or together.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from gshardx.layers.dense import Shown
from gshardx.layers.dispatch.contract import Slots
from gshardx.layers.experts import ACTIVATIONS, Experts
from gshardx.sharding import axis_size, manual, shard
from gshardx.sharding.axes import RULES, Rules

Activation = Callable[..., Array]


class Weights(NamedTuple):
    """Into the hidden units and out of them, as they are stored, quantised ones too; a inputs of the activation."""

    w_in: Float[Array, "e m a h"]
    b_in: Float[Array, "e a h"] | None
    w_out: Float[Array, "e h m"]
    b_out: Float[Array, "e m"] | None

    @property
    def experts(self) -> int:
        return len(jax.tree.leaves(self.w_out)[0])

    def as_dtype(self, dtype: DTypeLike) -> "Weights":
        """To compute with."""
        typed: Weights = jax.tree.map(
            lambda part: part.astype(dtype), self, is_leaf=lambda part: hasattr(part, "astype")
        )
        return typed

    def of(self, expert: Int[Array, ""]) -> "Weights":
        """One expert's, with a leading axis of 1."""
        one: Weights = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, expert, 1), self)
        return one


class _Tokens(NamedTuple):
    """Of one device: rows, the numbers of their experts among its own, and what each choice weighs."""

    rows: Float[Array, "n m"]
    own: Int[Array, "n k"]
    gates: Float[Array, "n k"]
    """0 where the expert is another device's."""
    scales: Float[Array, "n k"] | None
    """On inputs."""


SMALLEST = 8
"""Rows that :func:`_all` gives each expert at least: fewer are no faster, as the weights must be read (2 CPU cores)."""

SLICED: Rules = {**RULES, "expert": (), "hidden": ("expert", "tensor")}
_AXES = ("expert model choice hidden", "expert choice hidden", "expert hidden model", "expert model")


class MergedExperts(nnx.Module):
    """Experts whose input matrices are one: half as many products, each twice as large.

    Args:
        experts: what they are made of; with the parameters ``w_in``, ``w_down`` and, if any, ``b_in``, ``b_down``.
        sliced: split every expert's hidden units over the mesh axis ``expert``, instead of the experts (MoEShard, arXiv
            2503.08467): all devices read the same share of whatever experts are chosen. For :class:`Shown` tokens.
    """

    def __init__(self, experts: Experts, *, sliced: bool = False) -> None:
        self.activation, self.sliced = experts.activation, sliced
        parts = merged({name: value.get_value() for name, value in vars(experts).items() if _is_param(value)})
        rules = SLICED if sliced else RULES

        def param(name: str, axes: str) -> Any:
            return nnx.data(shard(nnx.Param(parts[name]), axes, rules, name=name) if name in parts else None)

        self.w_in = param("w_in", "expert embed choice hidden")
        self.w_down = param("w_down", "expert hidden embed")
        self.b_in, self.b_down = param("b_in", "expert choice hidden"), param("b_down", "expert embed")

    def __call__(self, x: Slots | Shown) -> Any:
        """As :class:`Experts`; of :class:`Shown` tokens come back the weighted sums."""
        with jax.named_scope("experts"):
            biases = (None if part is None else part[...] for part in (self.b_in, self.b_down))
            weights = Weights(self.w_in[...], next(biases), self.w_down[...], next(biases))
            activation = ACTIVATIONS[self.activation]
            if isinstance(x, Shown):
                return shown_to_all(activation, x, weights, sliced=self.sliced)
            e, g, c, m = x.shape
            out = _computed(activation, x.reshape(e, g * c, m), weights.as_dtype(x.dtype), biased=True)
            return shard(out.reshape(e, g, c, m), "expert expert_group slot model")


def merged(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of :class:`MergedExperts` from those of :class:`Experts`."""
    rest = {name: value for name, value in params.items() if name in ("w_down", "b_down")}
    for kind, axis in (("w", -2), ("b", -2)):
        parts = [params[f"{kind}_{name}"] for name in ("up", "gate") if f"{kind}_{name}" in params]
        if parts:
            rest[f"{kind}_in"] = jnp.stack(parts, axis)
    return rest


def _is_param(value: Any) -> bool:
    return isinstance(value, nnx.Param)


def shown_to_all(activation: Activation, x: Shown, weights: Weights, *, sliced: bool) -> Float[Array, "g s m"]:
    """The weighted sum of each token's experts.

    Args:
        activation: of the pre-activations.
        x: tokens and choices.
        weights: of all experts; on each device its own, or its slices of all.
        sliced: see :class:`MergedExperts`.
    """
    devices, slices = axis_size("expert"), axis_size("tensor")

    def on_one(values: Array, experts: Array, gates: Array, scales: Array | None, *parts: Any) -> Array:
        weights = Weights(*parts)
        tokens = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), _Tokens(values, experts, gates, scales))
        first: Any = 0
        if devices > 1:
            tokens = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, "expert", tiled=True), tokens)
            first = 0 if sliced else jax.lax.axis_index("expert") * weights.experts
        own = tokens.own - first
        gates = jnp.where((own >= 0) & (own < weights.experts), tokens.gates, 0.0)
        tokens = tokens._replace(own=own, gates=gates)
        shared_by = weights.experts if sliced else weights.experts * devices  # experts that the choices are among
        if own.size < shared_by:
            total = _those_chosen(activation, tokens, weights)
        else:
            total = _all(activation, tokens, weights, mean=own.size / shared_by)
        total = jax.lax.psum(total, "tensor") if slices > 1 else total
        if weights.b_out is not None:
            exact = jax.lax.Precision.HIGHEST
            biases = weights.b_out.astype(jnp.float32)
            if sliced and devices > 1:  # all devices have all of them: one adds them
                biases = jnp.where(jax.lax.axis_index("expert") == 0, biases, 0.0)
            total += jnp.dot(_by_expert(gates, own, weights.experts), biases, precision=exact)
        if devices > 1:
            total = jax.lax.psum_scatter(total, "expert", scatter_dimension=0, tiled=True)
        return total.astype(values.dtype).reshape(values.shape)

    rules = SLICED if sliced else RULES
    on_each = manual(on_one, ("group", "group", "group", "group", *_AXES), "group", rules, check_vma=False)
    return on_each(x.values, x.experts, x.weights, x.input_weights, *weights)


def _by_expert(values: Float[Array, "n k"], own: Int[Array, "n k"], experts: int) -> Float[Array, "n e"]:
    return jnp.where(own[..., None] == jnp.arange(experts), values[..., None], 0.0).sum(1)


def _computed(
    activation: Activation, x: Float[Array, "e n m"], weights: Weights, biased: bool
) -> Float[Array, "e n m"]:
    """Each expert's result for its rows; ``b_out`` only where asked for, as a slice of the hidden units has no part."""
    e, m, a, h = weights.w_in.shape
    pre = jnp.einsum("enm,emx->enx", x, weights.w_in.reshape(e, m, a * h)).reshape(e, -1, a, h)
    if weights.b_in is not None:
        pre += weights.b_in[:, None]
    out = jnp.einsum("enh,ehm->enm", activation(*(pre[:, :, number] for number in range(a))), weights.w_out)
    return out + weights.b_out[:, None] if biased and weights.b_out is not None else out


def _those_chosen(activation: Activation, tokens: _Tokens, weights: Weights) -> Float[Array, "n m"]:
    """One expert after the other, as many as have a token here: no other's weights are read."""
    rows, own, gates, scales = tokens
    by_expert = _by_expert(gates, own, weights.experts)
    by_scale = None if scales is None else _by_expert(scales, own, weights.experts)
    wanted = (by_expert != 0).any(0)
    order = jnp.argsort(~wanted, stable=True)

    def add(number: Array, total: Float[Array, "n m"]) -> Float[Array, "n m"]:
        expert = order[number]
        x = rows if by_scale is None else (rows * by_scale[:, expert, None]).astype(rows.dtype)
        out = _computed(activation, x[None], weights.of(expert).as_dtype(rows.dtype), biased=False)[0]
        return total + _weighted(out, by_expert[:, expert])

    return jax.lax.fori_loop(0, wanted.sum(), add, jnp.zeros(rows.shape, jnp.float32))


def _all(activation: Activation, tokens: _Tokens, weights: Weights, mean: float) -> Float[Array, "n m"]:
    """All experts at once: each for twice the mean of rows, or for all rows where one is wanted by more."""
    usual = max(SMALLEST, 1 << math.ceil(math.log2(2 * mean)))
    if usual >= len(tokens.rows):
        return _with_all_rows(activation, tokens, weights)
    chosen = _by_expert(tokens.gates, tokens.own, weights.experts) != 0
    return jax.lax.cond(
        chosen.sum(0).max() <= usual,
        lambda: _with_its_rows(activation, tokens, weights, chosen, usual),
        lambda: _with_all_rows(activation, tokens, weights),
    )


def _with_all_rows(activation: Activation, tokens: _Tokens, weights: Weights) -> Float[Array, "n m"]:
    rows, own, _, scales = tokens
    e, (n, m) = weights.experts, rows.shape
    # Broadcast first: XLA's CPU compiler would transpose the weights for a product without a batch axis on the left.
    x = jnp.broadcast_to(rows, (e, n, m))
    if scales is not None:
        x = (x * _by_expert(scales, own, e).T[..., None]).astype(rows.dtype)
    return _summed(activation, x, jnp.broadcast_to(jnp.arange(n)[:, None], (n, e)), tokens, weights)


def _with_its_rows(
    activation: Activation, tokens: _Tokens, weights: Weights, chosen: Bool[Array, "n e"], size: int
) -> Float[Array, "n m"]:
    """Each expert for ``size`` rows, those that chose it before others; none was chosen by more."""
    rows, own, _, scales = tokens
    e = weights.experts
    at = jnp.argsort(~chosen, axis=0, stable=True)[:size].T
    x = rows[at]
    if scales is not None:
        x = (x * _by_expert(scales, own, e).T[jnp.arange(e)[:, None], at, None]).astype(rows.dtype)
    return _summed(activation, x, jnp.cumsum(chosen, axis=0) - 1, tokens, weights)


def _summed(
    activation: Activation, x: Float[Array, "e c m"], place: Int[Array, "n e"], tokens: _Tokens, weights: Weights
) -> Float[Array, "n m"]:
    """What the experts make of ``x``, added up for each token, which stands at ``place`` of each that it chose."""
    rows, own, gates, _ = tokens
    out = _computed(activation, x, weights.as_dtype(rows.dtype), biased=False)
    order = jnp.argsort(own, axis=-1)
    experts = jnp.take_along_axis(jnp.clip(own, 0, weights.experts - 1), order, axis=-1)
    gates, place = jnp.take_along_axis(gates, order, axis=-1), jnp.take_along_axis(place, experts, axis=-1)

    def add(rank: Array, total: Float[Array, "n m"]) -> Float[Array, "n m"]:
        return total + _weighted(out[experts[:, rank], place[:, rank]], gates[:, rank])

    # A loop, as above: unrolled, XLA's CPU compiler rounds these sums otherwise (fused multiply-adds).
    return jax.lax.fori_loop(0, own.shape[-1], add, jnp.zeros(rows.shape, jnp.float32))


def _weighted(out: Float[Array, "n m"], gate: Float[Array, "n"]) -> Float[Array, "n m"]:
    """0 times what is not finite is not 0."""
    return jnp.where(gate[:, None] != 0, out.astype(jnp.float32) * gate[:, None], 0.0)
