"""Crossing from the devices that route tokens to those that hold the experts, and back."""

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array

from gshardx.sharding import axis_size

Wire = DTypeLike | None
"""Type in which values travel, for example ``jnp.bfloat16``; None: as they are."""


ALL_TO_ALL_RESULTS = ("moe_at_experts", "moe_at_groups", "moe_counts")
"""Names (``jax.ad_checkpoint``) of what arrives from other devices: rematerialisation that saves these repeats none."""


class Crossing(Protocol):
    """A pytree with two verbs, each the other's transpose."""

    def there(self, x: Array) -> Array: ...

    def back(self, x: Array) -> Array: ...


def carry(there: bool, wire: Wire, x: Array, crossing: Crossing) -> Array:
    """``crossing.there(x)`` or ``.back(x)``, named for rematerialisation; the gradient travels the other way."""
    wire = wire if axis_size("expert") > 1 else None
    return checkpoint_name(_carry(there, wire, x, crossing), ALL_TO_ALL_RESULTS[0 if there else 1])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _carry(there: bool, wire: Wire, x: Array, crossing: Crossing) -> Array:
    """A narrower ``wire`` travels as bits: as numbers, XLA's CPU compiler would widen them again before they leave."""
    send = crossing.there if there else crossing.back
    if wire is None:
        return send(x)
    bits = jax.lax.bitcast_convert_type(x.astype(wire), f"uint{8 * jnp.dtype(wire).itemsize}")
    return jax.lax.bitcast_convert_type(send(bits), wire).astype(x.dtype)


def _forward(there: bool, wire: Wire, x: Array, crossing: Crossing) -> tuple[Array, Crossing]:
    return _carry(there, wire, x, crossing), crossing


def _backward(there: bool, wire: Wire, crossing: Crossing, gradient: Array) -> tuple[Array, Any]:
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), crossing)
    return _carry(not there, wire, gradient, crossing), nothing


_carry.defvjp(_forward, _backward)
