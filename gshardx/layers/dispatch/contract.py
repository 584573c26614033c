"""The contract between dispatchers, experts and the MoE layer."""

import dataclasses
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float, Int

from gshardx.layers.blending import Blend
from gshardx.layers.dense import Shown
from gshardx.layers.routing import Routing

Slots = Float[Array, "e g c m"]
"""Tokens in their experts' slots; empty slots are 0."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Tokens sorted by expert, without gaps, on each of d devices; d is 1 without a mesh.

    Device d holds the experts of its place on the mesh axis ``expert``. Its first ``sizes[d, 0]`` rows are its first
    expert's, and so on; rows after the last expert's mean nothing.
    """

    values: Float[Array, "d r m"]
    sizes: Int[Array, "d local_e"]
    plan: Any
    """The dispatcher's notes for the way back."""

    def with_values(self, values: Float[Array, "d r m"]) -> "Rows":
        return dataclasses.replace(self, values=values)


class Dispatcher(Protocol):
    """Sends tokens to their experts; ``combine`` brings back, weighted, what the experts made of what was sent."""

    def dispatch(self, tokens: Float[Array, "g s m"], routing: Routing) -> Slots | Rows | Shown | Blend: ...

    def combine(self, expert_out: Any, routing: Routing) -> Float[Array, "g s m"]: ...
