"""Parameters that know their logical axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from gshardx.sharding import shard, variable_spec

Initializer = Callable[..., Array]


def param(key: Array, axes: str, shape: tuple[int, ...], init: Initializer) -> nnx.Param[Array]:
    """A float32 parameter whose dimensions are named by ``axes``, for example ``"expert embed hidden"``."""
    return shard(nnx.Param(init(key, shape, jnp.float32)), axes, name="parameter")


def param_shardings(params: nnx.State[Any, Any], mesh: Mesh) -> nnx.State[Any, Any]:
    """Where each parameter lives on ``mesh``, by its annotation: for ``jax.device_put`` and ``out_shardings``.

    Raises:
        BadInput: a parameter has no layout, or does not divide over the mesh.
    """

    def place(path: tuple[Any, ...], variable: nnx.Param[Array]) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, variable_spec(variable, mesh, name))

    placed: nnx.State[Any, Any] = jax.tree.map_with_path(place, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return placed


def fan_in_normal(fan_in: int, scale: float = 1.0) -> Initializer:
    """Normal with variance ``scale**2 / fan_in``."""
    return jax.nn.initializers.normal(scale * fan_in**-0.5)
