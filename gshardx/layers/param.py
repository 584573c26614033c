"""Parameters that know their logical axes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

Initializer = Callable[..., Array]


def param(key: Array, axes: str, shape: tuple[int, ...], init: Initializer) -> nnx.Param[Array]:
    """A float32 parameter whose dimensions are named by ``axes``, for example ``"expert embed hidden"``."""
    names = tuple(axes.split())
    assert len(names) == len(shape), f"{axes} does not name {shape}"
    return nnx.Param(init(key, shape, jnp.float32), axes=names)


def fan_in_normal(fan_in: int, scale: float = 1.0) -> Initializer:
    """Normal with variance ``scale**2 / fan_in``."""
    return jax.nn.initializers.normal(scale * fan_in**-0.5)
