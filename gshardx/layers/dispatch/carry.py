"""Crossing from the devices that route tokens to those that hold the experts, and back."""

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

Wire = DTypeLike | None
"""Type in which values travel, for example ``jnp.bfloat16``; None: as they are."""


class Crossing(Protocol):
    """A pytree with two verbs, each the other's transpose."""

    def there(self, x: Array) -> Array: ...

    def back(self, x: Array) -> Array: ...


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def carry(there: bool, wire: Wire, x: Array, crossing: Crossing) -> Array:
    """``crossing.there(x)`` or ``.back(x)``; the gradient travels the other way, in the same type.

    A narrower ``wire`` travels as its bits: as numbers, XLA's CPU compiler would widen them again before they leave.
    """
    send = crossing.there if there else crossing.back
    if wire is None:
        return send(x)
    bits = jax.lax.bitcast_convert_type(x.astype(wire), f"uint{8 * jnp.dtype(wire).itemsize}")
    return jax.lax.bitcast_convert_type(send(bits), wire).astype(x.dtype)


def _forward(there: bool, wire: Wire, x: Array, crossing: Crossing) -> tuple[Array, Crossing]:
    return carry(there, wire, x, crossing), crossing


def _backward(there: bool, wire: Wire, crossing: Crossing, gradient: Array) -> tuple[Array, Any]:
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), crossing)
    return carry(not there, wire, gradient, crossing), nothing


carry.defvjp(_forward, _backward)
