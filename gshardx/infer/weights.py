"""A trained model's variables, arranged for inference."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from gshardx.errors import BadInput
from gshardx.layers import Layers
from gshardx.models.build import Blueprint, Params, Variables, blueprint


def separate(plan: Blueprint, variables: Variables, mesh: Mesh) -> tuple[Blueprint, Variables]:
    """The same model with arrays of its own for each layer (:class:`gshardx.layers.Layers`), in the same places."""
    apart = blueprint(plan.config, plan.vocab, mesh, stack=Layers)
    stacked = variables.params["stack"]["units"]
    count = len(apart.params["stack"]["separate"])
    each: dict[Any, Params] = {
        index: jax.tree.map(lambda leaf, index=index: leaf[index], stacked) for index in range(count)
    }
    params = {**variables.params, "stack": {"separate": each}}
    placed = jax.device_put(params, jax.tree.map(lambda a: a.sharding, apart.params))
    return apart, variables._replace(params=placed)


def fewer_experts(plan: Blueprint, top_k: int, mesh: Mesh) -> Blueprint:
    """The same parameters, read by a model that sends each token to ``top_k`` experts.

    Raises:
        BadInput: ``top_k`` is not below the model's own, or its router has no such choice.
    """
    moe = plan.config.moe
    if top_k >= moe.top_k:
        raise BadInput(f"draft_experts = {top_k}: the model sends a token to {moe.top_k}; use fewer")
    config = dataclasses.replace(plan.config, moe=dataclasses.replace(moe, top_k=top_k))
    return dataclasses.replace(blueprint(config, plan.vocab, mesh, stack=Layers), params=plan.params)
