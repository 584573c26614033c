"""Dispatch into capacity slots ``[e, g, c, m]``: GShard's one-hot einsums, and the same by index."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gshardx.layers.dispatch.carry import Wire, carry
from gshardx.layers.dispatch.contract import Slots
from gshardx.layers.dispatch.rows import collect, inverse, spread
from gshardx.layers.routing import Routing
from gshardx.sharding import reshard

_EXACT = jax.lax.Precision.HIGHEST  # or accelerators would round what is only moved
_AT_GROUPS, _AT_EXPERTS = "experts_here group slot model", "expert expert_group slot model"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Boundary:
    """Slots split by group, there split by expert: XLA's partitioner writes the all-to-all."""

    def there(self, x: Slots) -> Slots:
        return reshard(x, _AT_GROUPS, _AT_EXPERTS)

    def back(self, x: Slots) -> Slots:
        return reshard(x, _AT_EXPERTS, _AT_GROUPS)


@dataclasses.dataclass(frozen=True)
class Einsum:
    """GShard's one-hot form (arXiv 2006.16668 Algorithm 2): obvious, and S/H times the experts' FLOPs.

    wire: type in which tokens travel between devices.
    """

    wire: Wire = None

    def dispatch(self, tokens: Float[Array, "g s m"], routing: Routing) -> Slots:
        weights = jnp.ones_like(routing.weights) if routing.input_weights is None else routing.input_weights
        mask = self.mask(routing, weights)
        rows = jnp.einsum("gsec,gsm->gecm", mask, tokens.astype(jnp.float32), precision=_EXACT)
        return _to_experts(rows.astype(tokens.dtype), self.wire)

    def combine(self, expert_out: Slots, routing: Routing) -> Float[Array, "g s m"]:
        weighted = self.mask(routing, routing.weights)
        rows = _to_groups(expert_out, self.wire)
        out = jnp.einsum("gsec,gecm->gsm", weighted, rows.astype(jnp.float32), precision=_EXACT)
        return out.astype(expert_out.dtype)

    def mask(self, routing: Routing, weights: Float[Array, "g s k"]) -> Float[Array, "g s e c"]:
        return jnp.einsum("gskec,gsk->gsec", _one_hot(routing), weights)


@dataclasses.dataclass(frozen=True)
class Gather:
    """By index: gathers both ways, no ``[s, e, c]`` tensor, O(s k m) memory. Args as :class:`Einsum`."""

    wire: Wire = None

    def dispatch(self, tokens: Float[Array, "g s m"], routing: Routing) -> Slots:
        routing.check_whole("gather")
        slot, source = _indices(routing)
        rows = spread(tokens, routing.input_weights, slot, source)
        g, _, m = rows.shape
        return _to_experts(rows.reshape(g, routing.num_experts, routing.capacity, m), self.wire)

    def combine(self, expert_out: Slots, routing: Routing) -> Float[Array, "g s m"]:
        slot, source = _indices(routing)
        rows = _to_groups(expert_out, self.wire)
        g, e, c, m = rows.shape
        return collect(rows.reshape(g, e * c, m), routing.weights, slot, source)


def _to_experts(rows: Float[Array, "g e c m"], wire: Wire) -> Slots:
    return carry(True, wire, rows.transpose(1, 0, 2, 3), _Boundary())


def _to_groups(expert_out: Slots, wire: Wire) -> Float[Array, "g e c m"]:
    return carry(False, wire, expert_out, _Boundary()).transpose(1, 0, 2, 3)


def _one_hot(routing: Routing) -> Float[Array, "g s k e c"]:
    expert = jax.nn.one_hot(routing.experts, routing.num_experts)
    slot = jax.nn.one_hot(routing.slots, routing.capacity)
    return jnp.einsum("gske,gskc,gsk->gskec", expert, slot, routing.keep.astype(jnp.float32))


def _indices(routing: Routing) -> tuple[Int[Array, "g s k"], Int[Array, "g n"]]:
    """The slot of each choice among n = e * c, and its inverse."""
    n = routing.num_experts * routing.capacity
    slot = jnp.where(routing.keep, routing.experts * routing.capacity + routing.slots, n)
    return slot, inverse(slot, n)
