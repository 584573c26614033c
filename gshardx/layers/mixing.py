"""Dispatch into slots that hold sums of a group's tokens (Soft MoE, arXiv 2308.00951)."""

import dataclasses

from jaxtyping import Array, Float

from gshardx.layers.dispatch.slots import Einsum
from gshardx.layers.routing import Routing


@dataclasses.dataclass(frozen=True)
class Mixing(Einsum):
    """As :class:`Einsum` for ``mixed`` slots, where the weights are the masks: 4 s e c m FLOPs a group."""

    def mask(self, routing: Routing, weights: Float[Array, "g s k"]) -> Float[Array, "g s e c"]:
        return weights.reshape(*weights.shape[:2], routing.num_experts, routing.capacity)
