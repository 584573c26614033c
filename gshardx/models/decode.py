"""Inference with the training modules: a KV cache, one function that extends it, and sampling on the device.

A batch has a fixed number of rows and a fixed length of cache, whatever prompts are in it, and a row looks at nothing
but itself: each row is its own group of tokens, nothing is dropped, and shapes never change. So what a prompt gets back
does not depend on what else is in the batch.
"""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from gshardx.errors import BadInput
from gshardx.layers import KVCache
from gshardx.layers.routing import MergingRouter
from gshardx.models.attention import kept
from gshardx.models.build import Blueprint, Variables
from gshardx.sharding import abstract_array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What decoding carries from call to call; donated to each.

    k, v: ``[layer, b, l, q, d]``, v None where keys hold the values; length: tokens of each row that are stored;
    logits: fp32 scores of each row's next token.
    """

    k: Float[Array, "layer b l q d"]
    v: Float[Array, "layer b l q d"] | None
    length: Int[Array, "b"]
    logits: Float[Array, "b v"]


class Sampling(NamedTuple):
    """How each row draws its tokens, as arrays, so that no value compiles anything anew.

    temperature 0 takes the best token; top_k 0 and top_p 1.0 cut nothing.
    """

    temperature: Float[Array, "b"]
    top_k: Int[Array, "b"]
    top_p: Float[Array, "b"]
    seed: UInt32[Array, "b"]


def check_causal(plan: Blueprint) -> None:
    """Raise BadInput if a token's experts hang on tokens that a decoder has not written yet, or on groups."""
    router, moe = plan.bind(plan.params).stack.router, plan.config.moe
    if router.leak is not None:
        raise BadInput(f"model.moe.router = {moe.router} can't decode: {router.leak}; train with gshard or top_k")
    if isinstance(router, MergingRouter) and moe.group_size is not None:
        raise BadInput(
            f"model.moe.group_size = {moe.group_size}: stretches of {moe.router} begin anew in each group, of which "
            "decoding knows nothing; train without it"
        )


def abstract_state(blueprint: Blueprint, rows: int, length: int, mesh: Mesh) -> DecodeState:
    """Shapes, dtypes and shardings of a state for ``rows`` rows of at most ``length`` tokens.

    Raises:
        BadInput: the model's router is not causal.
    """
    check_causal(blueprint)
    config = blueprint.config
    heads, width, values = kept(config)
    cache = (blueprint.memory_layers, rows, length, heads, width)

    def place(shape: tuple[int, ...], dtype: str, axes: str) -> Any:
        return abstract_array(shape, jnp.dtype(dtype), axes.split(), mesh, tensor="decode state")

    return DecodeState(
        k=place(cache, config.dtype, KVCache.AXES if values is None else KVCache.SHARED),
        v=place(cache, config.dtype, KVCache.AXES) if values is None else None,
        length=place((rows,), "int32", "batch"),
        logits=place((rows, blueprint.vocab), "float32", "batch model"),
    )


def extend(
    blueprint: Blueprint, variables: Variables, state: DecodeState, tokens: Int[Array, "b n"], count: Int[Array, "b"]
) -> DecodeState:
    """Append to each row the first ``count`` of its ``tokens``; a row with count 0 stays as it is.

    Serves prefill (n tokens a call) and decode (n = 1) alike.
    """
    model = blueprint.bind(variables.params)
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    valid = offsets < count[:, None]
    capacity = state.k.shape[2]
    positions = state.length[:, None] + offsets
    memory = KVCache(state.k, state.v, jnp.where(valid, positions, capacity))
    hidden, extended, _ = model.hidden(tokens, positions, valid, memory, None, variables.router)
    cache = cast(KVCache, extended)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
    logits = jnp.where(count[:, None] > 0, model.logits(last)[:, 0], state.logits)
    return DecodeState(cache.k, cache.v, state.length + count, logits)


def sample(logits: Float[Array, "b v"], how: Sampling, position: Int[Array, "b"]) -> Int[Array, "b"]:
    """Draw each row's next token. The draw depends on the row's seed and position alone.

    top-k keeps the k best tokens; top-p (arXiv 1904.09751) the smallest set of best tokens whose probability, after
    top-k, reaches p.
    """
    scaled = logits / jnp.maximum(how.temperature, 1e-6)[:, None]
    best_first = jnp.argsort(-scaled, axis=-1)
    ordered = jnp.take_along_axis(scaled, best_first, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None]
    limit = jnp.where(how.top_k > 0, how.top_k, logits.shape[-1])[:, None]
    ordered = jnp.where(rank < limit, ordered, -jnp.inf)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    ordered = jnp.where((before < how.top_p[:, None]) | (rank == 0), ordered, -jnp.inf)

    def draw(seed: Array, position: Array, scores: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), scores)

    drawn = jax.vmap(draw)(how.seed, position, ordered)
    choice = jnp.where(how.temperature > 0, drawn, 0)
    return jnp.take_along_axis(best_first, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def decode_step(
    blueprint: Blueprint, variables: Variables, state: DecodeState, how: Sampling, active: Bool[Array, "b"]
) -> tuple[DecodeState, Int[Array, "b"]]:
    """Draw a token for each active row from its logits and append it."""
    tokens = sample(state.logits, how, state.length)
    return extend(blueprint, variables, state, tokens[:, None], active.astype(jnp.int32)), tokens
