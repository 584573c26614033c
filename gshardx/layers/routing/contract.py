"""The contract between routers, dispatchers and the MoE layer.

A router says who goes where; it works on groups of tokens ``[g, s, m]`` and never looks outside a group, so that no
gate ever leaves its device.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class RouterStats(NamedTuple):
    """What happened in one layer; scalars of fp32, or one value a layer once stacked."""

    drop_fraction: Float[Array, "*layer"]
    """Share of the choices of real tokens that found no slot."""
    load_max_over_mean: Float[Array, "*layer"]
    """Choices of the busiest expert, dropped ones included, over the mean; 1.0 is perfect balance."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Where each token goes. ``experts``, ``slots``, ``keep`` and ``weights`` are ``[g, s, k]``.

    A choice that is not kept (no slot left, or padding) has weight 0.
    """

    experts: Int[Array, "g s k"]
    slots: Int[Array, "g s k"]
    """Place among the tokens of this group at this expert; at least ``capacity`` where there was no room."""
    keep: Bool[Array, "g s k"]
    weights: Float[Array, "g s k"]
    aux_loss: Float[Array, ""]
    """1.0 at perfect balance, whatever k."""
    stats: RouterStats
    num_experts: int = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})


class Router(Protocol):
    """Chooses experts. ``rng`` is None at inference, where a choice depends on its own token alone."""

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, capacity: int
    ) -> Routing: ...


def top_k(scores: Float[Array, "g s e"], k: int) -> Int[Array, "g s k"]:
    """The k best experts of each token, best first, lower index first among equals.

    k rounds of argmax: ``jax.lax.top_k`` is not partitioned on CPU and gathers every gate to every device.
    """
    ids = []
    for _ in range(k):
        best = jnp.argmax(scores, axis=-1)
        ids.append(best)
        scores = jnp.where(jax.nn.one_hot(best, scores.shape[-1], dtype=bool), -jnp.inf, scores)
    return jnp.stack(ids, axis=-1).astype(jnp.int32)


def take(values: Float[Array, "g s e"], experts: Int[Array, "g s k"]) -> Float[Array, "g s k"]:
    """``values`` at the chosen experts, by one-hot product: gathers and scatters of single floats are slow."""
    one_hot = jax.nn.one_hot(experts, values.shape[-1], dtype=values.dtype)
    return jnp.einsum("gske,gse->gsk", one_hot, values)


def assign_slots(experts: Int[Array, "g s k"], valid: Bool[Array, "g s"], num_experts: int) -> Int[Array, "g s k"]:
    """Number the tokens that chose each expert, from 0, within each group.

    Choice-major: every first choice of the group comes before any second choice (GShard, Algorithm 1). Padding takes no
    number. A choice that is rejected later still used its number, as in the paper's pseudo-code.
    """
    g, s, k = experts.shape
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.int32) * valid[..., None, None]
    in_order = chosen.transpose(0, 2, 1, 3).reshape(g, k * s, num_experts)
    before = jnp.cumsum(in_order, axis=1) - in_order
    slots = jnp.sum(before * in_order, axis=-1)
    return slots.reshape(g, k, s).transpose(0, 2, 1)


def statistics(
    experts: Int[Array, "g s k"], keep: Bool[Array, "g s k"], valid: Bool[Array, "g s"], num_experts: int
) -> RouterStats:
    """Statistics of real tokens' choices over all groups."""
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32) * valid[..., None, None]
    load = chosen.sum((0, 1, 2))
    total = jnp.maximum(load.sum(), 1.0)
    return RouterStats(
        drop_fraction=1.0 - jnp.sum(keep & valid[..., None]) / total,
        load_max_over_mean=load.max() * num_experts / total,
    )
