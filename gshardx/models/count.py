"""How many numbers a model has, from its shapes alone."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from gshardx.models.build import Blueprint


def count_parameters(blueprint: Blueprint, active: bool = False) -> int:
    """Numbers in the model; with ``active`` only those that a token meets: of each layer's experts, top_k."""
    moe = blueprint.config.moe
    arrays = jax.tree.leaves(blueprint.params)
    names: Sequence[Any] = jax.tree.leaves(blueprint.axes, is_leaf=lambda x: isinstance(x, tuple))
    sizes = (
        math.prod(a.shape) * (moe.top_k if active and "expert" in axes else moe.num_experts) // moe.num_experts
        for a, axes in zip(arrays, names, strict=True)
    )
    return sum(sizes)
