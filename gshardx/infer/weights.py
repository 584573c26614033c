"""A trained model's variables, arranged for inference."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Int

from gshardx.errors import BadInput
from gshardx.infer.exchange import Exchange
from gshardx.layers import Layers, MergedExperts, MoE, Router, merged
from gshardx.layers.routing import MergingRouter
from gshardx.models.build import Blueprint, Params, Variables, blueprint
from gshardx.models.decode import check_causal
from gshardx.sharding import CompiledStep, shard
from gshardx.sharding.kept import KeptSteps


def merges(router: Router) -> bool:
    """Whether its experts are merged: they stay as they are trained, and so does the way to them."""
    return isinstance(router, MergingRouter)


class Serving(Layers):
    """Layers whose tokens reach their experts by ``exchange``; experts may be anywhere (``MoE.place``)."""

    def __init__(self, *args: Any, exchange: Exchange, rngs: nnx.Rngs) -> None:
        super().__init__(*args, rngs=rngs)
        for unit in self.separate:
            moe = unit.sparse.feed_forward
            assert isinstance(moe, MoE)
            if merges(moe.router):
                continue
            moe.dispatcher, moe.experts = exchange.dispatcher, MergedExperts(moe.experts, sliced=exchange.sliced)
            moe.place = nnx.data(shard(nnx.Param(jnp.arange(moe.router.num_experts)), "router", name="place"))


def separate(plan: Blueprint, variables: Variables, mesh: Mesh, exchange: Exchange) -> tuple[Blueprint, Variables]:
    """The same model with arrays of its own for each layer, as :class:`Serving` has it.

    Raises:
        BadInput: the model's router is not causal.
    """
    check_causal(plan)
    apart = blueprint(plan.config, plan.vocab, mesh, stack=partial(Serving, exchange=exchange))
    count, stay = len(apart.params["stack"]["separate"]), merges(plan.bind(plan.params).stack.router)

    def arrange(params: Params) -> Params:
        units: dict[Any, Params] = {}
        for index in range(count):
            unit = jax.tree.map(lambda leaf, index=index: leaf[index], params["stack"]["units"])
            moe = unit["sparse"]["feed_forward"]
            if not stay:
                moe = {**moe, "experts": merged(moe["experts"]), "place": jnp.arange(plan.config.moe.num_experts)}
            units[index] = {**unit, "sparse": {**unit["sparse"], "feed_forward": moe}}
        return {**params, "stack": {"separate": units}}

    places = jax.tree.map(lambda leaf: leaf.sharding, apart.params)
    kept = KeptSteps(mesh, repr((plan.config, plan.vocab, exchange)))
    with kept.making():
        step = kept.get("separate", lambda: CompiledStep(arrange, (plan.params,), mesh, out_shardings=places))
    return apart, variables._replace(params=step(variables.params))


def fewer_experts(plan: Blueprint, top_k: int, mesh: Mesh, exchange: Exchange) -> Blueprint:
    """The same parameters, read by a model that sends each token to ``top_k`` experts.

    Raises:
        BadInput: ``top_k`` is not below the model's own, or its router has no such choice.
    """
    moe = plan.config.moe
    if top_k >= moe.top_k:
        mend = "use fewer" if moe.top_k > 1 else "use the drafter prompt_lookup"
        raise BadInput(f"draft_experts = {top_k}: the model itself sends a token to {moe.top_k}; {mend}")
    config = dataclasses.replace(plan.config, moe=dataclasses.replace(moe, top_k=top_k))
    smaller = blueprint(config, plan.vocab, mesh, stack=partial(Serving, exchange=exchange))
    now, then = (one.bind(one.params).stack.router.choices(training=False) for one in (plan, smaller))
    if then >= now:
        raise BadInput(
            f"drafts = fewer_experts: top_k does not bound router {moe.router!r}; use the drafter prompt_lookup"
        )
    return dataclasses.replace(smaller, params=plan.params)


def placed(params: Params, old: Int[np.ndarray, "layer e"], new: Int[np.ndarray, "layer e"]) -> Params:
    """The parameters with each layer's experts moved from ``old`` to ``new`` places, and its table with them.

    Args:
        params: as :func:`separate` returns them.
        old, new: where each expert is, and is to be.
    """
    units = dict(params["stack"]["separate"])
    for layer, unit in units.items():
        came_from = jnp.asarray(old[layer][np.argsort(new[layer])])
        moe = unit["sparse"]["feed_forward"]
        experts = jax.tree.map(
            lambda leaf, at=came_from: jax.device_put(jnp.take(leaf, at, axis=0), leaf.sharding), moe["experts"]
        )
        table = jax.device_put(np.asarray(new[layer], np.int32), moe["place"].sharding)
        units[layer] = {
            **unit,
            "sparse": {**unit["sparse"], "feed_forward": {**moe, "experts": experts, "place": table}},
        }
    return {**params, "stack": {"separate": units}}
