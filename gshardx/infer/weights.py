"""A trained model's variables, arranged for inference."""

from typing import Any

import jax
from jax.sharding import Mesh

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
