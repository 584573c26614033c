"""Experts that come and go during training: who exists, who is used, and what those have that were added.

Only a router's state changes after a step, so for an expert that is added it holds what its column and its threshold
lack in the parameters; these go on learning.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Population(NamedTuple):
    """What losses see: the experts' columns, and which of them exist."""

    columns: Float[Array, "m e"]
    exists: Bool[Array, "e"]


class Growth(NamedTuple):
    """What is added to the parameters' ``columns`` and ``thresholds``; of an expert just ``added``, those that it is to
    have, until the next call takes the parameters off. used: choices of each expert; unserved: the sum of the tokens
    that activated none; both over all devices, since experts last changed ``steps`` ago.
    """

    exists: Bool[Array, "e"]
    added: Bool[Array, "e"]
    columns: Float[Array, "m e"]
    thresholds: Float[Array, "e"]
    used: Float[Array, "e"]
    unserved: Float[Array, "m"]
    steps: Float[Array, ""]


def start(width: int, num_experts: int, initial: int) -> Growth:
    """With the first ``initial`` experts."""
    nobody, nothing = jnp.zeros(num_experts, bool), jnp.zeros(num_experts)
    exists = jnp.arange(num_experts) < initial
    zeros = jnp.zeros(width)
    return Growth(exists, nobody, jnp.zeros((width, num_experts)), nothing, nothing, zeros, jnp.zeros(()))


def settled(state: Growth, kernel: Float[Array, "m e"], threshold: Float[Array, "e"]) -> Growth:
    """Added experts have their column and threshold from here on, whatever the parameters in their place are."""
    kernel, threshold = jax.lax.stop_gradient((kernel, threshold))
    return state._replace(
        added=jnp.zeros_like(state.added),
        columns=jnp.where(state.added, state.columns - kernel, state.columns),
        thresholds=jnp.where(state.added, state.thresholds - threshold, state.thresholds),
    )


def change(state: Growth) -> Growth:
    """Without the experts that nobody used, unless nobody used any, and with one for the tokens that had none."""
    used = state.exists & (state.used > 0)
    stays = jnp.where(used.any(), used, state.exists)
    number = jnp.arange(len(stays))
    length = jnp.linalg.norm(state.unserved)
    added = (number == jnp.min(jnp.where(stays, len(stays), number))) & (length > 0)
    direction = state.unserved / jnp.where(length > 0, length, 1.0)
    return Growth(
        exists=stays | added,
        added=added,
        columns=jnp.where(added, direction[:, None], state.columns),
        thresholds=jnp.where(added, 0.0, state.thresholds),
        used=jnp.zeros_like(state.used),
        unserved=jnp.zeros_like(state.unserved),
        steps=jnp.zeros_like(state.steps),
    )
