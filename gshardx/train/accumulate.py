"""Gradients of a batch in micro-batches, equal to those of the whole batch at once.

Every part of the objective is a function of sums over tokens, and the gradient of a function of sums is one number for
each sum (its slope) times the sum's gradient. Sums of micro-batches add up, so that with the slopes at the whole
batch's sums the micro-batches' gradients add up too. Slopes of means are known beforehand: 1 / tokens. Losses that
multiply two sums of the whole batch ("batch", "device", "communication", "sparsity", ...) need a forward pass over all
micro-batches first; it is made only if one of them has a weight. With ``token_drop`` it counts the tokens that are
left, and XLA leaves out the rest of it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gshardx.layers import RouterState, RouterStats
from gshardx.layers.balance import Sums
from gshardx.layers.routing.statistics import merged
from gshardx.models.build import Params
from gshardx.sharding import shard
from gshardx.train.objective import Batch, TokenLosses


class Outcome(NamedTuple):
    """Of a forward pass: sums, and what is not summed."""

    tokens: TokenLosses
    losses: dict[str, Sums]
    stats: RouterStats
    router: RouterState
    """After this pass."""
    experts: Int[Array, "layer b t k"] | None

    def add(self, later: "Outcome") -> "Outcome":
        """Of both together; the state is the later's, and choices are left out."""
        tokens, losses = jax.tree.map(jnp.add, (self.tokens, self.losses), (later.tokens, later.losses))
        return Outcome(tokens, losses, merged(self.stats, later.stats), later.router, None)


Forward = Callable[[Params, Batch, Array, RouterState], Outcome]
"""Of parameters, rows, their keys and the routers' state."""

Weighted = Callable[[TokenLosses, dict[str, Sums]], Float[Array, ""]]
"""The objective, of sums."""


def gradients(
    forward: Forward, weighted: Weighted, params: Params, batch: Batch, keys: Array, router: RouterState
) -> tuple[Params, Outcome]:
    """Of the whole batch at once."""

    def objective(params: Params) -> tuple[Array, Outcome]:
        outcome = forward(params, batch, keys, router)
        return weighted(outcome.tokens, outcome.losses), outcome

    return jax.grad(objective, has_aux=True)(params)


class Micro(NamedTuple):
    """How a batch is cut."""

    steps: int
    together: int
    """Neighbouring rows that share a group of tokens."""
    places: Params
    """Shardings in which the gradients add up."""
    losses: tuple[str, ...]
    """Auxiliary losses that are part of the objective."""
    whole: bool
    """Whether all real tokens are routed."""


def accumulated(
    forward: Forward,
    weighted: Weighted,
    params: Params,
    batch: Batch,
    keys: Array,
    router: RouterState,
    micro: Micro,
) -> tuple[Params, Outcome]:
    """The same as :func:`gradients`, one micro-batch after the other."""
    pieces = jax.tree.map(lambda x: cut(x, micro.steps, micro.together), (batch, keys))
    shapes = jax.eval_shape(forward, params, *jax.tree.map(lambda x: x[0], pieces), router)
    empty: Outcome = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    empty = empty._replace(router=router, experts=None)

    def look(total: Outcome, piece: tuple[Batch, Array]) -> tuple[Outcome, None]:
        return total.add(forward(params, *piece, total.router)), None

    seen = {name: empty.losses[name] for name in micro.losses}
    # The slope of a mean is 1 / tokens, whatever the total.
    if micro.whole and all(len(sums) == 2 for sums in seen.values()):
        real = jnp.sum(batch.segments > 0).astype(jnp.float32)
        seen = {name: (total, jnp.full_like(total, real)) for name, (total, _) in seen.items()}
    else:
        seen = jax.lax.scan(look, empty, pieces)[0].losses
    slopes = jax.lax.stop_gradient(jax.grad(weighted, argnums=(0, 1))(empty.tokens, seen))

    def linear(tokens: TokenLosses, losses: dict[str, Sums]) -> Array:
        found = (tokens, {name: losses[name] for name in seen})
        products = jax.tree.map(lambda slope, total: jnp.sum(slope * total), slopes, found)
        return jnp.asarray(sum(jax.tree.leaves(products)))

    def step(carry: tuple[Params, Outcome], piece: tuple[Batch, Array]) -> tuple[tuple[Params, Outcome], Any]:
        gradient, total = carry
        more, outcome = gradients(forward, linear, params, *piece, total.router)
        gradient = jax.lax.with_sharding_constraint(jax.tree.map(jnp.add, gradient, more), micro.places)
        return (gradient, total.add(outcome)), outcome.experts

    zeros = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), micro.places)
    (gradient, total), experts = jax.lax.scan(step, (zeros, empty), pieces)
    if experts is not None:  # [micro, layer, b, t, k] -> [layer, b, t, k]
        experts = jax.vmap(lambda x: joined(x, micro.together), in_axes=1)(experts)
    return gradient, total._replace(experts=experts)


def rows_together(sequence_length: int, group_size: int | None) -> int:
    """Rows after which groups and rows start together again."""
    return math.lcm(group_size or sequence_length, sequence_length) // sequence_length


def cut(rows: Array, steps: int, together: int) -> Array:
    """``[b, ...] -> [steps, b / steps, ...]``: micro-batch i has every ``steps``-th block of ``together`` rows, so that
    each device keeps its own."""
    blocks = rows.reshape(-1, steps, together, *rows.shape[1:])
    pieces = jnp.moveaxis(blocks, 1, 0).reshape(steps, -1, *rows.shape[1:])
    return shard(pieces, "micro batch time") if pieces.ndim == 3 else pieces


def joined(pieces: Array, together: int) -> Array:
    """The inverse of :func:`cut`."""
    steps, rows, *rest = pieces.shape
    blocks = jnp.moveaxis(pieces.reshape(steps, -1, together, *rest), 0, 1)
    return blocks.reshape(steps * rows, *rest)
