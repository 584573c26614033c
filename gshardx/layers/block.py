"""Pre-norm transformer blocks, and a stack of repeating units that compiles once whatever its depth."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gshardx.layers.attention import Attention
from gshardx.layers.dispatch import ALL_TO_ALL_RESULTS
from gshardx.layers.experts import FeedForward
from gshardx.layers.memory import Memory
from gshardx.layers.moe import MoE, MoEMetrics
from gshardx.layers.norm import RMSNorm
from gshardx.layers.routing import Router, RouterState

REMAT: dict[str, Callable[..., Any]] = {
    "none": lambda step: step,
    "full": partial(jax.checkpoint, prevent_cse=False),  # a scan's body is not merged with its own repetition
    "keep_all_to_all": partial(
        jax.checkpoint,
        prevent_cse=False,
        policy=jax.checkpoint_policies.save_only_these_names(*ALL_TO_ALL_RESULTS),
    ),
}
"""What the backward pass makes again: nothing, all of a unit, or all but what arrived by all-to-all."""


class Block(nnx.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``, the latter dense or MoE."""

    def __init__(self, width: int, attention: Attention, feed_forward: FeedForward | MoE, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(width, rngs=rngs)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(width, rngs=rngs)
        self.feed_forward = feed_forward

    def attend(
        self, x: Float[Array, "b t m"], positions: Int[Array, "b t"], memory: Memory, layer: int | Int[Array, ""]
    ) -> tuple[Float[Array, "b t m"], Memory]:
        out, memory = self.attention(self.attention_norm(x), positions, memory, layer)
        return x + out, memory


class Unit(nnx.Module):
    """``every - 1`` dense blocks, then one MoE block: the pattern that a model repeats."""

    def __init__(self, dense: list[Block], sparse: Block) -> None:
        self.dense = nnx.List(dense)
        self.sparse = sparse

    def __call__(
        self,
        x: Float[Array, "b t m"],
        positions: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        memory: Memory,
        first_layer: Int[Array, ""],
        rng: Array | None,
        state: RouterState,
    ) -> tuple[Float[Array, "b t m"], Memory, MoEMetrics]:
        for offset, block in enumerate(self.dense):
            x, memory = block.attend(x, positions, memory, first_layer + offset)
            x = x + cast(FeedForward, block.feed_forward)(block.feed_forward_norm(x))
        x, memory = self.sparse.attend(x, positions, memory, first_layer + len(self.dense))
        out, metrics = cast(MoE, self.sparse.feed_forward)(self.sparse.feed_forward_norm(x), valid, rng, state)
        return x + out, memory, metrics


class Stack(nnx.Module):
    """``count`` units whose parameters are stacked along a leading layer axis and scanned over.

    Args:
        make: draws one unit.
        count: how many.
        remat: what the backward pass makes again; a name of :data:`REMAT`.
    """

    def __init__(self, make: Callable[[nnx.Rngs], Unit], count: int, remat: str = "none", *, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=count)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Unit:
            return make(rngs)

        self.units = stacked(rngs)
        for _, parameter in nnx.iter_graph(self.units):
            if isinstance(parameter, nnx.Param):
                parameter.set_metadata(axes=("layer", *parameter.get_metadata()["axes"]))
        self.count, self.remat = count, remat

    def initial_state(self) -> RouterState:
        """Of all layers' routers, stacked."""
        one = self._router.initial_state()
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.count, *leaf.shape)), one)

    def after_step(self, state: RouterState) -> RouterState:
        """:meth:`Router.after_step` of every layer."""
        return jax.vmap(self._router.after_step, axis_size=self.count)(state)

    @property
    def _router(self) -> Router:
        return cast(MoE, self.units.sparse.feed_forward).router

    def __call__(
        self,
        x: Float[Array, "b t m"],
        positions: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        memory: Memory,
        rng: Array | None,
        state: RouterState,
    ) -> tuple[Float[Array, "b t m"], Memory, MoEMetrics]:
        graph, params = nnx.split(self.units)
        blocks = len(self.units.dense) + 1
        rngs = None if rng is None else jax.random.split(rng, self.count)

        def step(carry, layer):  # type: ignore[no-untyped-def]
            x, memory = carry
            index, unit, rng, state = layer
            x, memory, metrics = nnx.merge(graph, unit)(x, positions, valid, memory, index * blocks, rng, state)
            return (x, memory), metrics

        layers = (jnp.arange(self.count), params, rngs, state)
        (x, memory), metrics = jax.lax.scan(REMAT[self.remat](step), (x, memory), layers)
        return x, memory, metrics
