"""Whole MoE layers of public models' shapes on one accelerator, beside transformers'."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from gpu_loop import Clock, Function, Row, drawn, rates
from gpu_shapes import LOADS, SEQUENCE, LayerShape, logit_bias
from timing import Table, goal

from gshardx.layers import Capacity, Dispatcher, Experts, Gather, MoE, Ragged, TopKRouter, grouped


class Others(NamedTuple):
    """What another framework measured: seconds "forward" and "both" of each shape, number of tokens and load."""

    note: str
    rows: list[Row]


def table(clock: Clock, cases: list[tuple[LayerShape, int]], others: Others) -> Table:
    rows: list[Row] = []
    for shape, tokens in cases:
        rows += own_rows(clock, shape, tokens)
        rows += other_rows(clock, shape, tokens, others)
    return Table("MoE layers, useful FLOPs of their experts", rows, [*goals(rows), others.note])


def own_rows(clock: Clock, shape: LayerShape, tokens: int) -> Iterator[Row]:
    params = drawn_params(shape)
    x = drawn((max(tokens // SEQUENCE, 1), min(tokens, SEQUENCE), shape.width))
    for name, dispatcher, factor in candidates():
        forward, statistics = layer_functions(shape, dispatcher, factor)
        for load in LOADS:
            params = with_bias(params, logit_bias(load, shape.experts))
            dropped, busiest = (float(value) for value in statistics(x, params))
            flops = shape.forward_flops(tokens, kept=1 - dropped)
            row = labels(shape, tokens, load, name) | {"busiest / mean": busiest, "dropped %": 100 * dropped}
            yield row | clock.columns(forward, flops, shape.backward, x, params)


def labels(shape: LayerShape, tokens: int, load: str, layer: str) -> Row:
    return {"shape": shape.name, "tokens": tokens, "load": load, "layer": layer, "goal %": shape.goal}


def candidates() -> Iterator[tuple[str, Dispatcher, float | None]]:
    for factor in (1.0, 1.25):
        yield f"gshardx gather, capacity {factor}", Gather(), factor
    kernel = "tokamax" if grouped.has_fast_kernel(jax.default_backend()) else "XLA"
    yield f"gshardx ragged, dropless ({kernel})", Ragged(), None


def layer_functions(shape: LayerShape, dispatcher: Dispatcher, factor: float | None) -> tuple[Function, Function]:
    """Of ``(x, params)``: output and loss; share of choices dropped and busiest expert over mean."""
    graph, _ = nnx.split(abstract_layer(shape, dispatcher, factor), nnx.Param)

    def layer(x: jax.Array, params: Any) -> Any:
        return nnx.merge(graph, params)(x, jnp.ones(x.shape[:2], bool), jax.random.key(0))

    def forward(x: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        out, metrics = layer(x, params)
        return out, sum(metrics.losses.values())

    def statistics(x: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        stats = layer(x, params)[1].stats
        return stats.drop_fraction, stats.load_max_over_mean

    return forward, jax.jit(statistics)


def abstract_layer(shape: LayerShape, dispatcher: Dispatcher, factor: float | None) -> MoE:
    def build() -> MoE:
        rngs, capacity = nnx.Rngs(0), Capacity(factor)
        router = TopKRouter(shape.width, shape.experts, shape.top_k, bias=True, capacity=capacity, rngs=rngs)
        return MoE(router, dispatcher, Experts(shape.experts, shape.width, shape.hidden, "swiglu", rngs=rngs))

    return nnx.eval_shape(build)


def drawn_params(shape: LayerShape) -> Any:
    """Experts in bf16, and a router in fp32 whose logits have unit variance."""
    leaves, tree = jax.tree.flatten(nnx.state(abstract_layer(shape, Gather(), None), nnx.Param))

    def draw(leaf: Any, seed: int) -> jax.Array:
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else 1
        return drawn(leaf.shape, fan_in**-0.5, jnp.bfloat16 if leaf.ndim == 3 else jnp.float32, seed)

    return tree.unflatten(draw(leaf, seed) for seed, leaf in enumerate(leaves, start=1))


def with_bias(params: Any, bias: Any) -> Any:
    """The same weights with another bias of the router, the only vector."""
    return jax.tree.map(lambda leaf: jnp.asarray(bias) if leaf.ndim == 1 else leaf, params)


def other_rows(clock: Clock, shape: LayerShape, tokens: int, others: Others) -> Iterator[Row]:
    for found in others.rows:
        if (found["shape"], found["tokens"]) != (shape.name, tokens):
            continue
        row = labels(shape, tokens, found["load"], "transformers grouped_mm") | {
            "busiest / mean": None,
            "dropped %": 0.0,
        }
        flops = shape.forward_flops(tokens)
        row |= rates("fwd", found.get("forward"), flops, clock.ceiling)
        row |= rates("fwd+bwd", found.get("both"), 3 * flops, clock.ceiling)
        yield row | {"note": found.get("error", "")}


def goals(rows: list[Row]) -> Iterator[str]:
    """Of each shape and load: the best of gshardx's layers, whatever the number of tokens."""
    for shape, load in dict.fromkeys((row["shape"], row["load"]) for row in rows):
        own = [row for row in rows if (row["shape"], row["load"]) == (shape, load) and "gshardx" in row["layer"]]
        direction = "fwd+bwd" if any(row["fwd+bwd %"] for row in own) else "fwd"
        best = max(own, key=lambda row: row[f"{direction} %"] or 0.0)
        which = f"{best['layer']}, {best['tokens']:,} tokens, {best['dropped %']:.1f} % dropped"
        what = f"{shape}, {load} load, {direction} ({which})"
        yield goal(what, best[f"{direction} %"] or 0.0, best["goal %"], at_least=True, unit=" % of the ceiling")
