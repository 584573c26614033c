"""Pre-norm transformer blocks, and a stack of repeating units that compiles once whatever its depth."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gshardx.layers.attention import Attention
from gshardx.layers.experts import FeedForward
from gshardx.layers.memory import Memory
from gshardx.layers.moe import MoE, MoEMetrics
from gshardx.layers.norm import RMSNorm


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
    ) -> tuple[Float[Array, "b t m"], Memory, MoEMetrics]:
        for offset, block in enumerate(self.dense):
            x, memory = block.attend(x, positions, memory, first_layer + offset)
            x = x + cast(FeedForward, block.feed_forward)(block.feed_forward_norm(x))
        x, memory = self.sparse.attend(x, positions, memory, first_layer + len(self.dense))
        out, metrics = cast(MoE, self.sparse.feed_forward)(self.sparse.feed_forward_norm(x), valid, rng)
        return x + out, memory, metrics


class Stack(nnx.Module):
    """``count`` units whose parameters are stacked along a leading layer axis and scanned over."""

    def __init__(self, make: Callable[[nnx.Rngs], Unit], count: int, *, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=count)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Unit:
            return make(rngs)

        self.units = stacked(rngs)
        for _, parameter in nnx.iter_graph(self.units):
            if isinstance(parameter, nnx.Param):
                parameter.set_metadata(axes=("layer", *parameter.get_metadata()["axes"]))
        self.count = count

    def __call__(
        self,
        x: Float[Array, "b t m"],
        positions: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        memory: Memory,
        rng: Array | None,
    ) -> tuple[Float[Array, "b t m"], Memory, MoEMetrics]:
        graph, params = nnx.split(self.units)
        blocks = len(self.units.dense) + 1
        rngs = None if rng is None else jax.random.split(rng, self.count)

        def step(carry, layer):  # type: ignore[no-untyped-def]
            x, memory = carry
            index, unit, rng = layer
            x, memory, metrics = nnx.merge(graph, unit)(x, positions, valid, memory, index * blocks, rng)
            return (x, memory), metrics

        (x, memory), metrics = jax.lax.scan(step, (x, memory), (jnp.arange(self.count), params, rngs))
        return x, memory, metrics
