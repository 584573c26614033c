"""How tokens travel: a dispatcher is a value with two verbs, dispatch and combine.

Both forms cross the group-split / expert-split boundary in the same two private functions, where XLA's partitioner
writes the all-to-all.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gshardx.layers.routing import Routing
from gshardx.sharding import reshard

Slots = Float[Array, "e g c m"]


class Dispatcher(Protocol):
    """Sends tokens to their experts' slots and brings the results back, weighted."""

    def dispatch(self, tokens: Float[Array, "g s m"], routing: Routing) -> Slots: ...

    def combine(self, expert_out: Slots, routing: Routing) -> Float[Array, "g s m"]: ...


class Einsum:
    """GShard's one-hot form (Algorithm 2): obvious, and S/H times the experts' FLOPs."""

    def dispatch(self, tokens: Float[Array, "g s m"], routing: Routing) -> Slots:
        mask = _one_hot(routing).sum(2).astype(tokens.dtype)
        return _to_experts(jnp.einsum("gsec,gsm->gecm", mask, tokens))

    def combine(self, expert_out: Slots, routing: Routing) -> Float[Array, "g s m"]:
        weighted = jnp.einsum("gskec,gsk->gsec", _one_hot(routing), routing.weights)
        return jnp.einsum("gsec,gecm->gsm", weighted.astype(expert_out.dtype), _to_groups(expert_out))


class Gather:
    """Slots as indices: gathers in forward and backward, no ``[s, e, c]`` tensor, O(s k m) memory."""

    def dispatch(self, tokens: Float[Array, "g s m"], routing: Routing) -> Slots:
        slot, source = _indices(routing)
        rows = _send(tokens, slot, source // routing.experts.shape[-1])
        g, _, m = rows.shape
        return _to_experts(rows.reshape(g, routing.num_experts, routing.capacity, m))

    def combine(self, expert_out: Slots, routing: Routing) -> Float[Array, "g s m"]:
        slot, source = _indices(routing)
        rows = _to_groups(expert_out)
        g, e, c, m = rows.shape
        return _receive(rows.reshape(g, e * c, m), routing.weights.astype(rows.dtype), slot, source)


def _to_experts(rows: Float[Array, "g e c m"]) -> Slots:
    transposed = rows.transpose(1, 0, 2, 3)
    return reshard(transposed, "experts_here group slot model", "expert expert_group slot model")


def _to_groups(expert_out: Slots) -> Float[Array, "g e c m"]:
    moved = reshard(expert_out, "expert expert_group slot model", "experts_here group slot model")
    return moved.transpose(1, 0, 2, 3)


def _one_hot(routing: Routing) -> Float[Array, "g s k e c"]:
    expert = jax.nn.one_hot(routing.experts, routing.num_experts)
    slot = jax.nn.one_hot(routing.slots, routing.capacity)
    return jnp.einsum("gske,gskc,gsk->gskec", expert, slot, routing.keep.astype(jnp.float32))


def _indices(routing: Routing) -> tuple[Int[Array, "g s k"], Int[Array, "g n"]]:
    """The slot of each choice and, its inverse, the choice (``token * k + rank``) of each slot, n = e * c.

    A choice without a slot points at n, a slot without a choice at s * k: one past the end, where gathers read zero.
    """
    g, s, k = routing.experts.shape
    n = routing.num_experts * routing.capacity
    slot = jnp.where(routing.keep, routing.experts * routing.capacity + routing.slots, n)
    choices = jnp.broadcast_to(jnp.arange(s * k, dtype=jnp.int32), (g, s * k))
    empty = jnp.full((g, n), s * k, jnp.int32)
    source = jax.vmap(lambda row, at, choice: row.at[at].set(choice, mode="drop"))(empty, slot.reshape(g, -1), choices)
    return slot, source


def _rows(x: Float[Array, "g n m"], index: Int[Array, "g *i"]) -> Float[Array, "g *i m"]:
    """Rows of ``x`` at ``index``, zero where the index is past the end."""
    return jax.vmap(lambda one, at: one.at[at].get(mode="fill", fill_value=0))(x, index)


def _no_gradient(index: Array) -> Any:
    return np.zeros(index.shape, jax.dtypes.float0)


@jax.custom_vjp
def _send(tokens: Float[Array, "g s m"], slot: Int[Array, "g s k"], token: Int[Array, "g n"]) -> Float[Array, "g n m"]:
    """Each slot reads its token; the gradient of a token is read back from its slots."""
    return _rows(tokens, token)


def _send_forward(tokens: Array, slot: Array, token: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rows(tokens, token), (slot, token)


def _send_backward(saved: tuple[Array, Array], gradient: Float[Array, "g n m"]) -> tuple[Any, Any, Any]:
    slot, token = saved
    ranks = [_rows(gradient, slot[..., rank]) for rank in range(slot.shape[-1])]
    return sum(ranks[1:], ranks[0]), _no_gradient(slot), _no_gradient(token)


_send.defvjp(_send_forward, _send_backward)


@jax.custom_vjp
def _receive(
    rows: Float[Array, "g n m"], weights: Float[Array, "g s k"], slot: Int[Array, "g s k"], source: Int[Array, "g n"]
) -> Float[Array, "g s m"]:
    """Each token adds the rows of its slots by weight; each slot reads its gradient back from its token."""
    parts = [_rows(rows, slot[..., rank]) * weights[..., rank, None] for rank in range(slot.shape[-1])]
    return sum(parts[1:], parts[0])


def _receive_forward(rows: Array, weights: Array, slot: Array, source: Array) -> tuple[Array, tuple[Array, ...]]:
    return _receive(rows, weights, slot, source), (rows, weights, slot, source)


def _receive_backward(saved: tuple[Array, ...], gradient: Float[Array, "g s m"]) -> tuple[Any, ...]:
    rows, weights, slot, source = saved
    g, s, k = weights.shape
    flat = weights.reshape(g, s * k)
    weight_of_slot = jax.vmap(lambda one, at: one.at[at].get(mode="fill", fill_value=0))(flat, source)
    to_rows = _rows(gradient, source // k) * weight_of_slot[..., None]
    to_weights = [jnp.einsum("gsm,gsm->gs", _rows(rows, slot[..., rank]), gradient) for rank in range(k)]
    return to_rows, jnp.stack(to_weights, axis=-1), _no_gradient(slot), _no_gradient(source)


_receive.defvjp(_receive_forward, _receive_backward)
