"""Which experts of a layer can go with the least change of its output on some text (Expert Sparsity, arXiv 2402.14800):

    S* = argmin over sets S of r experts of || F(x) - F_S(x) ||,    F_S: the router chooses, and weighs, within S

over all sets where they are few, else by taking away one expert at a time, the one whose loss is least (greedy).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from gshardx.convert.calibrate import Batch
from gshardx.convert.surgery import fewer
from gshardx.errors import BadInput
from gshardx.infer.load import LoadedRun
from gshardx.layers import Layers, MoE, Packed
from gshardx.layers.shared import Beside
from gshardx.models.build import Blueprint, Params, Variables, blueprint
from gshardx.models.moe import build_router

EXHAUSTIVE = 1_000
"""Sets that are all looked at; where there are more, the search is greedy."""

Error = Callable[[tuple[int, ...]], float]
"""Of a set of experts, ascending."""


def best_set(count: int, keep: int, error: Error) -> tuple[int, ...]:
    """The ``keep`` of ``count`` experts with the least error."""
    if math.comb(count, keep) <= EXHAUSTIVE:
        return min(itertools.combinations(range(count), keep), key=error)
    left = tuple(range(count))
    while len(left) > keep:
        left = min(itertools.combinations(left, len(left) - 1), key=error)
    return left


def kept_by_reconstruction(run: LoadedRun, text: Sequence[Batch], keep: int) -> list[tuple[tuple[int, ...], float]]:
    """For each MoE layer the experts that stay, and the change of its routed output relative to the output's norm.

    Each layer is judged on the whole model's own inputs. In memory are, of one layer at a time, all experts' outputs
    for all tokens.

    Raises:
        BadInput: weights that multiply experts' inputs.
    """
    if run.config.model.moe.router_options.get("weigh") == "input":
        raise BadInput("--by reconstruction: model.moe.router_options.weigh = input is not supported; use --by choices")
    plan, params = _separate(run)
    inputs = layer_inputs(run, text)
    with jax.set_mesh(run.mesh):
        found = []
        for number, unit in enumerate(plan.bind(params).stack.separate):  # type: ignore[attr-defined]
            state = jax.tree.map(lambda leaf, number=number: leaf[number], run.variables.router)
            error = _error(run, cast(MoE, unit.sparse.feed_forward), state, inputs[number])
            stay = best_set(plan.config.moe.num_experts, keep, error)
            found.append((stay, error(stay)))
    return found


def _separate(run: LoadedRun) -> tuple[Blueprint, Params]:
    """The model with layers that are not stacked."""
    plan = blueprint(run.config.model, run.blueprint.vocab, run.mesh, stack=Layers)
    stacked = run.variables.params["stack"]["units"]
    units = {i: jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(plan.config.moe_layers)}
    return plan, {**run.variables.params, "stack": {"separate": units}}


def layer_inputs(run: LoadedRun, text: Sequence[Batch]) -> list[Float[np.ndarray, "n m"]]:
    """What each MoE layer of the whole model is given, real tokens alone."""
    plan, params = _separate(run)

    @jax.jit
    def forward(variables: Variables, tokens: Array, valid: Array) -> list[Array]:
        model: Any = plan.bind(variables.params)
        seen: list[Array] = []
        for unit in model.stack.separate:
            moe = unit.sparse.feed_forward
            moe.beside = _noting(moe.beside, seen)
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        model.hidden(tokens, places, valid, Packed.of(valid.astype(jnp.int32)), None, variables.router)
        return seen

    given = Variables(params, run.variables.router)
    with jax.set_mesh(run.mesh):
        batches = [(forward(given, jnp.asarray(one.tokens), jnp.asarray(one.valid)), one.valid) for one in text]
    layers = range(len(batches[0][0]))
    return [np.concatenate([np.asarray(seen[layer])[valid] for seen, valid in batches]) for layer in layers]


def _noting(beside: Beside, seen: list[Array]) -> Beside:
    """The same, and what it is given is appended to ``seen``."""

    def noting(x: Array, routed: Array) -> Array:
        seen.append(x)
        return beside(x, routed)

    return noting


def _error(run: LoadedRun, moe: MoE, state: Any, x: Float[np.ndarray, "n m"]) -> Error:
    """Of sets of a layer's experts."""
    tokens, count = jnp.asarray(x)[None], run.config.model.moe.num_experts
    outputs = moe.experts(jnp.broadcast_to(tokens, (count, *tokens.shape)))[:, 0].astype(jnp.float32)
    kernel, bias = moe.router.kernel[...], moe.router.bias  # type: ignore[attr-defined]

    @jax.jit
    def routed(tokens: Array, outputs: Array, experts: Int[Array, "r"]) -> Float[Array, "n m"]:
        model = run.config.model if len(experts) == count else fewer(run.config.model, len(experts))
        router: Any = build_router(model.moe, model.width, nnx.Rngs(0))
        router.kernel[...] = kernel[:, experts]
        if bias is not None:
            router.bias[...] = bias[...][experts]
        own = jax.tree.map(lambda leaf: leaf[experts], state)
        routing = router(tokens, jnp.ones(tokens.shape[:2], bool), None, own)
        picked = outputs[experts[routing.experts[0]], jnp.arange(tokens.shape[1])[:, None]]
        return jnp.einsum("nk,nkm->nm", routing.weights[0], picked)

    whole = routed(tokens, outputs, jnp.arange(count))

    def error(experts: tuple[int, ...]) -> float:
        change = routed(tokens, outputs, jnp.asarray(experts)) - whole
        return float(jnp.linalg.norm(change) / jnp.linalg.norm(whole))

    return error
