"""Pre-norm transformer blocks, and a stack of repeating units that compiles once whatever its depth."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gshardx.layers.attention import Attention
from gshardx.layers.balance import Sums
from gshardx.layers.draws import dropout, folded
from gshardx.layers.experts import FeedForward
from gshardx.layers.latent import LatentAttention
from gshardx.layers.memory import Memory
from gshardx.layers.moe import MoE, MoEMetrics
from gshardx.layers.norm import NORMS, Norm
from gshardx.layers.notes import recalled
from gshardx.layers.remat import REMAT
from gshardx.layers.routing import Losses, Router, RouterState


class Block(nnx.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``, the latter dense or MoE.

    Args:
        width: m.
        attention, feed_forward: the two branches.
        dtypes: that each computes in; x keeps its own.
        dropout: share of each branch's output that training drops.
        norm, norm_epsilon: of both norms.
        residual_scale: factor on each branch's output; None: none.
    """

    def __init__(
        self,
        width: int,
        attention: Attention | LatentAttention,
        feed_forward: FeedForward | MoE,
        *,
        dtypes: tuple[str, str],
        dropout: float = 0.0,
        norm: Norm = "rms",
        norm_epsilon: float = 1e-6,
        residual_scale: float | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.attention_norm = NORMS[norm](width, rngs=rngs, epsilon=norm_epsilon)
        self.attention = attention
        self.feed_forward_norm = NORMS[norm](width, rngs=rngs, epsilon=norm_epsilon)
        self.feed_forward = feed_forward
        self.dtypes, self.dropout, self.residual_scale = dtypes, dropout, residual_scale

    def __call__(
        self,
        x: Float[Array, "b t m"],
        positions: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        memory: Memory,
        layer: int | Int[Array, ""],
        keys: Array | None,
        state: RouterState,
        ids: Int[Array, "b t"] | None = None,
        note_layer: int | Int[Array, ""] = -1,
    ) -> tuple[Float[Array, "b t m"], Memory, MoEMetrics | None]:
        """The output, the extended memory, and an MoE block's metrics.

        ``ids`` are the tokens', ``note_layer`` is where in the memory an MoE block's notes are: as routers may ask.
        """
        at_attention, at_output, at_router = (None if keys is None else folded(keys, site) for site in range(3))
        out, memory = self.attention(self.attention_norm(x, self.dtypes[0]), positions, memory, layer)
        x = x + self._branch(out, at_attention).astype(x.dtype)
        normed, metrics = self.feed_forward_norm(x, self.dtypes[1]), None
        if isinstance(self.feed_forward, MoE):
            room: dict[str, Any] = {"kept": self.attention.kept, "queries": self.attention.heads, "dtype": normed.dtype}
            mean_of = partial(recalled, layer=note_layer, **room)
            told, memory = self.feed_forward.router.recall(normed, ids, positions, memory, mean_of)
            out, metrics = self.feed_forward(normed, valid, at_router, state, ids, told)
        else:
            out = self.feed_forward(normed)
        return x + self._branch(out, at_output).astype(x.dtype), memory, metrics

    def _branch(self, out: Float[Array, "b t m"], keys: Array | None) -> Float[Array, "b t m"]:
        out = dropout(out, keys, self.dropout)
        return out if self.residual_scale is None else out * self.residual_scale


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
        first_layer: int | Int[Array, ""],
        keys: Array | None,
        state: RouterState,
        ids: Int[Array, "b t"] | None = None,
        note_layer: int | Int[Array, ""] = -1,
    ) -> tuple[Float[Array, "b t m"], Memory, MoEMetrics]:
        metrics = None
        for offset, block in enumerate([*self.dense, self.sparse]):
            layer = first_layer + offset
            own = None if keys is None else folded(keys, layer)
            x, memory, metrics = block(x, positions, valid, memory, layer, own, state, ids, note_layer)
        return x, memory, cast(MoEMetrics, metrics)


