"""Tokens shown to all experts, which take those that chose them: no slots, so none can be dropped."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gshardx.layers.routing import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shown:
    """Tokens as they are, their choices, and what each choice weighs; 0 for one that is not kept."""

    values: Float[Array, "g s m"]
    experts: Int[Array, "g s k"]
    weights: Float[Array, "g s k"]
    input_weights: Float[Array, "g s k"] | None


@dataclasses.dataclass(frozen=True)
class Dense:
    """For few tokens, as in a decoding step: :class:`gshardx.layers.merged_experts.MergedExperts` do the rest.

    Where experts are split over devices, tokens go to all of these and sums come back: 2 (d - 1) s m values of a group
    of s tokens, where slots without drops would send 2 (d - 1) s m e / d.
    """

    def dispatch(self, tokens: Float[Array, "g s m"], routing: Routing) -> Shown:
        routing.check_whole("Dense")
        return Shown(tokens, routing.experts, jnp.where(routing.keep, routing.weights, 0.0), routing.input_weights)

    def combine(self, expert_out: Float[Array, "g s m"], routing: Routing) -> Float[Array, "g s m"]:
        return expert_out
