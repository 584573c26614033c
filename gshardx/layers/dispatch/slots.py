"""Dispatch into capacity slots ``[e, g, c, m]``: GShard's one-hot einsums, and the same by index.

Both cross the group-split / expert-split boundary in the same two private functions, where XLA's partitioner writes the
all-to-all.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gshardx.layers.dispatch.contract import Slots
from gshardx.layers.dispatch.rows import collect, inverse, spread
from gshardx.layers.routing import Routing
from gshardx.sharding import reshard

ALL_TO_ALL_RESULTS = ("moe_at_experts", "moe_at_groups")
"""Names (``jax.ad_checkpoint``) of what arrives by all-to-all: rematerialisation that saves these repeats none."""

_AT_GROUPS, _AT_EXPERTS = "experts_here group slot model", "expert expert_group slot model"


@dataclasses.dataclass(frozen=True)
class Einsum:
    """GShard's one-hot form (arXiv 2006.16668 Algorithm 2): obvious, and S/H times the experts' FLOPs.

    wire: type in which tokens travel between devices, for example ``jnp.bfloat16``; None: as they are.
    """

    wire: DTypeLike | None = None

    def dispatch(self, tokens: Float[Array, "g s m"], routing: Routing) -> Slots:
        mask = jnp.einsum("gskec->gsec", _one_hot(routing))
        if routing.input_weights is not None:
            mask = jnp.einsum("gskec,gsk->gsec", _one_hot(routing), routing.input_weights)
        return _to_experts(jnp.einsum("gsec,gsm->gecm", mask.astype(tokens.dtype), tokens), self.wire)

    def combine(self, expert_out: Slots, routing: Routing) -> Float[Array, "g s m"]:
        weighted = jnp.einsum("gskec,gsk->gsec", _one_hot(routing), routing.weights)
        rows = _to_groups(expert_out, self.wire)
        return jnp.einsum("gsec,gecm->gsm", weighted, rows.astype(jnp.float32)).astype(expert_out.dtype)


@dataclasses.dataclass(frozen=True)
class Gather:
    """Slots as indices: gathers in forward and backward, no ``[s, e, c]`` tensor, O(s k m) memory.

    wire: as in :class:`Einsum`.
    """

    wire: DTypeLike | None = None

    def dispatch(self, tokens: Float[Array, "g s m"], routing: Routing) -> Slots:
        slot, source = _indices(routing)
        rows = spread(tokens, routing.input_weights, slot, source)
        g, _, m = rows.shape
        return _to_experts(rows.reshape(g, routing.num_experts, routing.capacity, m), self.wire)

    def combine(self, expert_out: Slots, routing: Routing) -> Float[Array, "g s m"]:
        slot, source = _indices(routing)
        rows = _to_groups(expert_out, self.wire)
        g, e, c, m = rows.shape
        return collect(rows.reshape(g, e * c, m), routing.weights, slot, source)


def _to_experts(rows: Float[Array, "g e c m"], wire: DTypeLike | None) -> Slots:
    arrived = _travel(rows.transpose(1, 0, 2, 3), _AT_GROUPS, _AT_EXPERTS, wire)
    return checkpoint_name(arrived, ALL_TO_ALL_RESULTS[0])


def _to_groups(expert_out: Slots, wire: DTypeLike | None) -> Float[Array, "g e c m"]:
    arrived = _travel(expert_out, _AT_EXPERTS, _AT_GROUPS, wire)
    return checkpoint_name(arrived, ALL_TO_ALL_RESULTS[1]).transpose(1, 0, 2, 3)


def _travel(x: Slots, from_: str, to: str, wire: DTypeLike | None) -> Slots:
    return reshard(x, from_, to) if wire is None else _travel_as(x, from_, to, jnp.dtype(wire))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _travel_as(x: Slots, from_: str, to: str, wire: np.dtype) -> Slots:
    """``reshard`` of the bits of ``x`` in type ``wire``, both ways: as numbers, XLA's CPU compiler would widen them
    again before they leave.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(wire), f"uint{8 * wire.itemsize}")
    return jax.lax.bitcast_convert_type(reshard(bits, from_, to), wire).astype(x.dtype)


def _travel_forward(x: Slots, from_: str, to: str, wire: np.dtype) -> tuple[Slots, None]:
    return _travel_as(x, from_, to, wire), None


def _travel_backward(from_: str, to: str, wire: np.dtype, saved: None, gradient: Slots) -> tuple[Slots]:
    return (_travel_as(gradient, to, from_, wire),)


_travel_as.defvjp(_travel_forward, _travel_backward)


def _one_hot(routing: Routing) -> Float[Array, "g s k e c"]:
    expert = jax.nn.one_hot(routing.experts, routing.num_experts)
    slot = jax.nn.one_hot(routing.slots, routing.capacity)
    return jnp.einsum("gske,gskc,gsk->gskec", expert, slot, routing.keep.astype(jnp.float32))


def _indices(routing: Routing) -> tuple[Int[Array, "g s k"], Int[Array, "g n"]]:
    """The slot of each choice among n = e * c, and its inverse."""
    n = routing.num_experts * routing.capacity
    slot = jnp.where(routing.keep, routing.experts * routing.capacity + routing.slots, n)
    return slot, inverse(slot, n)