class Stack(nnx.Module):
    """``count`` units whose parameters are stacked along a leading layer axis and scanned over.

    Args:
        make: draws one unit.
        count: how many.
        first: number of the first one's first layer.
        remat: what the backward pass makes again; a name of :data:`gshardx.layers.remat.REMAT`.
    """

    def __init__(
        self, make: Callable[[nnx.Rngs], Unit], count: int, remat: str = "none", first: int = 0, *, rngs: nnx.Rngs
    ) -> None:
        @nnx.split_rngs(splits=count)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Unit:
            return make(rngs)

        self.units = stacked(rngs)
        for _, parameter in nnx.iter_graph(self.units):
            if isinstance(parameter, nnx.Param):
                parameter.set_metadata(axes=("layer", *parameter.get_metadata()["axes"]))
        self.count, self.remat, self.first = count, remat, first

    @property
    def router(self) -> Router:
        """Of every layer: its values are stacked, what it is they share."""
        return cast(MoE, self.units.sparse.feed_forward).router

    def initial_state(self) -> RouterState:
        """Of all layers' routers, stacked."""
        one = self.router.initial_state()
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.count, *leaf.shape)), one)

    def after_step(self, state: RouterState) -> RouterState:
        """:meth:`Router.after_step` of every layer."""
        return self.router.after_step_of_layers(state)

    def loss_values(self, sums: dict[str, Sums]) -> Losses:
        """Each layer's losses, from the sums of one or more batches."""
        return {name: jax.vmap(loss.value)(sums[name]) for name, loss in self.router.losses if name in sums}

    def __call__(
        self,
        x: Float[Array, "b t m"],
        positions: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        memory: Memory,
        keys: Array | None,
        state: RouterState,
        ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t m"], Memory, MoEMetrics]:
        graph, params = nnx.split(self.units)
        blocks = len(self.units.dense) + 1

        def step(carry, layer):  # type: ignore[no-untyped-def]
            x, memory = carry
            index, unit, state = layer
            number, note_layer = self.first + index * blocks, self.first + self.count * blocks + index
            merged = nnx.merge(graph, unit)
            x, memory, metrics = merged(x, positions, valid, memory, number, keys, state, ids, note_layer)
            return (x, memory), metrics

        layers = (jnp.arange(self.count), params, state)
        (x, memory), metrics = jax.lax.scan(REMAT[self.remat](step), (x, memory), layers)
        return x, memory, metrics


class Layers(Stack):
    """The same units, each with arrays of its own, computed in turn: for inference.

    A slice of stacked parameters would be copied each time (XLA's CPU compiler, jax 0.10), which doubles what a decode
    step reads and writes. Args as :class:`Stack`; where nothing is differentiated, ``remat`` has no effect.
    """

    def __init__(
        self, make: Callable[[nnx.Rngs], Unit], count: int, remat: str = "none", first: int = 0, *, rngs: nnx.Rngs
    ) -> None:
        self.separate = nnx.List([make(rngs) for _ in range(count)])
        self.count, self.remat, self.first = count, remat, first

    @property
    def router(self) -> Router:
        return cast(MoE, self.separate[0].sparse.feed_forward).router

    def __call__(
        self,
        x: Float[Array, "b t m"],
        positions: Int[Array, "b t"],
        valid: Bool[Array, "b t"],
        memory: Memory,
        keys: Array | None,
        state: RouterState,
        ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t m"], Memory, MoEMetrics]:
        found = []
        for index, unit in enumerate(self.separate):
            own = jax.tree.map(lambda leaf, index=index: leaf[index], state)
            blocks = len(unit.dense) + 1
            first, note_layer = self.first + index * blocks, self.first + self.count * blocks + index
            x, memory, metrics = unit(x, positions, valid, memory, first, keys, own, ids, note_layer)
            found.append(metrics)
        return x, memory, jax.tree.map(lambda *one_each: jnp.stack(one_each), *found)
